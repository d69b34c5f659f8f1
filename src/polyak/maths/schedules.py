r"""Learning rates as plain functions of time, which also say when to average the weights.

A schedule is a frozen dataclass, called with a step counted from 0: the rate that this step uses.
Schedules are combined by wrapping (`chain`, `Warmup`, `per_epoch`) and have no side effects.

The cyclic ones know their lowest points, at which weights are averaged: `averaging_points` counts
*completed* steps, so weights taken after 100 are the result of steps 0 to 99.

>>> schedule = chain(
...     (50, Constant(0.1)), (50, Cosine(0.1, 0.01)), (40, CyclicLinear(high=0.05, low=0.01, cycle=10))
... )
>>> schedule(0), round(schedule(113), 12)
(0.1, 0.034)
>>> schedule.averaging_points()
(100, 110, 120, 130, 140)
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Self, final

from polyak.errors import ArgumentError, require
from polyak.maths.arguments import at_least_one, count, flag, number

__all__ = [
    "Chain",
    "Constant",
    "Cosine",
    "CyclicLinear",
    "Linear",
    "PerEpoch",
    "Sawtooth",
    "Schedule",
    "Triangular",
    "Warmup",
    "chain",
]


MOST_STEPS = 10_000_000
"""Of a schedule that is drawn or listed, point by point."""


class Schedule(ABC):
    """The learning rate as a function of the step. Subclasses are frozen dataclasses."""

    def __call__(self, step: int) -> float:
        """The rate that this step uses, steps counted from 0.

        Raises ArgumentError for a step that is negative or not an integer.
        """
        return self._rate(count("step", step))

    @abstractmethod
    def _rate(self, step: int) -> float: ...

    @property
    def total(self) -> int | None:
        """The number of steps it was made for, after which it continues; None if it has no end."""
        return None

    def over(self, steps: int) -> Schedule:
        """The same schedule with this length if it has none yet; `chain` calls it."""
        return self

    def is_averaging(self, step: int) -> bool:
        """Whether the step belongs to a part whose weights are averaged, one of the cycles."""
        return False

    def averages_after(self, completed: int) -> bool:
        """Whether to average the weights after this many completed steps."""
        return False

    def averaging_points(self, steps: int | None = None) -> tuple[int, ...]:
        """All completed steps, from 0 to `steps`, after which weights are averaged.

        `steps` is `total` by default. Raises ArgumentError if neither is known and the schedule
        averages without end.
        """
        return ()

    def per_epoch(self, steps: int) -> Schedule:
        """The schedule in steps, if its own unit is epochs of `steps` steps each.

        All steps of epoch e use the rate of e, and averaging after e epochs becomes averaging after
        e * steps steps.

        >>> from polyak.schedules import CyclicLinear
        >>> CyclicLinear(high=0.1, low=0.01, cycle=2).per_epoch(100).averaging_points(600)
        (0, 200, 400, 600)
        """
        return PerEpoch(self, steps)


@final
@dataclass(frozen=True)
class PerEpoch(Schedule):
    r"""A schedule that counts epochs, called with steps: $rate(s) = schedule(\lfloor s / n \rfloor)$.

    $n$ = `steps_per_epoch`. Made by `Schedule.per_epoch`.
    """

    schedule: Schedule
    steps_per_epoch: int

    def __post_init__(self) -> None:
        check_schedule("A schedule per epoch is made of", self.schedule)
        at_least_one("steps per epoch", self.steps_per_epoch)

    @property
    def total(self) -> int | None:
        """The epochs it was made for, in steps."""
        epochs = self.schedule.total
        return None if epochs is None else epochs * self.steps_per_epoch

    def over(self, steps: int) -> PerEpoch:
        """The inner one over the epochs in which these steps begin."""
        epochs = -(-at_least_one("steps", steps) // self.steps_per_epoch)
        return dataclasses.replace(self, schedule=self.schedule.over(epochs))

    def _rate(self, step: int) -> float:
        return self.schedule(step // self.steps_per_epoch)

    def is_averaging(self, step: int) -> bool:
        """As the inner one in this epoch."""
        return self.schedule.is_averaging(count("step", step) // self.steps_per_epoch)

    def averages_after(self, completed: int) -> bool:
        """At the ends of those epochs after which the inner one averages."""
        epochs, rest = divmod(count("completed", completed), self.steps_per_epoch)
        return rest == 0 and self.schedule.averages_after(epochs)

    def averaging_points(self, steps: int | None = None) -> tuple[int, ...]:
        """Those of the inner one, in steps."""
        epochs = None if steps is None else count("steps", steps) // self.steps_per_epoch
        return tuple(p * self.steps_per_epoch for p in self.schedule.averaging_points(epochs))


def check_schedule(what: str, schedule: object) -> None:
    """ArgumentError unless it is a schedule, rather than its class or a number."""
    hint = f" Call it: {schedule.__name__}(...)." if isinstance(schedule, type) else ""
    require(
        isinstance(schedule, Schedule),
        f"{what} a schedule, such as Constant(0.1); found {schedule!r}.{hint}",
    )


def check_rates(owner: str, **rates: float) -> None:
    """ArgumentError unless every rate is finite and not negative."""
    for name, rate in rates.items():
        require(
            0 <= number(f"{owner} {name}", rate) < math.inf,
            f"{owner} {name} is {rate}; expected a finite learning rate, 0 or more.",
        )


@final
@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate at every step.

    Raises ArgumentError for a rate that is negative or not finite.

    >>> Constant(0.1)(1000)
    0.1
    """

    rate: float

    def __post_init__(self) -> None:
        check_rates("Constant", rate=self.rate)

    def _rate(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True)
class _Falling(Schedule):
    """From `start` to `end` along a curve of the elapsed fraction, then held at `end`."""

    start: float
    end: float
    steps: int | None = None

    def __post_init__(self) -> None:
        check_rates(type(self).__name__, start=self.start, end=self.end)
        if self.steps is not None:
            at_least_one(f"{type(self).__name__} steps", self.steps)

    @property
    def total(self) -> int | None:
        """Its steps, or None if it has no length yet."""
        return self.steps

    def over(self, steps: int) -> Self:
        """The same curve over this many steps, unless it came with a length."""
        return self if self.steps is not None else dataclasses.replace(self, steps=steps)

    def _rate(self, step: int) -> float:
        if self.steps is None:
            raise ArgumentError(
                f"{self} has no length yet. Pass steps=, or put it into a chain: "
                f"chain((50, {type(self).__name__}({self.start}, {self.end})), ...)."
            )
        remaining = self._remaining(min(step / self.steps, 1.0))
        return remaining * self.start + (1 - remaining) * self.end

    @abstractmethod
    def _remaining(self, elapsed: float) -> float: ...


@final
@dataclass(frozen=True)
class Linear(_Falling):
    r"""A straight line: $rate(s) = start + (end - start) \min(s / n, 1)$, n = `steps`.

    `end` is reached at step n, one past its last, and held; inside a `chain` that is the first
    step of the next piece, as with torch's schedulers. `steps` is filled in by `chain`. It may
    rise as well as fall.

    Raises ArgumentError for rates that are negative or not finite, or fewer than one step.

    >>> [round(Linear(0.1, 0.0, steps=4)(s), 6) for s in range(6)]
    [0.1, 0.075, 0.05, 0.025, 0.0, 0.0]
    """

    def _remaining(self, elapsed: float) -> float:
        return 1 - elapsed


@final
@dataclass(frozen=True)
class Cosine(_Falling):
    r"""Half a cosine: $rate(s) = end + (start - end) (1 + \cos(\pi \min(s / n, 1))) / 2$.

    n = `steps`, filled in by `chain`; `end` is reached at step n, one past its last, and held, as
    with torch's `CosineAnnealingLR(T_max=n)`.

    Raises ArgumentError for rates that are negative or not finite, or fewer than one step.

    Source: Loshchilov and Hutter 2016, arXiv 1608.03983.

    >>> [round(Cosine(0.1, 0.0, steps=4)(s), 6) for s in range(6)]
    [0.1, 0.085355, 0.05, 0.014645, 0.0, 0.0]
    """

    def _remaining(self, elapsed: float) -> float:
        return (1 + math.cos(math.pi * elapsed)) / 2


@dataclass(frozen=True, kw_only=True)
class _Cyclic(Schedule):
    """The same `cycle` steps again and again, averaged once in each."""

    high: float
    low: float
    cycle: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_rates(name, high=self.high, low=self.low)
        require(
            self.low <= self.high,
            f"{name} goes from high={self.high} to low={self.low}; expected low <= high.",
        )
        at_least_one(f"{name} cycle", self.cycle)

    @property
    @abstractmethod
    def _first_point(self) -> int:
        """The completed steps after which weights are first averaged; then once a cycle."""

    def is_averaging(self, step: int) -> bool:
        """Always."""
        return True

    def averages_after(self, completed: int) -> bool:
        """Once a cycle, where the rate just used was the lowest."""
        since = count("completed", completed) - self._first_point
        return since >= 0 and since % self.cycle == 0

    def averaging_points(self, steps: int | None = None) -> tuple[int, ...]:
        """Once a cycle, up to `steps`, which is required because cycles never end.

        Raises ArgumentError without `steps`; inside a `chain` the length is known.
        """
        if steps is None:
            raise ArgumentError(
                f"{self} never ends. Pass a number of steps, averaging_points(steps=...), or put it "
                "into a chain, which gives it a length."
            )
        return tuple(range(self._first_point, count("steps", steps) + 1, self.cycle))


@final
@dataclass(frozen=True, kw_only=True)
class CyclicLinear(_Cyclic):
    r"""The cyclic schedule of the SWA paper: each cycle falls from near `high` to exactly `low`.

    $$\alpha(i) = (1 - t(i)) \, high + t(i) \, low, \qquad
      t(i) = \frac{((i - 1) \bmod cycle) + 1}{cycle}$$

    $i$ counts steps from 1 ($i$ = step + 1). The rate never quite reaches `high`; it is `low` when
    $i$ is a multiple of `cycle`, and there the weights are averaged. So are those that enter the
    first cycle, as in the paper's algorithm; `include_start=False` leaves them out, as the
    authors' code does. With ``cycle=1`` the rate is constant at `low`, averaged every step.

    Raises ArgumentError unless 0 <= low <= high, finite, and cycle >= 1.

    Source: Izmailov et al. 2018, arXiv 1803.05407, section 3.1.

    >>> schedule = CyclicLinear(high=0.05, low=0.01, cycle=10)
    >>> [round(schedule(s), 3) for s in (0, 1, 8, 9, 10)]
    [0.046, 0.042, 0.014, 0.01, 0.046]
    >>> schedule.averaging_points(30)
    (0, 10, 20, 30)
    """

    include_start: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("CyclicLinear include_start", self.include_start)

    def _rate(self, step: int) -> float:
        t = (step % self.cycle + 1) / self.cycle
        return (1 - t) * self.high + t * self.low

    @property
    def _first_point(self) -> int:
        return 0 if self.include_start else self.cycle


@final
@dataclass(frozen=True, kw_only=True)
class Sawtooth(_Cyclic):
    r"""The curve of torch's ``CyclicLR(base_lr=low, max_lr=high, step_size_up=1, ...)``.

    With $p$ = step mod `cycle`: `low` where $p = 0$, otherwise
    $high - (high - low)(p - 1) / (cycle - 1)$: low *in* its steps 0, cycle, 2 cycle, so the weights
    are averaged after 1, cycle + 1, 2 cycle + 1 completed steps. It leaves the momentum alone,
    which `CyclicLR` switches on (0 becomes 0.9) and cycles.

    Raises ArgumentError unless 0 <= low <= high, finite, and cycle >= 2.

    >>> schedule = Sawtooth(high=0.05, low=0.01, cycle=5)
    >>> [round(schedule(s), 3) for s in range(6)]
    [0.01, 0.05, 0.04, 0.03, 0.02, 0.01]
    >>> schedule.averaging_points(11)
    (1, 6, 11)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.cycle >= 2, f"Sawtooth cycle is {self.cycle}; expected 2 or more.")

    def _rate(self, step: int) -> float:
        phase = step % self.cycle
        t = (phase - 1) / (self.cycle - 1) if phase else 1.0
        return (1 - t) * self.high + t * self.low

    @property
    def _first_point(self) -> int:
        return 1


@final
@dataclass(frozen=True, kw_only=True)
class Triangular(_Cyclic):
    r"""The schedule of Fast Geometric Ensembling: down to `low` in mid-cycle, and up again.

    $$\alpha(i) = \begin{cases} (1 - 2t) \, high + 2t \, low & t \le 1/2 \\
      (2 - 2t) \, low + (2t - 1) \, high & t > 1/2 \end{cases}, \qquad
      t = \frac{((i - 1) \bmod cycle) + 1}{cycle}$$

    $i$ = step + 1. The weights are taken in mid-cycle, after cycle / 2, 3 cycle / 2, ... steps.

    Raises ArgumentError unless 0 <= low <= high, finite, and cycle is even.

    Source: Garipov et al. 2018, arXiv 1802.10026, section 4.

    >>> schedule = Triangular(high=0.05, low=0.01, cycle=4)
    >>> [round(schedule(s), 3) for s in range(5)]
    [0.03, 0.01, 0.03, 0.05, 0.03]
    >>> schedule.averaging_points(10)
    (2, 6, 10)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.cycle % 2 == 0,
            f"Triangular cycle is {self.cycle}; expected an even number, so that its middle is a step.",
        )

    def _rate(self, step: int) -> float:
        t = (step % self.cycle + 1) / self.cycle
        height = abs(2 * t - 1)
        return height * self.high + (1 - height) * self.low

    @property
    def _first_point(self) -> int:
        return self.cycle // 2


def chain(*pieces: tuple[int, Schedule]) -> Chain:
    """One schedule after another, each for its number of steps; the last one continues past its end.

    Every piece counts its own steps from 0. Past the end cycles repeat and other pieces hold their
    last rate, so the step past the end, which torch asks for, has a rate too.

    Raises ArgumentError without pieces, or for a piece of fewer than one step.

    >>> from polyak.schedules import Constant, Linear
    >>> schedule = chain((2, Constant(0.4)), (2, Linear(0.4, 0.2)))
    >>> [round(schedule(s), 3) for s in range(6)]
    [0.4, 0.4, 0.4, 0.3, 0.2, 0.2]
    """
    _check_pieces(pieces)
    return Chain(tuple((steps, schedule.over(steps)) for steps, schedule in pieces))


def _check_pieces(pieces: Sequence[Any]) -> None:
    require(bool(pieces), "A chain needs at least one (steps, schedule).")
    for piece in pieces:
        require(
            isinstance(piece, tuple | list) and len(piece) == 2,
            f"A chain joins (steps, schedule) pairs, like (50, Constant(0.1)); found {piece!r}.",
        )
        steps, schedule = piece
        check_schedule("Each piece of a chain is a number of steps and", schedule)
        at_least_one(f"The number of steps of {schedule} in a chain", steps)


@final
@dataclass(frozen=True)
class Chain(Schedule):
    """Pieces of (steps, schedule), one after another; made by `chain`."""

    pieces: tuple[tuple[int, Schedule], ...]

    def __post_init__(self) -> None:
        pieces: object = self.pieces
        require(isinstance(pieces, tuple), "Build a Chain with chain((steps, schedule), ...).")
        _check_pieces(self.pieces)

    @property
    def total(self) -> int:
        """The steps of all pieces."""
        return sum(steps for steps, _ in self.pieces)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The step at which each piece begins."""
        return (0, *accumulate(steps for steps, _ in self.pieces[:-1]))

    def piece_at(self, step: int) -> tuple[int, Schedule]:
        """The step at which the piece of this step began, and its schedule."""
        k = max(0, bisect_right(self.starts, step) - 1)
        return self.starts[k], self.pieces[k][1]

    def _rate(self, step: int) -> float:
        start, schedule = self.piece_at(step)
        return schedule(step - start)

    def is_averaging(self, step: int) -> bool:
        """As the piece of this step."""
        start, schedule = self.piece_at(count("step", step))
        return schedule.is_averaging(step - start)

    def averages_after(self, completed: int) -> bool:
        """Whether any piece averages there; where two meet, both the ending and the beginning one."""
        return any(
            completed - start <= steps and schedule.averages_after(completed - start)
            for start, steps, schedule in self._reaches(count("completed", completed))
        )

    def averaging_points(self, steps: int | None = None) -> tuple[int, ...]:
        """Those of all pieces; past the end the last piece continues."""
        last = self.total if steps is None else count("steps", steps)
        points = {
            start + point
            for start, reach, schedule in self._reaches(last)
            for point in schedule.averaging_points(min(reach, last - start))
        }
        return tuple(sorted(points))

    def _reaches(self, last: int) -> list[tuple[int, int, Schedule]]:
        """(start, steps, schedule) of pieces that begin by `last`; the last piece reaches all the way."""
        reaches = [
            (start, steps, schedule)
            for start, (steps, schedule) in zip(self.starts, self.pieces, strict=True)
            if start <= last
        ]
        if len(reaches) == len(self.pieces):
            start, steps, schedule = reaches[-1]
            reaches[-1] = (start, max(steps, last - start), schedule)
        return reaches


@final
@dataclass(frozen=True)
class Warmup(Schedule):
    r"""Another schedule whose first steps are scaled up linearly.

    $$rate(s) = \min(1, (s + 1) / n) \cdot schedule(s)$$

    $n$ = `length` steps. Time is that of the inner schedule, and so are its averaging points: the
    first step uses 1 / n of its rate, the n-th is the first at full rate.

    Raises ArgumentError for fewer than one step.

    Source: Goyal et al. 2017, arXiv 1706.02677.

    >>> from polyak.schedules import Constant
    >>> [round(Warmup(4, Constant(0.1))(s), 3) for s in range(6)]
    [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    """

    length: int
    schedule: Schedule

    def __post_init__(self) -> None:
        at_least_one("Warmup length", self.length)
        check_schedule("Warmup scales", self.schedule)

    @property
    def total(self) -> int | None:
        """That of the inner schedule."""
        return self.schedule.total

    def over(self, steps: int) -> Warmup:
        """The inner schedule over this many steps."""
        return dataclasses.replace(self, schedule=self.schedule.over(steps))

    def _rate(self, step: int) -> float:
        return min(1.0, (step + 1) / self.length) * self.schedule(step)

    def is_averaging(self, step: int) -> bool:
        """As the inner schedule."""
        return self.schedule.is_averaging(step)

    def averages_after(self, completed: int) -> bool:
        """As the inner schedule."""
        return self.schedule.averages_after(completed)

    def averaging_points(self, steps: int | None = None) -> tuple[int, ...]:
        """As the inner schedule."""
        return self.schedule.averaging_points(steps)
