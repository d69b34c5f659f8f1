"""The profiles: the mean, exponential and power averages, windows, annealing, and a later start."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, final

import numpy as np

from polyak.errors import require
from polyak.maths.arguments import flag, number
from polyak.maths.elementwise import at_least, at_most, exp, expm1, log, log1p
from polyak.maths.profile import Profile, check_profile, take_number

__all__ = [
    "EMA",
    "RELATIVE_STD_LIMIT",
    "SWA",
    "After",
    "Annealed",
    "PolynomialEMA",
    "PowerEMA",
    "Profile",
    "Window",
]

RELATIVE_STD_LIMIT = 1 / math.sqrt(12)
"""The relative standard deviation of the plain mean, 0.2887; that of a power profile is smaller."""


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

    centred: ClassVar[bool] = False

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
    $d^{dt}$, so averaging every k steps does not change the horizon. With ``keep_initial=True`` the
    first weights are not debiased away: time counts from them, $F(x, t) = d^{\,t-x}$, and they keep
    the share $d^{\,t}$, as in `torch.optim.swa_utils`.

    Raises ArgumentError unless 0 < decay < 1.

    Source: Polyak and Juditsky 1992; the debiasing is that of Adam, arXiv 1412.6980.

    >>> round(EMA(decay=0.9).share(now=1000, dt=1), 6), EMA(decay=0.9).share(now=1, dt=1)
    (0.1, 1.0)
    >>> round(EMA.from_half_life(500).half_life(now=1e6), 3)
    500.0
    """

    decay: float
    keep_initial: bool = field(default=False, kw_only=True)
    has_horizon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_number(self, "decay", "EMA decay")
        flag("EMA keep_initial", self.keep_initial)
        require(
            0 < self.decay < 1,
            f"EMA decay is {self.decay}; expected 0 < decay < 1 per unit of time "
            "(EMA.from_half_life takes a length of time).",
        )

    @classmethod
    def from_half_life(cls, half_life: float, *, keep_initial: bool = False) -> EMA:
        r"""The decay that halves a weight's share every `half_life` units: $d = 2^{-1/h}$.

        Raises ArgumentError outside 0.001 to 1e12, where float64 cannot represent the decay.
        """
        half_life = number("EMA half-life", half_life)
        require(
            1e-3 <= half_life <= 1e12,
            f"EMA half-life is {half_life}; expected a time from 0.001 to 1e12 units "
            "(choose another unit).",
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
    r"""The power-function average: its width grows with the run, so the start is forgotten.

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
        take_number(self, "gamma", "PowerEMA gamma")
        require(
            -1 < self.gamma < math.inf,
            f"PowerEMA gamma is {self.gamma}; expected a finite gamma > -1.",
        )

    @classmethod
    def from_relative_std(cls, std: float) -> PowerEMA:
        r"""The $\gamma$ whose profile has this standard deviation relative to the run.

        The largest real root of $\gamma^3 + 7\gamma^2 + (16 - s^{-2})\gamma + (12 - s^{-2}) = 0$.
        """
        std = number("PowerEMA relative std", std)
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


@final
@dataclass(frozen=True)
class PolynomialEMA(Profile):
    r"""Between the exponential and the power average: its horizon grows as a power of time below 1.

    $$F(x, t) = \frac{E(x, t) - E(0, t)}{1 - E(0, t)}, \qquad
      E(x, t) = \exp\left(-c \, \frac{t^{1-k} - x^{1-k}}{1 - k}\right), \qquad
      share = \frac{1 - E(t - dt, t)}{1 - E(0, t)}$$

    $k$ = `k`, $0 \le k < 1$, says how the horizon grows: a weight's share fades at the rate
    $c \, t^{-k}$, so the average looks back over about $t^k / c$. $k = 0$ is `EMA` with the decay
    $e^{-c}$, and $k \to 1$ is `PowerEMA` with $\gamma = c - 1$; debiased as they are. $c$ = `c` > 0.
    For $c = 1$ and large $t$ it is the p-EMA with $p = k$, whose n-th share is $(n + 1)^{-p}$: for
    $k > 1/2$ its noise vanishes almost surely, where that of an EMA stays.

    Raises ArgumentError unless 0 <= k < 1 and c is from 1e-12 to 1e12.

    Source: the p-EMA of arXiv 2505.10605; the EMA of BEMA, arXiv 2508.00180, is near k = 0.5.

    >>> profile = PolynomialEMA(c=1, k=0.5)
    >>> [round(profile.mean_age(now), 1) for now in (100, 10_000, 1_000_000)]
    [9.5, 99.5, 999.5]
    >>> PolynomialEMA(c=1, k=0).share(now=5, dt=1) == EMA(decay=math.exp(-1)).share(now=5, dt=1)
    True
    """

    c: float
    k: float
    has_horizon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_number(self, "c", "PolynomialEMA c")
        take_number(self, "k", "PolynomialEMA k")
        require(
            0 <= self.k < 1,
            f"PolynomialEMA k is {self.k}; expected 0 <= k < 1 (k = 1 is PowerEMA(gamma=c - 1)).",
        )
        require(
            1e-12 <= self.c <= 1e12,
            f"PolynomialEMA c is {self.c}; expected a number from 1e-12 to 1e12.",
        )

    def mass(self, x: float, now: float) -> float:
        """`(E(x, now) - E(0, now)) / (1 - E(0, now))`."""
        newer = at_least(x, now / 2)  # log(x / now) in two parts, exact near 0 and near now
        faded = self._faded(log(x / newer) + log1p((newer - now) / now), now)
        return exp(faded) * (expm1(-self._total(x)) / expm1(-self._total(now)))

    def share(self, now: float, dt: float) -> float:
        """`(1 - E(now - dt, now)) / (1 - E(0, now))`, without cancelling digits."""
        return expm1(self._faded(log1p(-dt / now), now)) / expm1(-self._total(now))

    def mean_age(self, now: float) -> float:
        """`integral of F(x, now)`, over `s = -ln E(x, now)` by Gauss-Legendre with 128 nodes."""
        nodes, weights = np.polynomial.legendre.leggauss(128)
        y = (nodes + 1) / 2
        total, curve = self._total(now), self.k / (1 - self.k)
        end = min(total, 40 / (1 + curve / total))  # what is older holds 4e-18
        s = end * (1 - y * y)  # y^2: a power of y, where the oldest part of F ends steeply
        left = total - end + end * y * y
        heights = np.exp(curve * np.log1p(-s / total) - s) * -np.expm1(-left)
        area = float(weights @ (heights * y)) * end
        age: float = area * now**self.k / self.c / -math.expm1(-total)
        return age

    def _total(self, x: float) -> float:
        """`-ln E(0, x)`."""
        total: float = self.c * x ** (1 - self.k) / (1 - self.k)
        return total

    def _faded(self, log_ratio: float, now: float) -> float:
        """`ln E(x, now)`, from `ln(x / now)`."""
        return self._total(now) * expm1((1 - self.k) * log_ratio)


@final
@dataclass(frozen=True)
class Window(Profile):
    r"""The mean of the last `length` units of time: LAWA, or the tail average.

    $$F(x, t) = \frac{\max(0,\; x - \max(0,\; t - L))}{\min(L, t)}$$

    $L$ = `length` > 0. Not streaming: the weights that leave the window must be known, so snapshots
    are kept, or files are read.

    Raises ArgumentError unless the length is positive and finite.

    Source: Kaddour 2022, arXiv 2209.14981.

    >>> Window(length=10).weights([5, 10, 15, 20]).tolist()
    [0.0, 0.0, 0.5, 0.5]
    """

    length: float
    streaming: ClassVar[bool] = False
    centred: ClassVar[bool] = False
    has_horizon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_number(self, "length", "Window length")
        require(
            0 < self.length < math.inf,
            f"Window length is {self.length}; expected a positive, finite time.",
        )

    def mass(self, x: float, now: float) -> float:
        """The part of the window before `x`."""
        opened = at_least(now - self.length, 0)
        return at_least(x - opened, 0) / at_most(now, self.length)

    def mean_age(self, now: float) -> float:
        """`min(length, now) / 2`."""
        return at_most(now, self.length) / 2


@final
@dataclass(frozen=True, repr=False)
class Annealed(Profile):
    r"""The average that replaces decaying the learning rate along a curve (WSM).

    $$F(x, t) = 1 - w(x / t)$$

    $w$ = `curve` is the decay being emulated: it falls from exactly 1 at 0 to exactly 0 at 1. Not
    streaming. The linear curve gives the plain mean.

    Raises ArgumentError for a curve that does not begin at 1, end at 0, or ever rises.

    Source: arXiv 2507.17634.

    >>> Annealed.from_shape("linear").weights([1, 2]).tolist()
    [0.5, 0.5]
    """

    curve: Callable[[float], float]
    streaming: ClassVar[bool] = False
    centred: ClassVar[bool] = False

    def __post_init__(self) -> None:
        curve: object = self.curve
        require(
            callable(curve) and not isinstance(curve, type),
            f"Annealed takes a function from 0..1 to 1..0; found {curve!r}. "
            "Annealed.from_shape('cosine') takes the name of one.",
        )
        values = [number("A value of an annealing curve", self.curve(i / 256)) for i in range(257)]
        require(
            values[0] == 1 and values[-1] == 0,
            "An annealing curve must fall from exactly 1 at 0 to exactly 0 at 1; "
            f"found {values[0]} at 0 and {values[-1]} at 1.",
        )
        require(
            all(a >= b for a, b in itertools.pairwise(values)),
            "An annealing curve must fall from 1 to 0; found one that rises in between.",
        )

    @classmethod
    def from_shape(cls, shape: str) -> Annealed:
        r"""One of the usual decays along $u$: linear $1 - u$, cosine $(1 + \cos \pi u) / 2$,
        sqrt $1 - \sqrt u$.

        Raises ArgumentError for any other name.
        """  # noqa: D205 - the shapes belong in one sentence
        curve = {name: curve for name, curve in _SHAPES.items() if name == shape}
        require(
            bool(curve),
            f"Annealing shape is {shape!r}; expected one of {', '.join(sorted(_SHAPES))}.",
        )
        return cls(curve=curve[shape])

    @property
    def shape(self) -> str | None:
        """The name of the curve, or None for a custom one."""
        return next((name for name, curve in _SHAPES.items() if curve is self.curve), None)

    def __repr__(self) -> str:
        # It is stored in files, so it must not contain an address.
        if self.shape is not None:
            return f"Annealed.from_shape({self.shape!r})"
        owner = getattr(self.curve, "__module__", "")
        name = getattr(self.curve, "__qualname__", type(self.curve).__qualname__)
        return f"Annealed(curve={owner}.{name})"

    def mass(self, x: float, now: float) -> float:
        """`1 - curve(x / now)`."""
        return 1 - self.curve(x / now)

    def interval_mass(self, a: float, b: float, now: float) -> float:
        """`curve(a / now) - curve(b / now)`."""
        return self.curve(a / now) - self.curve(b / now)

    def mean_age(self, now: float) -> float:
        """`now * (1 - integral of the curve)`, by Gauss-Legendre quadrature with 128 nodes."""
        nodes, weights = np.polynomial.legendre.leggauss(128)
        v = (nodes + 1) / 2
        # u = v^2: the vertical tangent of sqrt at 0 would cost most digits.
        heights = np.array([float(self.curve(u)) for u in np.square(v).tolist()])
        return now * (1 - float(weights @ (heights * v)))


def _linear(u: float) -> float:
    return 1 - u


def _cosine(u: float) -> float:
    return (1 + math.cos(math.pi * u)) / 2


def _sqrt(u: float) -> float:
    return 1 - math.sqrt(u)


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "sqrt": _sqrt,
}


# Added to an elapsed time it changes no value but turns 0 / 0 into 0: before the start the share is
# 0, also on a device, where the time cannot be compared without a synchronisation.
_TINY = 1e-300


@final
@dataclass(frozen=True)
class After(Profile):
    r"""Another profile that begins at a later time.

    $$F(x, t) = F_{inner}(\max(0, x - s),\; t - s)$$

    $s$ = `start_at` >= 0. Until then it is empty: $F = 0$, and nothing is averaged.

    Raises ArgumentError for a negative start, and for an EMA that keeps its first weights.

    >>> from polyak import SWA
    >>> After(100, SWA()).weights([50, 100, 110, 120]).tolist()
    [0.0, 0.0, 0.5, 0.5]
    """

    start_at: float
    profile: Profile
    has_horizon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_number(self, "start_at", "The start of After")
        check_profile(self.profile)
        require(
            0 <= self.start_at < math.inf,
            f"After starts at {self.start_at}; expected a finite time, 0 or later.",
        )
        require(
            self.profile.initial_mass(1) == 0,
            f"After cannot delay {self.profile}: which weights are the first is not known before "
            "it starts. Use the debiased EMA, or attach the average later.",
        )

    @property
    def streaming(self) -> bool:  # type: ignore[override]
        """As the inner profile."""
        return self.profile.streaming

    @property
    def start(self) -> float:
        """The later start plus that of the inner profile."""
        return self.start_at + self.profile.start

    @property
    def innermost(self) -> Profile:
        """That of the inner profile."""
        return self.profile.innermost

    def mass(self, x: float, now: float) -> float:
        """The inner mass, time counted from the start."""
        return self.profile.mass(self._elapsed(x), self._elapsed(now) + _TINY)

    def interval_mass(self, a: float, b: float, now: float) -> float:
        """The inner interval's mass, time counted from the start."""
        begin, end = self._elapsed(a), self._elapsed(b)
        return self.profile.interval_mass(begin, end, self._elapsed(now)) if end else 0.0

    def share(self, now: float, dt: float) -> float:
        """The inner share of the time after the start; 0 before it."""
        elapsed = self._elapsed(now)
        return self.profile.share(elapsed + _TINY, at_most(elapsed, dt))

    def mean_age(self, now: float) -> float:
        """As the inner profile."""
        return self.profile.mean_age(now - self.start_at)

    def _elapsed(self, time: float) -> float:
        return at_least(time - self.start_at, 0)
