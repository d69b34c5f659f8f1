r"""Profiles: how much each moment of training counts in an average.

A profile is one function, the cumulative share $F(x, t)$: the share of the average, seen from now
$= t$, that comes from the time up to $x$, $0 \le x \le t$. Both are counted from the start of
averaging in any unit that only grows (steps, captures, samples, tokens). The rest follows:

- an interval $(a, b]$ holds $F(b, t) - F(a, t)$ (`interval_mass`);
- when time moves from $t - dt$ to $t$ the newest weights enter with $1 - F(t - dt, t)$ (`share`),
  and ``average += share * (weights - average)`` is exact for every *streaming* profile: one in
  which $F(x, t) / F(y, t)$ does not depend on $t$;
- weights taken at $t_1 < t_2 < \dots$ represent $(t_{i-1}, t_i]$, the first all before it
  (`weights`), which gives the effective number of samples; `mean_age` and `half_life` likewise.

Every formula is written in operators that floats, NumPy arrays and 0-d tensors share, so that the
share can be computed on a device from a time that lives there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from polyak.errors import ArgumentError, require
from polyak.maths.arguments import number, numbers


class Profile(ABC):
    """How much each moment counts. Subclasses are frozen dataclasses that define `mass`.

    Times are at least 0 and `now` is positive: before any time has passed the formulas give 0 / 0.
    Only `After` is defined before its start.
    """

    streaming: ClassVar[bool] = True
    """Whether one running average is exact; if not, stored snapshots or files are needed."""

    has_horizon: ClassVar[bool] = False
    """Whether a parameter is a length of time, so that the unit of time changes the meaning."""

    centred: ClassVar[bool] = True
    """Whether a stored snapshot stands for the time around it, if streaming, not for that before it."""

    @abstractmethod
    def mass(self, x: float, now: float) -> float:
        """`F(x, now)`: the share of the average at `now` that comes from the time up to `x`."""

    def interval_mass(self, a: float, b: float, now: float) -> float:
        """`F(b, now) - F(a, now)`: the share that comes from the interval `(a, b]`, a < b."""
        if self.streaming:
            # F(a, now) / F(b, now) = F(a, b): no digits cancel, however short the interval is.
            return self.mass(b, now) * self.share(b, b - a)
        return self.mass(b, now) - self.mass(a, now)

    def share(self, now: float, dt: float) -> float:
        """`1 - F(now - dt, now)`: the share of the weights of the last `dt` at `now`."""
        return 1 - self.mass(now - dt, now)

    def initial_mass(self, now: float) -> float:
        """The share kept by the very first weights, an atom at time 0."""
        return 0.0

    @property
    def start(self) -> float:
        """The time before which nothing is averaged."""
        return 0.0

    @property
    def innermost(self) -> Profile:
        """The profile inside any `After`; itself for all others."""
        return self

    @abstractmethod
    def mean_age(self, now: float) -> float:
        """`integral over x from 0 to now of F(x, now)`: how old the average is, in time units."""

    def half_life(self, now: float) -> float:
        """The age that half of the average does not exceed, in time units, by bisection."""
        young, old = 0.0, float(now)
        for _ in range(200):
            middle = (young + old) / 2
            if self.mass(now - middle, now) > 0.5:  # more than half is older
                young = middle
            else:
                old = middle
        return old

    def weights(self, times: Sequence[float], now: float | None = None) -> NDArray[np.float64]:
        """The share of each of the weights taken at `times`, which increase; they sum to 1.

        `now` is the last of the times by default; with a later one all weights are older, and
        their shares are scaled to sum to 1. Raises ArgumentError if the times do not increase from
        0 on, or if none of the weights counts at `now`.
        """
        moments = _increasing(times)
        now = moments[-1] if now is None else number("now", now)
        if not math.isfinite(now):
            raise ArgumentError(f"now is {now}; expected a finite time.")
        if now < moments[-1]:
            raise ArgumentError(f"now is {now}, but weights were taken after it, at {moments[-1]}.")
        if now <= self.start and not self.initial_mass(now):
            raise ArgumentError(f"{self} is empty until {self.start}; the time is {now}.")
        shares = np.empty(len(moments))
        shares[0] = self.mass(moments[0], now)
        for i in range(1, len(moments)):
            shares[i] = self.interval_mass(moments[i - 1], moments[i], now)
        return self._among_seen(shares, moments[-1], now)

    def effective_samples(self, times: Sequence[float], now: float | None = None) -> float:
        """`1 / sum of squared weights`: the number of equal weights that cancel as much noise."""
        return float(1 / np.square(self.weights(times, now)).sum())

    def _among_seen(
        self, shares: NDArray[np.float64], newest: float, now: float
    ) -> NDArray[np.float64]:
        if now == newest:
            return shares
        total = shares.sum()
        if not total > 0:
            raise ArgumentError(
                f"None of the weights taken up to {newest} counts in {self} at {now}."
            )
        return np.asarray(shares / total)


def check_profile(profile: object) -> None:
    """ArgumentError unless it is a profile, rather than its class or a number."""
    hint = f" Call it: {profile.__name__}(...)." if isinstance(profile, type) else ""
    require(
        isinstance(profile, Profile),
        f"Expected a profile, such as polyak.SWA() or polyak.EMA.from_half_life(3000); found "
        f"{profile!r}.{hint}",
    )


def take_number(profile: Profile, name: str, what: str) -> None:
    """Make a field of a frozen profile a plain number, or refuse it."""
    object.__setattr__(profile, name, number(what, getattr(profile, name)))


def _increasing(times: Sequence[float]) -> list[float]:
    moments = numbers("times", times)
    if moments.ndim != 1 or not moments.size:
        raise ArgumentError(f"Expected a list of times; found shape {moments.shape}.")
    if not (np.isfinite(moments).all() and moments[0] >= 0):
        raise ArgumentError(f"The times must be finite and at least 0; found {moments.min()}.")
    steps = np.diff(moments)
    if not (steps > 0).all():
        i = int(np.argmin(steps > 0))
        raise ArgumentError(
            f"The times must increase; found {moments[i + 1]} after {moments[i]} (place {i + 1})."
        )
    return [float(moment) for moment in moments]
