"""Known values, torch's own curves, domains."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as torch_lr

from polyak.errors import ArgumentError
from polyak.maths.schedules import (
    Constant,
    Cosine,
    CyclicLinear,
    Linear,
    Sawtooth,
    Triangular,
    Warmup,
    chain,
)

CYCLIC = CyclicLinear(high=0.05, low=0.01, cycle=10)
CLASSICAL = chain((50, Constant(0.1)), (50, Cosine(0.1, 0.01)), (40, CYCLIC))


def torch_curve(make, steps: int, lr: float = 0.1, momentum: float = 0.0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=momentum)
    with warnings.catch_warnings():
        # SequentialLR steps its own schedulers with the epoch that it calls deprecated.
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return rates, optimizer


def test_the_paper_s_cycle():
    expected = [0.046, 0.042, 0.038, 0.034, 0.030, 0.026, 0.022, 0.018, 0.014, 0.010] * 3
    assert [CYCLIC(s) for s in range(30)] == pytest.approx(expected, abs=1e-15)
    assert CYCLIC(9) == 0.01


def test_the_classical_schedule():
    assert CLASSICAL.averaging_points() == (100, 110, 120, 130, 140)
    assert CLASSICAL.total == 140
    assert CLASSICAL(49) == CLASSICAL(50) == 0.1
    assert CLASSICAL(100) == pytest.approx(0.046)
    assert CLASSICAL(140) == pytest.approx(0.046)  # the step past the end: cycles continue
    assert CLASSICAL.averaging_points(165) == (100, 110, 120, 130, 140, 150, 160)


def test_the_authors_code_leaves_the_first_out():
    schedule = CyclicLinear(high=0.05, low=0.01, cycle=10, include_start=False)
    assert chain((100, Constant(0.1)), (40, schedule)).averaging_points() == (110, 120, 130, 140)


def test_the_often_copied_torch_curve():
    """Constant, cosine, then CyclicLR; the sawtooth is that curve, without the momentum."""

    def make(optimizer):
        return torch_lr.SequentialLR(
            optimizer,
            [
                torch_lr.ConstantLR(optimizer, factor=1, total_iters=50),
                torch_lr.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.01),
                torch_lr.CyclicLR(
                    optimizer, base_lr=0.01, max_lr=0.05, step_size_up=1, step_size_down=9
                ),
            ],
            milestones=[50, 100],
        )

    rates, optimizer = torch_curve(make, 141)
    schedule = chain(
        (50, Constant(0.1)), (50, Cosine(0.1, 0.01)), (41, Sawtooth(high=0.05, low=0.01, cycle=10))
    )
    assert [schedule(s) for s in range(141)] == pytest.approx(rates, abs=1e-12)
    assert (rates[100], rates[101], rates[110]) == pytest.approx((0.01, 0.05, 0.01))
    assert schedule.averaging_points() == (101, 111, 121, 131, 141)
    assert optimizer.param_groups[0]["momentum"] != 0  # what CyclicLR does unasked


@pytest.mark.parametrize(
    ("make", "schedule", "lr"),
    [
        (lambda o: torch_lr.CosineAnnealingLR(o, 50, 0.01), Cosine(0.1, 0.01, steps=50), 0.1),
        (
            lambda o: torch_lr.LinearLR(o, 1.0, 0.1, total_iters=40),
            Linear(0.1, 0.01, steps=40),
            0.1,
        ),
        (lambda o: torch_lr.ConstantLR(o, 1.0), Constant(0.1), 0.1),
    ],
)
def test_torch_s_curves(make, schedule, lr):
    n = schedule.total or 50
    rates, _ = torch_curve(make, n + 1, lr)
    assert [schedule(s) for s in range(n + 1)] == pytest.approx(rates, abs=1e-12)
    assert schedule(10 * n) == schedule(n)  # held, where torch's cosine would turn round


def test_ends_are_exact():
    for curve in (Linear(0.3, 0.1, steps=7), Cosine(0.3, 0.1, steps=7)):
        assert (curve(0), curve(7), curve(8)) == (0.3, 0.1, 0.1)


def test_fge_in_its_own_words():
    high, low, cycle = 0.05, 0.01, 6

    def alpha(i):
        t = ((i - 1) % cycle + 1) / cycle
        return (
            (1 - 2 * t) * high + 2 * t * low if t <= 0.5 else (2 - 2 * t) * low + (2 * t - 1) * high
        )

    schedule = Triangular(high=high, low=low, cycle=cycle)
    assert [schedule(s) for s in range(20)] == pytest.approx([alpha(s + 1) for s in range(20)])
    assert schedule.averaging_points(20) == (3, 9, 15)
    assert schedule(2) == low


def test_warm_up():
    schedule = Warmup(4, chain((10, Constant(0.1)), (20, CYCLIC)))
    assert [schedule(s) for s in range(5)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert schedule.averaging_points() == (10, 20, 30)


def test_a_chain_gives_its_pieces_their_length():
    schedule = chain((4, Warmup(2, Linear(0.4, 0.0))), (6, Cosine(0.1, 0.0).per_epoch(2)))
    assert [schedule(s) for s in range(4)] == pytest.approx([0.2, 0.3, 0.2, 0.1])
    assert [schedule(4 + s) for s in range(6)] == pytest.approx(
        [0.1, 0.1, 0.075, 0.075, 0.025, 0.025]
    )
    # One that came with its own length keeps it, and holds.
    short = chain((10, Linear(0.1, 0.0, steps=2)), (1, Constant(1)))
    assert [short(s) for s in (0, 1, 2, 9)] == pytest.approx([0.1, 0.05, 0, 0])


def test_where_two_pieces_meet_both_are_asked():
    """The last lowest point of a cycle counts, though the next piece begins there."""
    schedule = chain((20, CYCLIC), (5, Constant(0.01)))
    assert schedule.averaging_points() == (0, 10, 20)
    assert schedule.averages_after(20)
    assert not schedule.averages_after(25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-0.1), "Constant rate is -0.1"),
        (lambda: Constant(math.nan), "finite learning rate"),
        (lambda: Linear(0.1, math.inf, steps=3), "Linear end is inf"),
        (lambda: Cosine(0.1, 0.01, steps=0), "1 or more"),
        (lambda: Cosine(0.1, 0.01)(3), "has no length yet"),
        (lambda: CyclicLinear(high=0.01, low=0.05, cycle=10), "expected low <= high"),
        (lambda: CyclicLinear(high=0.05, low=0.01, cycle=0), "1 or more"),
        (lambda: CyclicLinear(high=0.05, low=0.01, cycle=2.5), "whole number"),
        (lambda: Sawtooth(high=0.05, low=0.01, cycle=1), "2 or more"),
        (lambda: Triangular(high=0.05, low=0.01, cycle=3), "even"),
        (lambda: Warmup(0, CYCLIC), "1 or more"),
        (lambda: chain(), "at least one"),
        (lambda: chain((0, CYCLIC)), "1 or more"),
        (lambda: chain((CYCLIC, 10)), "a number of steps and a schedule"),
        (lambda: CYCLIC.averaging_points(), "never ends"),
        (lambda: CYCLIC.per_epoch(0), "steps per epoch is 0"),
        (lambda: CYCLIC.per_epoch(5).averaging_points(), "never ends"),
        (lambda: Warmup(3, CYCLIC).averaging_points(), "never ends"),
    ],
)
def test_domains(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
