"""What holds for every schedule. A new schedule is one line in TABLE."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak.errors import ArgumentError
from polyak.maths.schedules import (
    Constant,
    Cosine,
    CyclicLinear,
    Linear,
    Sawtooth,
    Schedule,
    Triangular,
    Warmup,
    chain,
)

CYCLIC = CyclicLinear(high=0.05, low=0.01, cycle=10)
TABLE: list[Schedule] = [
    Constant(0.1),
    Constant(0),
    Linear(0.1, 0.01, steps=50),
    Linear(0.01, 0.1, steps=1),
    Cosine(0.1, 0.01, steps=50),
    CYCLIC,
    CyclicLinear(high=0.05, low=0.01, cycle=10, include_start=False),
    CyclicLinear(high=0.05, low=0.05, cycle=1),
    Sawtooth(high=0.05, low=0.01, cycle=10),
    Triangular(high=0.05, low=0.01, cycle=4),
    Warmup(7, CYCLIC),
    Warmup(5, Cosine(0.1, 0.0, steps=20)),
    CYCLIC.per_epoch(3),
    chain((50, Constant(0.1)), (50, Cosine(0.1, 0.01)), (40, CYCLIC)),
    chain(
        (30, CYCLIC),
        (20, Constant(0.01)),
        (41, Sawtooth(high=0.05, low=0.01, cycle=10)),
        (1, Constant(0.1)),
    ),
    chain(
        (10, Triangular(high=0.1, low=0.01, cycle=4)),
        (20, chain((5, Linear(0.01, 0.05)), (15, CYCLIC))),
    ),
    chain((5, Constant(0.1)), (6, CyclicLinear(high=0.1, low=0.01, cycle=2))).per_epoch(4),
    Warmup(4, chain((5, Constant(0.1)), (9, Linear(0.1, 0.0)))),
    chain((6, Warmup(3, Linear(0.1, 0.0))), (8, Cosine(0.1, 0.01).per_epoch(3))),
]
every_schedule = pytest.mark.parametrize("schedule", [pytest.param(s, id=repr(s)) for s in TABLE])


@every_schedule
def test_every_step_has_a_rate(schedule):
    for step in range(300):  # far past the end of all of them
        assert 0 <= schedule(step) < math.inf
        assert isinstance(schedule(step), float | int)


@every_schedule
def test_points_and_the_question_agree(schedule):
    for steps in (0, 1, 40, 99, 100, 101, 140, 141, 250):
        asked = tuple(n for n in range(steps + 1) if schedule.averages_after(n))
        assert schedule.averaging_points(steps) == asked


@every_schedule
def test_points_lie_in_the_averaging_part_or_at_its_start(schedule):
    for point in schedule.averaging_points(300):
        assert schedule.is_averaging(point) or schedule.is_averaging(point - 1)


@every_schedule
def test_points_default_to_the_length(schedule):
    if schedule.total is not None:
        assert schedule.averaging_points() == schedule.averaging_points(schedule.total)


@every_schedule
def test_a_schedule_is_a_value(schedule):
    assert schedule == eval(
        repr(schedule), {**globals(), "Chain": _chain_class(), "PerEpoch": _per_epoch_class()}
    )
    assert len({schedule, schedule}) == 1


def _chain_class():
    from polyak.maths.schedules import Chain

    return Chain


def _per_epoch_class():
    from polyak.maths.schedules import PerEpoch

    return PerEpoch


@every_schedule
@given(a=st.integers(1, 9), b=st.integers(1, 9))
def test_per_epoch_composes(schedule, a, b):
    twice, once = schedule.per_epoch(a).per_epoch(b), schedule.per_epoch(a * b)
    assert [twice(s) for s in range(200)] == [once(s) for s in range(200)]
    assert twice.averaging_points(200) == once.averaging_points(200)
    assert twice.total == once.total


@every_schedule
def test_per_epoch_is_constant_within_an_epoch(schedule):
    in_steps = schedule.per_epoch(5)
    assert [in_steps(s) for s in range(150)] == [schedule(s // 5) for s in range(150)]
    assert in_steps.averaging_points(150) == tuple(5 * p for p in schedule.averaging_points(30))


@every_schedule
@pytest.mark.parametrize("before", [1, 17])
def test_a_chain_moves_a_schedule_and_changes_nothing_else(schedule, before):
    chained = chain((before, Constant(0.3)), (60, schedule))
    assert [chained(before + s) for s in range(200)] == [schedule(s) for s in range(200)]
    assert chained.averaging_points(before + 200) == tuple(
        before + p for p in schedule.averaging_points(200)
    )


@every_schedule
def test_a_chain_of_one_is_the_schedule(schedule):
    assert [chain((3, schedule))(s) for s in range(200)] == [schedule(s) for s in range(200)]


@every_schedule
def test_warm_up_scales_and_leaves_time_alone(schedule):
    warmed = Warmup(8, schedule)
    for step in range(100):
        assert warmed(step) == min(1.0, (step + 1) / 8) * schedule(step)
    assert warmed.averaging_points(100) == schedule.averaging_points(100)


@every_schedule
@pytest.mark.parametrize("step", [-1, 1.5, "3", None])
def test_steps_that_are_none_are_refused(schedule, step):
    with pytest.raises(ArgumentError, match="step is"):
        schedule(step)


@pytest.mark.parametrize("cyclic", [s for s in TABLE if hasattr(s, "cycle")], ids=repr)
def test_cycles_repeat_and_average_where_the_rate_is_lowest(cyclic):
    rates = [cyclic(s) for s in range(10 * cyclic.cycle)]
    assert rates == rates[: cyclic.cycle] * 10
    for point in cyclic.averaging_points(len(rates)):
        if point > 0:  # the rate that the step just taken used
            assert cyclic(point - 1) == cyclic.low == min(rates)
    assert max(rates) <= cyclic.high
