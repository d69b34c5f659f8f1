"""The profiles that need what was stored: snapshots, a trajectory, or files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from polyak.maths.elementwise import at_least, at_most, require
from polyak.maths.profiles.base import Profile


@final
@dataclass(frozen=True)
class Window(Profile):
    r"""The mean of the last `length` units of time: LAWA, or the tail average.

    $$F(x, t) = \frac{\max(0,\; x - \max(0,\; t - L))}{\min(L, t)}$$

    $L$ = `length` > 0. Not streaming: what leaves the window must be known, so snapshots are kept,
    or a trajectory or files are read.

    Raises ArgumentError unless the length is positive and finite.

    Source: Kaddour 2022, arXiv 2209.14981.

    >>> Window(length=10).weights([5, 10, 15, 20]).tolist()
    [0.0, 0.0, 0.5, 0.5]
    """

    length: float
    streaming: ClassVar[bool] = False
    has_horizon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(
            0 < self.length < math.inf,
            f"Window length is {self.length}; expected a positive, finite time.",
        )

    def mass(self, x: float, now: float) -> float:
        """The part of the window that lies before `x`."""
        opened = at_least(now - self.length, 0)
        return at_least(x - opened, 0) / at_most(now, self.length)

    def mean_age(self, now: float) -> float:
        """`min(length, now) / 2`."""
        return at_most(now, self.length) / 2


@final
@dataclass(frozen=True, repr=False)
class Annealed(Profile):
    r"""The average that stands in for decaying the learning rate along a curve (WSM).

    $$F(x, t) = 1 - w(x / t)$$

    $w$ = `curve` is the decay being emulated: it falls from exactly 1 at 0 to exactly 0 at 1. Not
    streaming. The linear curve gives the plain mean.

    Raises ArgumentError for a curve that does not begin at 1, end at 0, or ever rises.

    Source: arXiv 2507.17634.

    >>> Annealed.shaped("linear").weights([1, 2]).tolist()
    [0.5, 0.5]
    """

    curve: Callable[[float], float]
    streaming: ClassVar[bool] = False

    def __post_init__(self) -> None:
        values = [float(self.curve(i / 256)) for i in range(257)]
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
    def shaped(cls, shape: str) -> Annealed:
        r"""One of the usual decays along $u$: linear $1 - u$, cosine $(1 + \cos \pi u) / 2$,
        sqrt $1 - \sqrt u$.

        Raises ArgumentError for any other name.
        """  # noqa: D205 - the shapes belong in one sentence
        require(
            shape in _SHAPES,
            f"Annealing shape is {shape!r}; expected one of {', '.join(sorted(_SHAPES))}.",
        )
        return cls(curve=_SHAPES[shape])

    @property
    def shape(self) -> str | None:
        """The name of the curve, or None for one's own."""
        return next((name for name, curve in _SHAPES.items() if curve is self.curve), None)

    def __repr__(self) -> str:
        # It stands in files, so it must not hold an address.
        if self.shape is not None:
            return f"Annealed.shaped({self.shape!r})"
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
        # u = v^2: curves like sqrt have a vertical tangent at 0, which would cost most digits.
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
