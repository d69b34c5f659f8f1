"""Schedules made of schedules: one after another, or warmed up."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import final

from polyak.maths.elementwise import require
from polyak.maths.schedules.base import Schedule, at_least_one, count


def chain(*pieces: tuple[int, Schedule]) -> Chain:
    """One schedule after another, each for its number of steps; the last one goes on past its end.

    Every piece counts its own steps from 0. Cycles go on for ever, other pieces hold their last
    rate, so the step past the end, which torch asks for, has a rate too.

    Raises ArgumentError without pieces, or for a piece of less than one step.

    >>> from polyak import Constant, Linear
    >>> schedule = chain((2, Constant(0.4)), (2, Linear(0.4, 0.2)))
    >>> [round(schedule(s), 3) for s in range(6)]
    [0.4, 0.4, 0.4, 0.3, 0.2, 0.2]
    """
    require(bool(pieces), "A chain needs at least one (steps, schedule).")
    for steps, schedule in pieces:
        require(
            isinstance(schedule, Schedule),
            f"A chain joins (steps, schedule) pairs; found ({steps!r}, {schedule!r}).",
        )
        at_least_one(f"the number of steps of {schedule} in a chain", steps)
    return Chain(tuple((steps, schedule.over(steps)) for steps, schedule in pieces))


@final
@dataclass(frozen=True)
class Chain(Schedule):
    """Pieces of (steps, schedule), one after another; made by `chain`."""

    pieces: tuple[tuple[int, Schedule], ...]

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
        """Whether any piece says so; where two meet, the one that ends and the one that begins."""
        return any(
            completed - start <= steps and schedule.averages_after(completed - start)
            for start, steps, schedule in self._reaches(count("completed", completed))
        )

    def averaging_points(self, steps: int | None = None) -> tuple[int, ...]:
        """Those of all pieces; past the end the last piece goes on."""
        last = self.total if steps is None else count("steps", steps)
        points = {
            start + point
            for start, reach, schedule in self._reaches(last)
            for point in schedule.averaging_points(min(reach, last - start))
        }
        return tuple(sorted(points))

    def _reaches(self, last: int) -> list[tuple[int, int, Schedule]]:
        """(start, steps, schedule) of what begins by `last`; the last piece reaches all the way."""
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

    >>> from polyak import Constant
    >>> [round(Warmup(4, Constant(0.1))(s), 3) for s in range(6)]
    [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    """

    length: int
    schedule: Schedule

    def __post_init__(self) -> None:
        at_least_one("Warmup length", self.length)

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
