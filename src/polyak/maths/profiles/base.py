"""What every profile can do, given its cumulative share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from polyak.errors import ArgumentError


class Profile(ABC):
    """How much each moment counts. Subclasses are frozen dataclasses that give `mass`.

    Times are at least 0 and `now` is positive: before any time has passed there is nothing to
    share out, and 0 / 0 is what the formulas give. Only `After` may be asked before its start.
    """

    streaming: ClassVar[bool] = True
    """Whether one running average is exact; if not, stored snapshots or files are needed."""

    has_horizon: ClassVar[bool] = False
    """Whether a parameter is a length of time, so that the unit of time changes the meaning."""

    @abstractmethod
    def mass(self, x: float, now: float) -> float:
        """`F(x, now)`: the share of the average at `now` that comes from the time up to `x`."""

    def interval_mass(self, a: float, b: float, now: float) -> float:
        """`F(b, now) - F(a, now)`: the share that comes from the interval `(a, b]`, a < b."""
        if self.streaming:
            # F(a, now) / F(b, now) = F(a, b): nothing cancels however short the interval is.
            return self.mass(b, now) * self.share(b, b - a)
        return self.mass(b, now) - self.mass(a, now)

    def share(self, now: float, dt: float) -> float:
        """`1 - F(now - dt, now)`: with what share the weights of the last `dt` enter at `now`."""
        return 1 - self.mass(now - dt, now)

    def initial_mass(self, now: float) -> float:
        """The share kept by the very first weights, an atom at time 0."""
        return 0.0

    @property
    def start(self) -> float:
        """The time up to which nothing enters."""
        return 0.0

    @abstractmethod
    def mean_age(self, now: float) -> float:
        """`integral over x from 0 to now of F(x, now)`: how old the average is, in time units."""

    def half_life(self, now: float) -> float:
        """The age below which half of the average lies, in time units, by bisection."""
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

        `now` is the last of the times unless given; a later one ages what was taken, and the
        shares are those among what was seen. Raises ArgumentError where the times do not increase
        from 0 on, or where nothing that was taken counts at `now`.
        """
        moments = _increasing(times)
        now = moments[-1] if now is None else now
        if now < moments[-1]:
            raise ArgumentError(f"now is {now}, but weights were taken at {moments[-1]}, after it.")
        if now <= self.start and not self.initial_mass(now):
            raise ArgumentError(f"{self} is empty until {self.start}; the time is {now}.")
        shares = np.empty(len(moments))
        shares[0] = self.mass(moments[0], now)
        for i in range(1, len(moments)):
            shares[i] = self.interval_mass(moments[i - 1], moments[i], now)
        return self._among_seen(shares, moments[-1], now)

    def effective_samples(self, times: Sequence[float], now: float | None = None) -> float:
        """`1 / sum of squared weights`: as many equal weights would cancel as much noise."""
        return float(1 / np.square(self.weights(times, now)).sum())

    def _among_seen(
        self, shares: NDArray[np.float64], newest: float, now: float
    ) -> NDArray[np.float64]:
        if now == newest:
            return shares
        total = shares.sum()
        if not total > 0:
            raise ArgumentError(f"{self} at {now} holds nothing of what was taken up to {newest}.")
        return np.asarray(shares / total)


def _increasing(times: Sequence[float]) -> list[float]:
    moments = np.asarray(times, dtype=np.float64)
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
