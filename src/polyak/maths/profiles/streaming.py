"""The profiles for which one running average is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from polyak.maths.elementwise import exp, expm1, log1p, require
from polyak.maths.profiles.base import Profile

RELATIVE_STD_LIMIT = 1 / math.sqrt(12)
"""The relative standard deviation of a power profile stays below that of the plain mean, 0.2887."""


@final
@dataclass(frozen=True)
class SWA(Profile):
    r"""The plain mean of all weights taken: Stochastic Weight Averaging.

    $$F(x, t) = x / t, \qquad share = dt / t$$

    With equal steps the share of the $n$-th weights is $1 / n$, which is the paper's update
    ``w_swa = (w_swa * n_models + w) / (n_models + 1)``. No parameter, no horizon.

    Source: Izmailov et al. 2018, arXiv 1803.05407.

    >>> [SWA().share(now=n, dt=1) for n in (1, 2, 4)]
    [1.0, 0.5, 0.25]
    """

    def mass(self, x: float, now: float) -> float:
        """`x / now`."""
        return x / now

    def interval_mass(self, a: float, b: float, now: float) -> float:
        """`(b - a) / now`."""
        return (b - a) / now

    def share(self, now: float, dt: float) -> float:
        """`dt / now`."""
        return dt / now

    def mean_age(self, now: float) -> float:
        """`now / 2`."""
        return now / 2


@final
@dataclass(frozen=True)
class EMA(Profile):
    r"""The exponential moving average, exactly debiased.

    $$F(x, t) = \frac{d^{\,t-x} - d^{\,t}}{1 - d^{\,t}}, \qquad
      share = \frac{1 - d^{\,dt}}{1 - d^{\,t}}$$

    $d$ = `decay`, $0 < d < 1$, is the factor per unit of time: steps of `dt` units decay by
    $d^{dt}$, so "every k steps" never changes the horizon. With ``keep_initial=True`` the first
    weights are not debiased away: time counts from them, $F(x, t) = d^{\,t-x}$, and they keep the
    atom $d^{\,t}$ at 0, which is what `torch.optim.swa_utils` computes.

    Raises ArgumentError unless 0 < decay < 1.

    Source: Polyak and Juditsky 1992; the debiasing is that of Adam, arXiv 1412.6980.

    >>> round(EMA(decay=0.9).share(now=1000, dt=1), 6), EMA(decay=0.9).share(now=1, dt=1)
    (0.1, 1.0)
    >>> round(EMA.from_half_life(500).half_life(now=1e6), 3)
    500.0
    """

    decay: float
    keep_initial: bool = False
    has_horizon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(
            0 < self.decay < 1,
            f"EMA decay is {self.decay}; expected 0 < decay < 1 per unit of time "
            "(EMA.from_half_life takes a length of time).",
        )

    @classmethod
    def from_half_life(cls, half_life: float, *, keep_initial: bool = False) -> EMA:
        r"""The decay that halves a weight's share every `half_life` units: $d = 2^{-1/h}$.

        Raises ArgumentError outside 0.001 to 1e12, where float64 has no decay that is near enough.
        """
        require(
            1e-3 <= half_life <= 1e12,
            f"EMA half-life is {half_life}; expected a time from 0.001 to 1e12 units "
            "(count in larger ones).",
        )
        return cls(decay=math.exp2(-1 / half_life), keep_initial=keep_initial)

    def mass(self, x: float, now: float) -> float:
        """`(d^(now - x) - d^now) / (1 - d^now)`, or `d^(now - x)` with the first weights kept."""
        remaining = exp(self._rate * (now - x))
        if self.keep_initial:
            return remaining
        return remaining * (expm1(self._rate * x) / expm1(self._rate * now))

    def share(self, now: float, dt: float) -> float:
        """`(1 - d^dt) / (1 - d^now)`, or `1 - d^dt` with the first weights kept."""
        if self.keep_initial:
            return -expm1(self._rate * dt)
        return expm1(self._rate * dt) / expm1(self._rate * now)

    def initial_mass(self, now: float) -> float:
        """`d^now` with the first weights kept, otherwise 0."""
        return exp(self._rate * now) if self.keep_initial else 0.0

    def mean_age(self, now: float) -> float:
        """`1 / r - now d^now / (1 - d^now)`, or `(1 - d^now) / r`, with `r = -ln d`."""
        filled = -expm1(self._rate * now)
        if self.keep_initial:
            return -filled / self._rate
        z = -self._rate * now
        if z < 0.01:  # the difference below would lose digits; error of the series: z^5 / 30240
            return now * (0.5 - z / 12 + z**3 / 720)
        return now / z - now * (1 - filled) / filled

    @property
    def _rate(self) -> float:
        return math.log(self.decay)


@final
@dataclass(frozen=True)
class PowerEMA(Profile):
    r"""The power-function average: its width grows with the run, so it forgets the start.

    $$F(x, t) = (x / t)^{\gamma + 1}, \qquad share = 1 - (1 - dt / t)^{\gamma + 1}$$

    $\gamma$ = `gamma` > -1; 0 is the plain mean, larger is younger. In EDM2's terms the width is
    $\sigma_{rel} = \sqrt{(\gamma + 1) / ((\gamma + 2)^2 (\gamma + 3))}$, the standard deviation of
    the profile relative to $t$ (`from_relative_std`, domain $0 < s < 1/\sqrt{12} = 0.2887$).

    Raises ArgumentError outside these domains.

    Source: Karras et al. 2023, arXiv 2312.02696, section 3 and appendix C.

    >>> round(PowerEMA.from_relative_std(0.10).gamma, 2)
    6.94
    >>> round(PowerEMA(gamma=0).share(now=4, dt=1), 12)
    0.25
    """

    gamma: float

    def __post_init__(self) -> None:
        require(
            -1 < self.gamma < math.inf,
            f"PowerEMA gamma is {self.gamma}; expected a finite gamma > -1.",
        )

    @classmethod
    def from_relative_std(cls, std: float) -> PowerEMA:
        r"""The $\gamma$ whose profile has this standard deviation relative to the run.

        The largest real root of $\gamma^3 + 7\gamma^2 + (16 - s^{-2})\gamma + (12 - s^{-2}) = 0$.
        """
        require(
            0 < std < RELATIVE_STD_LIMIT,
            f"PowerEMA relative std is {std}; expected 0 < std < {RELATIVE_STD_LIMIT:.4f}, "
            "which is that of the plain mean.",
        )
        inverse = std**-2
        # The other two roots have negative real parts, whatever the std.
        roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
        return cls(gamma=float(roots.real.max()))

    @property
    def relative_std(self) -> float:
        """The standard deviation of the profile divided by `now`."""
        g = self.gamma
        return math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))

    def mass(self, x: float, now: float) -> float:
        """`(x / now) ** (gamma + 1)`."""
        share: float = (x / now) ** (self.gamma + 1)
        return share

    def share(self, now: float, dt: float) -> float:
        """`1 - (1 - dt / now) ** (gamma + 1)`, without cancelling digits."""
        return -expm1((self.gamma + 1) * log1p(-dt / now))

    def mean_age(self, now: float) -> float:
        """`now / (gamma + 2)`."""
        return now / (self.gamma + 2)
