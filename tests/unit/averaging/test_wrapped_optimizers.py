"""The weights are taken when all of a step is over, however the optimizer is wrapped."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from reference.optimizers import (
    WRAPPERS,
    Clipped,
    Delegating,
    DuckTyped,
    HooklessSlowWeights,
    SelfMade,
    Sharpness,
    SlowWeights,
    TwoHalves,
    gradients,
    problem,
)
from torch import nn
from torch.optim import SGD, Optimizer

from polyak import SWA, Average
from polyak.errors import ArgumentError, EmptyAverage, PolyakWarning, UsageError


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("every", [1, 3])
def test_the_weights_are_those_after_all_of_the_step(make, every):
    SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # from now on the hooks of SGD.step fire too
    model = problem()
    optimizer = make(model)
    average = Average(model, SWA())
    average.attach(optimizer, every=every)
    seen = []
    for _ in range(9):
        gradients(model)
        optimizer.step()
        seen.append(model.weight.detach().clone())
    expected = torch.stack(seen[every - 1 :: every]).mean(0)
    torch.testing.assert_close(average.averaged_tensors()["weight"], expected)
    assert (average.count, average.time) == (9 // every, 9)


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_everything_is_given_back(make):
    model = problem()
    optimizer = make(model)
    before = dict(vars(optimizer))
    first, second = Average(model, SWA()), Average(model, SWA())
    handles = [first.attach(optimizer), second.attach(optimizer)]
    for handle in handles:  # the first first: the second one's `step` is around it
        handle.remove()
    assert vars(optimizer).keys() == before.keys()
    assert all(vars(optimizer)[name] is value for name, value in before.items())
    gradients(model)
    optimizer.step()
    assert first.empty
    assert second.empty


def test_the_wrapper_of_schedulefree():
    schedulefree = pytest.importorskip("schedulefree")
    model = problem()
    optimizer = schedulefree.ScheduleFreeWrapper(SGD(model.parameters(), lr=0.1))
    optimizer.train()
    average = Average(model, SWA())
    average.attach(optimizer)
    seen = []
    for _ in range(6):
        gradients(model)
        optimizer.step()
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(seen).mean(0))


def test_a_wrapper_that_leaves_steps_out_counts_those_it_takes():
    class Accumulating(HooklessSlowWeights):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            if self.calls % 4 == 0:
                super().step(closure)

    class HookedAccumulating(SlowWeights):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            if self.calls % 4 == 0:
                super().step(closure)

    for kind in (Accumulating, HookedAccumulating):
        model = problem()
        optimizer = kind(SGD(model.parameters(), lr=0.1))
        average = Average(model, SWA())
        average.attach(optimizer)
        seen = []
        for index in range(12):
            gradients(model)
            optimizer.step()
            if index % 4 == 3:
                seen.append(model.weight.detach().clone())
        assert average.count == 3
        torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(seen).mean(0))


def test_the_optimizer_inside_may_be_stepped_alone():
    model = problem()
    inner = SGD(model.parameters(), lr=0.1)
    outer = HooklessSlowWeights(inner)
    average = Average(model, SWA())
    average.attach(outer)
    for optimizer in (outer, inner, outer):
        gradients(model)
        optimizer.step()
    assert average.count == 3


@pytest.mark.parametrize("kind", [SlowWeights, HooklessSlowWeights, Clipped])
def test_a_step_that_raises_does_not_count_and_spoils_no_later_one(kind):
    model = problem()
    inner = SGD(model.parameters(), lr=0.1)
    optimizer = kind(inner)
    average = Average(model, SWA())
    average.attach(optimizer)

    def broken(*_):
        raise ZeroDivisionError

    handle = inner.register_step_pre_hook(broken)
    gradients(model)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    handle.remove()
    seen = []
    for _ in range(4):
        gradients(model)
        optimizer.step()
        seen.append(model.weight.detach().clone())
    assert average.count == 4
    torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(seen).mean(0))


@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("kind", [SlowWeights, HooklessSlowWeights])
def test_schedulers_and_scalers_around_a_wrapper(kind, scheduler_first):
    model = problem()
    optimizer = kind(SGD(model.parameters(), lr=0.1))
    average = Average(model, SWA())
    if not scheduler_first:
        average.attach(optimizer)
    optimizer.defaults = {}
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    if scheduler_first:
        average.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    seen = []
    for index in range(6):
        model.zero_grad()
        scaler.scale(model(torch.randn(4, 3)).square().mean()).backward()
        if index in (1, 3):
            model.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if index not in (1, 3):
            seen.append(model.weight.detach().clone())
    assert average.count == 4
    torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(seen).mean(0))


def test_a_copy_of_a_wrapper_steps_itself():
    model = problem()
    optimizer = Clipped(SGD(model.parameters(), lr=0.1))
    average = Average(model, SWA())
    average.attach(optimizer)
    with pytest.warns(PolyakWarning, match="copied or pickled"):
        twin = copy.deepcopy(optimizer)
    with pytest.warns(PolyakWarning, match="copied or pickled"):
        thawed = pickle.loads(pickle.dumps(optimizer))
    before = model.weight.detach().clone()
    for other in (twin, thawed):
        parameters = [p for group in other.wrapped.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = torch.ones_like(p)
        values = [p.detach().clone() for p in parameters]
        other.step()
        assert not any(torch.equal(p, v) for p, v in zip(parameters, values, strict=True))
    assert torch.equal(model.weight, before)
    assert average.count == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_steps_of_a_copy_that_has_no_hooks_do_not_count(copied):
    model = problem()
    optimizer = DuckTyped(model.parameters())
    average = Average(model, SWA())
    average.attach(optimizer)
    twin = copied(optimizer)
    for p in twin.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    twin.step()
    assert average.count == 0
    assert not torch.equal(twin.param_groups[0]["params"][0], model.weight)


def test_a_hook_registered_later_that_changes_the_weights():
    model = problem()
    optimizer = SGD(model.parameters(), lr=0.5)
    average = Average(model, SWA())
    average.attach(optimizer)
    optimizer.register_step_post_hook(lambda *_: model.weight.data.clamp_(-0.01, 0.01))
    seen = []
    for _ in range(5):
        gradients(model)
        optimizer.step()
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(seen).mean(0))


@pytest.mark.parametrize("framework", ["lightning", "fabric"])
def test_the_wrappers_of_lightning(framework):
    pytest.importorskip("lightning")
    model = problem()
    optimizer = SGD(model.parameters(), lr=0.1)
    if framework == "fabric":
        from lightning.fabric import Fabric

        wrapped_model, wrapped = Fabric(accelerator="cpu", devices=1).setup(model, optimizer)
        average = Average(wrapped_model, SWA())
    else:
        from lightning.pytorch.core.optimizer import LightningOptimizer
        from lightning.pytorch.strategies import SingleDeviceStrategy

        wrapped, average = LightningOptimizer(optimizer), Average(model, SWA())
        wrapped._strategy = SingleDeviceStrategy()
        wrapped._strategy.optimizer_step = lambda o, closure, **_: o.step(closure)
    average.attach(wrapped)
    seen = []
    for _ in range(4):
        gradients(model)
        wrapped.step()
        seen.append(model.weight.detach().clone())
    assert average.count == 4
    torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(seen).mean(0))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("halves", [True, False])
def test_sharpness_aware_steps_in_two_halves_or_one(halves, correct, late):
    model = problem()
    optimizer = Sharpness(model.parameters(), correct)
    average = Average(model, SWA())
    average.attach(optimizer, before_next_step=late)
    seen = []
    for _ in range(5):
        gradients(model)
        if halves:
            optimizer.first_step(zero_grad=True)
            gradients(model)
            optimizer.second_step()
        else:
            optimizer.step(lambda: gradients(model))
        seen.append(model.weight.detach().clone())
    assert average.count == 5
    torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(seen).mean(0))


def test_halves_that_no_hook_sees_are_said():
    model = problem()
    optimizer = TwoHalves(model.parameters())
    average = Average(model, SWA())
    with pytest.warns(
        PolyakWarning, match=r"ascent_step\(\) and descent_step\(\) besides step\(\)"
    ):
        average.attach(optimizer)
    gradients(model)
    optimizer.descent_step()
    with pytest.warns(EmptyAverage, match=r"step\(\) of TwoHalves, .* has not been called"):
        average.copy_to(problem())
    with pytest.raises(UsageError, match="has not been called"):
        average.averaged_tensors()


def test_what_can_step_nothing_is_refused():
    class Stepless(Optimizer):
        pass

    class Minimizer:  # as ASAM's: no step() of its own
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def descent_step(self):
            self.optimizer.step()

    class Frozen:
        __slots__ = ("optimizer",)

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model = problem()
    inner = SGD(model.parameters(), lr=0.1)
    for wrong, message in (
        (Stepless(model.parameters(), {}), r"no step\(\) of its own"),
        (Minimizer(inner), "found Minimizer"),
        (Frozen(inner), r"its step\(\) cannot be watched"),
        (model, "found Linear"),
        ([inner, Delegating(inner)], "several different ones"),
        (SelfMade([torch.zeros(1)]), "None of the 1 parameters"),
    ):
        average = Average(model, SWA())
        with pytest.raises(ArgumentError, match=message):
            average.attach(wrong)
        assert not inner._optimizer_step_pre_hooks
        assert not inner._optimizer_step_post_hooks
    average.attach(Minimizer(inner).optimizer)


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_an_attached_step_is_refused_before_it_steps(make):
    model = problem()
    optimizer = make(model)
    average = Average(model, SWA())
    average.attach(optimizer)
    gradients(model)
    optimizer.step()
    live = model.weight.detach().clone()
    with average.applied():
        gradients(model)
        lent = model.weight.detach().clone()
        with pytest.raises(UsageError, match=r"inside applied\(\)"):
            optimizer.step()
        assert torch.equal(model.weight, lent)
    assert torch.equal(model.weight, live)
    gradients(model)
    optimizer.step()
    assert average.count == 2
