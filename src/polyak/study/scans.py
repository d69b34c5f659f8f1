"""What was measured on a line, a plane or rays: plain values, a table when printed, rows for a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyak.maths.numbers import (
    difference,
    for_terminal,
    rounded,
    shared_decimals,
    significant,
)

Floats = NDArray[np.float64]
Rows = list[list[str | float]]


@dataclass(frozen=True)
class Barrier:
    r"""The barrier between two checkpoints: how much worse the path is than the straight line of their scores.

    $$\max_t \; f(t) - ((1 - t) f(0) + t f(1))$$

    with $f$ the loss at position $t$ of the path (of a score of which more is better, its negative). height:
    that maximum over all examples, 0 where the path never rises. at: the position of the highest inner point.
    chosen: the position that is highest on one half of the examples; difference, low, high: its height on
    the other half, with its paired 95% bootstrap interval, which may be below 0. None where the evaluation
    returned one number. Source: Frankle et al. 2020, arXiv 1912.05671.
    """

    start: str
    end: str
    height: float
    at: float
    chosen: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        text = f"Barrier from {self.start} to {self.end}: {significant(self.height, 4)}"
        if self.height > 0:
            text += f", highest at {self.at:.3g}"
        if self.difference is None or self.low is None or self.high is None:
            return text
        value, low, high, holds_0 = difference(self.difference, self.low, self.high)
        return for_terminal(
            f"{text}; at {self.chosen:.3g}, on the examples that did not choose that position, "
            f"{value}, 95% interval {low} to {high}{', within noise' if holds_0 else ''}"
        )


@dataclass(frozen=True, kw_only=True)
class _Scan:
    minimize: bool
    evaluations: int
    cached: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON; what is not finite is None."""
        return {"kind": type(self).__name__, **_plain(asdict(self))}

    def _counted(self) -> list[str]:
        plural = "" if self.evaluations == 1 else "s"
        known = f"{self.evaluations} evaluation{plural}, {self.cached} more were known"
        return [known, *self.notes]


@dataclass(frozen=True, kw_only=True)
class LineScan(_Scan):
    """Scores on the way through checkpoints.

    names: of the S + 1 checkpoints, or the two ends of a curve. positions: (N,), checkpoint i is at i; below 0
    and above S is beyond the ends. distances: (N,), along the path from the first. values: (N,). barriers:
    one for each of the S segments.
    """

    names: tuple[str, ...]
    positions: Floats
    distances: Floats
    values: Floats
    barriers: tuple[Barrier, ...]

    def rows(self) -> Rows:
        """The head and one row for each point: position, distance, score."""
        found: Rows = [["position", "distance", "score"]]
        columns = zip(self.positions, self.distances, self.values, strict=True)
        return found + [[float(p), float(d), float(v)] for p, d, v in columns]

    def __str__(self) -> str:
        at = {float(i): name for i, name in enumerate(self.names)}
        head, *rows = self.rows()
        digits = shared_decimals(self.values.tolist())
        shown = [
            [significant(p, 6), significant(d, 6), rounded(v, digits), at.get(p, "")]
            for p, d, v in ([float(cell) for cell in row] for row in rows)
        ]
        lines = _aligned([[*map(str, head), ""], *shown])
        return for_terminal("\n".join([*lines, *map(str, self.barriers), *self._counted()]))


@dataclass(frozen=True, kw_only=True)
class PlaneScan(_Scan):
    """Scores on a plane in weight space.

    x: (X,), y: (Y,), distances along two orthonormal axes. values: (Y, X). points: named weights, each as
    (n, 2) places on the plane. distance: of each from the plane, the largest. explained: the share of the
    variance of a trajectory's intervals that is in its own plane.
    """

    x: Floats
    y: Floats
    values: Floats
    points: dict[str, Floats]
    distance: dict[str, float]
    explained: float | None = None

    def rows(self) -> Rows:
        """The head and one row for each point: x, y, score."""
        found: Rows = [["x", "y", "score"]]
        for i, y in enumerate(self.y):
            found += [
                [float(x), float(y), float(v)] for x, v in zip(self.x, self.values[i], strict=True)
            ]
        return found

    def __str__(self) -> str:
        lines = [
            f"{len(self.x)} by {len(self.y)} points, x from {_at(self.x[0])} to {_at(self.x[-1])}, y from "
            f"{_at(self.y[0])} to {_at(self.y[-1])}{self._range()}"
        ]
        for name, at in self.points.items():
            if len(at) == 1:
                off = (
                    f", {self.distance[name]:.3g} off the plane"
                    if self.distance[name] > 1e-6
                    else ""
                )
                lines.append(f"  {name} at ({_at(at[0, 0])}, {_at(at[0, 1])}){off}")
        if self.explained is not None:
            lines.append(f"The plane holds {self.explained:.1%} of the variance of the intervals.")
        return for_terminal("\n".join([*lines, *self._counted()]))

    def _range(self) -> str:
        """The least and the greatest score, and where the best one is; nothing where there is none."""
        finite = self.values[np.isfinite(self.values)]
        if not len(finite):
            return ""
        best = finite.min() if self.minimize else finite.max()
        i, j = np.argwhere(self.values == best)[0]
        digits = shared_decimals(finite.tolist())
        return (
            f"; scores from {rounded(finite.min(), digits)} to {rounded(finite.max(), digits)}\n"
            f"Best on the grid: {rounded(best, digits)} at ({_at(self.x[j])}, {_at(self.y[i])})"
        )


@dataclass(frozen=True, kw_only=True)
class RayScan(_Scan):
    """Scores along random rays from each of several centres: the same directions from every centre.

    distances: (T,), from 0. values: of each centre (R, T). normalize: None for directions uniform on the unit
    sphere; "filter" for those of Li et al., whose distances are multiples of the filters' own lengths.
    """

    distances: Floats
    values: dict[str, Floats]
    normalize: str | None

    def rows(self) -> Rows:
        """The head and one row for each point: centre, ray, distance, score."""
        found: Rows = [["centre", "ray", "distance", "score"]]
        for name, rows in self.values.items():
            for ray, row in enumerate(rows):
                found += [
                    [name, ray, float(d), float(v)]
                    for d, v in zip(self.distances, row, strict=True)
                ]
        return found

    def __str__(self) -> str:
        rows = [["mean of the rays, by distance", *(f"{d:.4g}" for d in self.distances)]]
        means = {name: one.mean(axis=0).tolist() for name, one in self.values.items()}
        digits = shared_decimals(chain.from_iterable(means.values()))
        rows += [[name, *(rounded(v, digits) for v in one)] for name, one in means.items()]
        return for_terminal("\n".join([*_aligned(rows), *self._counted()]))


def _at(place: float) -> str:
    return significant(place, 4)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
