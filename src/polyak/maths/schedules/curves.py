"""Schedules without cycles: constant, linear, cosine."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Self, final

from polyak.errors import ArgumentError
from polyak.maths.schedules.base import Schedule, at_least_one, check_rates


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
    """From `start` to `end` along a curve of the elapsed fraction; it holds `end` afterwards."""

    start: float
    end: float
    steps: int | None = None

    def __post_init__(self) -> None:
        check_rates(type(self).__name__, start=self.start, end=self.end)
        if self.steps is not None:
            at_least_one(f"{type(self).__name__} steps", self.steps)

    @property
    def total(self) -> int | None:
        """Its steps, or None while it has no length."""
        return self.steps

    def over(self, steps: int) -> Self:
        """The same curve over this many steps, unless it came with a length."""
        return self if self.steps is not None else dataclasses.replace(self, steps=steps)

    def _rate(self, step: int) -> float:
        if self.steps is None:
            raise ArgumentError(
                f"{self} has no length yet: give it steps=, or put it into a chain: "
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
