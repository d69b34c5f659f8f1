"""A profile that begins later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from polyak.maths.elementwise import at_least, at_most, require
from polyak.maths.profiles.base import Profile

# Added to an elapsed time, it changes nothing but turns 0 / 0 into 0: before the start the share
# is 0, on a device too, where the time cannot be looked at.
_TINY = 1e-300


@final
@dataclass(frozen=True)
class After(Profile):
    r"""Another profile that begins at a later time.

    $$F(x, t) = F_{inner}(\max(0, x - s),\; t - s)$$

    $s$ = `start_at` >= 0. Until then it is empty: $F = 0$, and nothing enters.

    Raises ArgumentError for a negative start, and for an EMA that keeps its first weights.

    >>> from polyak import SWA
    >>> After(100, SWA()).weights([50, 100, 110, 120]).tolist()
    [0.0, 0.0, 0.5, 0.5]
    """

    start_at: float
    profile: Profile
    has_horizon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(
            0 <= self.start_at < math.inf,
            f"After starts at {self.start_at}; expected a finite time, 0 or later.",
        )
        require(
            self.profile.initial_mass(1) == 0,
            f"After cannot hold {self.profile}: which weights are the first is not known before it "
            "starts. Use the debiased EMA, or attach the average later.",
        )

    @property
    def streaming(self) -> bool:  # type: ignore[override]
        """As the inner profile."""
        return self.profile.streaming

    @property
    def start(self) -> float:
        """The later start, and the inner one on top of it."""
        return self.start_at + self.profile.start

    def mass(self, x: float, now: float) -> float:
        """The inner mass, time counted from the start."""
        return self.profile.mass(self._elapsed(x), self._elapsed(now) + _TINY)

    def interval_mass(self, a: float, b: float, now: float) -> float:
        """The inner interval's mass, time counted from the start."""
        begin, end = self._elapsed(a), self._elapsed(b)
        return self.profile.interval_mass(begin, end, self._elapsed(now)) if end else 0.0

    def share(self, now: float, dt: float) -> float:
        """The inner share of what lies after the start; 0 before it."""
        elapsed = self._elapsed(now)
        return self.profile.share(elapsed + _TINY, at_most(elapsed, dt))

    def mean_age(self, now: float) -> float:
        """As the inner profile."""
        return self.profile.mean_age(now - self.start_at)

    def _elapsed(self, time: float) -> float:
        return at_least(time - self.start_at, 0)
