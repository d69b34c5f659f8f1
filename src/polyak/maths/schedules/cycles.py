"""The cyclic schedules, which know where they touch their lowest point."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

from polyak.errors import ArgumentError
from polyak.maths.elementwise import require
from polyak.maths.schedules.base import Schedule, at_least_one, check_rates, count


@dataclass(frozen=True)
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
        """The completed steps after which weights are averaged first; then once a cycle."""

    def is_averaging(self, step: int) -> bool:
        """Always."""
        return True

    def averages_after(self, completed: int) -> bool:
        """Once a cycle, where the rate just used was the lowest."""
        since = count("completed", completed) - self._first_point
        return since >= 0 and since % self.cycle == 0

    def averaging_points(self, steps: int | None = None) -> tuple[int, ...]:
        """Once a cycle, up to `steps`, which must be given: cycles never end.

        Raises ArgumentError without `steps`; inside a `chain` the length is known.
        """
        if steps is None:
            raise ArgumentError(
                f"{self} goes on for ever; say how far: averaging_points(steps=...), "
                "or give it a length in a chain."
            )
        return tuple(range(self._first_point, count("steps", steps) + 1, self.cycle))


@final
@dataclass(frozen=True)
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

    def _rate(self, step: int) -> float:
        t = (step % self.cycle + 1) / self.cycle
        return (1 - t) * self.high + t * self.low

    @property
    def _first_point(self) -> int:
        return 0 if self.include_start else self.cycle


@final
@dataclass(frozen=True)
class Sawtooth(_Cyclic):
    r"""The curve of torch's ``CyclicLR(base_lr=low, max_lr=high, step_size_up=1, ...)``.

    With $p$ = step mod `cycle`: `low` where $p = 0$, otherwise
    $high - (high - low)(p - 1) / (cycle - 1)$: low *in* its steps 0, cycle, 2 cycle, so that the
    weights are averaged after 1, cycle + 1, 2 cycle + 1 completed steps. It never touches the
    momentum, which `CyclicLR` switches on (0 becomes 0.9) and cycles.

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
@dataclass(frozen=True)
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
            f"Triangular cycle is {self.cycle}; expected an even number, for its middle to be a step.",
        )

    def _rate(self, step: int) -> float:
        t = (step % self.cycle + 1) / self.cycle
        height = abs(2 * t - 1)
        return height * self.high + (1 - height) * self.low

    @property
    def _first_point(self) -> int:
        return self.cycle // 2
