"""The schedules of the arms, when they average, and the hooks that do it."""

import copy
import dataclasses

import pytest
import torch

from polyak.reference_run.arm import Arm, arm_schedule, steps_per_epoch
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.recipe import Recipe, load_recipe

STEPS = 94
TAUGHT = load_recipe("taught")


def test_steps_of_an_epoch():
    assert steps_per_epoch(Recipe(), 6000) == STEPS
    assert steps_per_epoch(Recipe(batch_size=100), 6000) == 60


def test_sgd_is_constant_then_linear_then_held():
    rate = arm_schedule(TAUGHT, "sgd", STEPS)
    assert rate(0) == rate(20 * STEPS - 1) == 0.05
    assert rate(28 * STEPS) == pytest.approx((0.05 + 0.0005) / 2)
    assert rate(36 * STEPS) == pytest.approx(0.0005) == rate(40 * STEPS - 1)
    assert rate.averaging_points() == ()


def test_averaging_arms_follow_sgd_up_to_the_branch():
    sgd, swa, cyclic = (arm_schedule(TAUGHT, arm, STEPS) for arm in ("sgd", "swa", "cyclic"))
    assert all(sgd(i) == swa(i) == cyclic(i) for i in range(30 * STEPS))
    assert [swa(i) for i in range(30 * STEPS, 40 * STEPS)] == pytest.approx([0.05] * 10 * STEPS)
    cycle = [cyclic(i) for i in range(30 * STEPS, 32 * STEPS)]
    assert cycle[0] == pytest.approx(0.1, rel=0.01)
    assert cycle[-1] == pytest.approx(0.01)
    assert swa.averaging_points() == tuple(range(30 * STEPS, 40 * STEPS + 1, STEPS))
    assert cyclic.averaging_points() == tuple(range(30 * STEPS, 40 * STEPS + 1, 2 * STEPS))


def test_averaging_each_step():
    swa = arm_schedule(dataclasses.replace(TAUGHT, swa_average="step"), "swa", STEPS)
    assert len(swa.averaging_points()) == 10 * STEPS + 1


def test_the_default_is_one_run_at_a_constant_rate_and_two_that_are_annealed():
    sgd, half, swa = (arm_schedule(Recipe(), arm, STEPS) for arm in ("sgd", "half", "swa"))
    assert sgd(0) == pytest.approx(0.1 / STEPS)
    assert all(sgd(i) == half(i) == swa(i) for i in range(7 * STEPS))
    assert all(sgd(i) == swa(i) for i in range(15 * STEPS))
    assert [swa(i) for i in range(STEPS, 30 * STEPS)] == pytest.approx([0.1] * 29 * STEPS)
    assert half(15 * STEPS - 1) == pytest.approx(0.001) == sgd(30 * STEPS - 1)
    assert swa.averaging_points() == tuple(range(22 * STEPS, 30 * STEPS + 1, STEPS))


def test_the_note_is_the_classical_curve():
    recipe = load_recipe("note")
    cyclic = arm_schedule(recipe, "cyclic", STEPS)
    assert [p / STEPS for p in cyclic.averaging_points()] == [100, 110, 120, 130, 140]
    assert cyclic(50 * STEPS - 1) == 0.1
    assert cyclic(75 * STEPS) == pytest.approx(0.055)
    assert arm_schedule(recipe, "sgd", STEPS)(139 * STEPS) == pytest.approx(0.01)


def test_an_arm_averages_the_weights_with_which_it_leaves_sgd(short, few_images):
    sgd, cyclic = (
        Arm(short, few_images, Hardware.named("cpu"), seed=0, name=name)
        for name in ("sgd", "cyclic")
    )
    for epoch in range(short.branch_epoch):
        sgd.train_epoch(epoch)
    cyclic.load_state_dict(copy.deepcopy(sgd.state_dict()))
    entering = cyclic.model.output.weight.detach().clone()
    cyclic.train_epoch(short.branch_epoch)
    assert cyclic.averages["ema"].count == 4 * short.epochs
    assert cyclic.averages["swa"].count == len(cyclic.schedule.averaging_points()) == 2
    average = cyclic.averages["swa"].averaged_tensors()["output.weight"]
    torch.testing.assert_close(average, (entering + cyclic.model.output.weight.detach()) / 2)
