r"""Lines, rays, segments and planes through weight space (Izmailov et al. 2018, figures 3 to 5).

Every function takes an entered `Surface` and points of it, vectors (P,), and returns plain NumPy
arrays, ready for the functions of `polyak.report` or any other plot.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyak.errors import ArgumentError
from polyak.study.surface import Surface

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """Values at `start + position * (end - start)`; `length` is the distance between the ends."""

    positions: Floats  # (T,) 0 is the start, 1 the end
    length: float
    values: dict[str, Floats]  # each (T,)


@dataclass(frozen=True)
class Rays:
    """Values at `centre + distance * direction` for R random unit directions."""

    distances: Floats  # (T,)
    values: dict[str, Floats]  # each (R, T)


@dataclass(frozen=True)
class Segments:
    """Values on the S segments between consecutive points, at the same positions on each."""

    positions: Floats  # (T,) from 0 to 1
    lengths: Floats  # (S,)
    values: dict[str, Floats]  # each (S, T)

    def barriers(self, name: str) -> Floats:
        r"""Height of the barrier on each segment, (S,): 0 where the segment never rises.

        $$\max_t \; f(t) - ((1 - t) f(0) + t f(1))$$

        The largest height of the segment above the straight line between the values $f$ at its
        ends. Source: Frankle et al. 2020, arXiv 1912.05671.
        """
        values = self.values[name]
        chord = values[:, :1] * (1 - self.positions) + values[:, -1:] * self.positions
        return np.asarray((values - chord).max(axis=1), dtype=np.float64)


@dataclass(frozen=True)
class Plane:
    r"""The plane through three points $w_1, w_2, w_3$, with an orthonormal basis $u, v$.

    $$u = \frac{w_2 - w_1}{|w_2 - w_1|}, \quad
    v = \frac{\hat v}{|\hat v|}, \; \hat v = w_3 - w_1 - \langle w_3 - w_1, u \rangle u, \quad
    P(x, y) = w_1 + x u + y v$$

    Source: Izmailov et al. 2018, arXiv 1803.05407, and the authors' code.
    """

    origin: Tensor  # (P,)
    u: Tensor  # (P,)
    v: Tensor  # (P,)

    @classmethod
    def through(cls, first: Tensor, second: Tensor, third: Tensor) -> Plane:
        """The plane through three points; raises ArgumentError if they are on one line, or two are the same."""
        named = (("first", first), ("second", second), ("third", third))
        for (one, a), (other, b) in itertools.combinations(named, 2):
            if torch.equal(a, b):
                raise ArgumentError(
                    f"The {one} and the {other} point are the same. Pass three checkpoints that differ."
                )
        along, across = second - first, third - first
        length = along.norm()
        u = along / length
        v = across - (across @ u) * u
        height = v.norm()
        if not (length > 0 and height > 1e-9 * across.norm()):
            raise ArgumentError(
                "The three points are on one line, which does not determine a plane. Pass three "
                "checkpoints that are not."
            )
        return cls(first, u, v / height)

    def point(self, x: float, y: float) -> Tensor:
        """P(x, y), a vector (P,)."""
        return self.origin + x * self.u + y * self.v

    def project(self, point: Tensor) -> tuple[float, float, float]:
        """(x, y) of the foot of `point` in the plane, and its distance from the plane."""
        offset = point - self.origin
        x, y = float(offset @ self.u), float(offset @ self.v)
        return x, y, float((offset - x * self.u - y * self.v).norm())


@dataclass(frozen=True)
class Grid:
    """Values at P(x[j], y[i]) of a plane."""

    x: Floats  # (X,)
    y: Floats  # (Y,)
    values: dict[str, Floats]  # each (Y, X)


def along_line(surface: Surface, start: Tensor, end: Tensor, positions: Sequence[float]) -> Line:
    """Measure along the line through two points; positions below 0 and above 1 are beyond them."""
    step = end - start
    values = _measure(surface, [start + position * step for position in positions])
    return Line(np.asarray(positions, float), float(step.norm()), values)


def along_rays(
    surface: Surface, centre: Tensor, distances: Sequence[float], *, n_rays: int = 10, seed: int = 0
) -> Rays:
    r"""Measure along random rays from `centre`.

    A direction is uniform on the unit sphere of all P parameters, gaussian / norm, without
    normalisation by filter or layer. The same seed gives the same directions for every centre, so
    centres compare ray by ray.
    """
    away = [distance for distance in distances if distance != 0]
    directions = [
        direction.to(centre.device) for direction in _directions(len(centre), n_rays, seed)
    ]
    points = [centre + distance * direction for direction in directions for distance in away]
    # The centre is common to all rays and measured once, first.
    flat = _measure(surface, [centre, *points])
    column = {distance: 1 + i for i, distance in enumerate(away)} | {0: 0}
    at = np.array([column[distance] for distance in distances])
    rays = np.arange(n_rays)[:, None] * len(away)
    index = np.where(at == 0, 0, at + rays)
    return Rays(np.asarray(distances, float), {name: flat[name][index] for name in flat})


def along_segments(surface: Surface, points: Sequence[Tensor], *, n_inner: int = 5) -> Segments:
    """Measure on the segments between consecutive points: the ends and `n_inner` points between.

    An end that two segments share is measured once. Raises ArgumentError for fewer than two points.
    """
    if len(points) < 2:
        raise ArgumentError(
            f"There are {len(points)} points; segments between them need 2 or more."
        )
    positions = np.linspace(0, 1, n_inner + 2)
    chain = [points[0]]
    for start, end in itertools.pairwise(points):
        chain += [start + float(position) * (end - start) for position in positions[1:]]
    flat = _measure(surface, chain)
    at = np.arange(len(points) - 1)[:, None] * (n_inner + 1) + np.arange(n_inner + 2)
    steps = [float((b - a).norm()) for a, b in itertools.pairwise(points)]
    return Segments(positions, np.array(steps), {name: flat[name][at] for name in flat})


def on_plane(surface: Surface, plane: Plane, x: Sequence[float], y: Sequence[float]) -> Grid:
    """Measure on the grid of a plane."""
    flat = _measure(surface, [plane.point(a, b) for b in y for a in x])
    shape = (len(y), len(x))
    grids = {name: values.reshape(shape) for name, values in flat.items()}
    return Grid(np.asarray(x, float), np.asarray(y, float), grids)


def _measure(surface: Surface, points: Sequence[Tensor]) -> dict[str, Floats]:
    rows = [surface.at(point) for point in points]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _directions(size: int, n_rays: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)  # the global state stays as it is
    gaussians = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(n_rays)]
    return [gaussian / gaussian.norm() for gaussian in gaussians]
