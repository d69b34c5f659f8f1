"""What every schedule can do, given the rate of a step."""

from __future__ import annotations

import dataclasses
import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from polyak.errors import ArgumentError
from polyak.maths.elementwise import require


class Schedule(ABC):
    """The learning rate as a function of the step. Subclasses are frozen dataclasses."""

    def __call__(self, step: int) -> float:
        """The rate that this step uses, steps counted from 0.

        Raises ArgumentError for a step that is negative or no integer.
        """
        return self._rate(count("step", step))

    @abstractmethod
    def _rate(self, step: int) -> float: ...

    @property
    def total(self) -> int | None:
        """How many steps it was made for; None where it has no end. Past it, it goes on."""
        return None

    def over(self, steps: int) -> Schedule:
        """The same schedule with this length, where it has none of its own; `chain` calls it."""
        return self

    def is_averaging(self, step: int) -> bool:
        """Whether the step belongs to a part whose weights are averaged, one of the cycles."""
        return False

    def averages_after(self, completed: int) -> bool:
        """Whether the weights are to be averaged after this many completed steps."""
        return False

    def averaging_points(self, steps: int | None = None) -> tuple[int, ...]:
        """All completed steps, from 0 to `steps`, after which weights are averaged.

        `steps` is `total` unless given. Raises ArgumentError where neither is known and the
        schedule averages for ever.
        """
        return ()

    def per_epoch(self, steps: int) -> Schedule:
        """The schedule in steps, when its own unit is epochs of so many `steps`.

        All steps of epoch e use the rate of e, and what was averaged after e epochs is averaged
        after e * steps steps.

        >>> from polyak import CyclicLinear
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
        at_least_one("steps per epoch", self.steps_per_epoch)

    @property
    def total(self) -> int | None:
        """The epochs it was made for, in steps."""
        epochs = self.schedule.total
        return None if epochs is None else epochs * self.steps_per_epoch

    def over(self, steps: int) -> PerEpoch:
        """The inner one over the epochs that these steps begin."""
        epochs = -(-steps // self.steps_per_epoch)
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


def count(what: str, number: int) -> int:
    """A whole number, 0 or more; ArgumentError for anything else."""
    try:
        whole = operator.index(number)
    except TypeError:
        raise ArgumentError(f"{what} is {number!r}; expected a whole number.") from None
    require(whole >= 0, f"{what} is {whole}; expected 0 or more.")
    return whole


def at_least_one(what: str, number: int) -> int:
    """A whole number, 1 or more; ArgumentError for anything else."""
    require(count(what, number) >= 1, f"{what} is {number}; expected 1 or more.")
    return number


def check_rates(owner: str, **rates: float) -> None:
    """ArgumentError unless every rate is finite and not negative."""
    for name, rate in rates.items():
        require(
            0 <= rate < math.inf,
            f"{owner} {name} is {rate}; expected a finite learning rate, 0 or more.",
        )
