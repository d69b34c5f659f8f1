"""What was measured on a line, a plane or rays: plain values, a table when printed, rows for a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        text = f"Barrier from {self.start} to {self.end}: {self.height:.4g}"
        if self.height > 0:
            text += f", highest at {self.at:.3g}"
        if self.difference is None or self.low is None or self.high is None:
            return text
        noise = ", within noise" if self.low <= 0 <= self.high else ""
        return (
            f"{text}; at {self.chosen:.3g}, on the examples that did not choose that position, "
            f"{self.difference:+.4g}, 95% interval {self.low:+.4g} to {self.high:+.4g}{noise}"
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
        shown = [[*_cells(row), at.get(float(row[0]), "")] for row in rows]
        lines = _aligned([[*map(str, head), ""], *shown])
        return "\n".join([*lines, *map(str, self.barriers), *self._counted()])


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
            f"{len(self.x)} by {len(self.y)} points, x from {self.x[0]:.4g} to {self.x[-1]:.4g}, y from "
            f"{self.y[0]:.4g} to {self.y[-1]:.4g}{self._range()}"
        ]
        for name, at in self.points.items():
            if len(at) == 1:
                off = (
                    f", {self.distance[name]:.3g} off the plane"
                    if self.distance[name] > 1e-6
                    else ""
                )
                lines.append(f"  {name} at ({at[0, 0]:.4g}, {at[0, 1]:.4g}){off}")
        if self.explained is not None:
            lines.append(f"The plane holds {self.explained:.1%} of the variance of the intervals.")
        return "\n".join([*lines, *self._counted()])

    def _range(self) -> str:
        """The least and the greatest score, and where the best one is; nothing where there is none."""
        finite = self.values[np.isfinite(self.values)]
        if not len(finite):
            return ""
        best = finite.min() if self.minimize else finite.max()
        i, j = np.argwhere(self.values == best)[0]
        return (
            f"; scores from {finite.min():.6g} to {finite.max():.6g}\n"
            f"Best on the grid: {best:.6g} at ({self.x[j]:.4g}, {self.y[i]:.4g})"
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
        rows += [
            [name, *(f"{v:.6g}" for v in rows.mean(axis=0))] for name, rows in self.values.items()
        ]
        return "\n".join([*_aligned(rows), *self._counted()])


def _cells(row: Sequence[str | float]) -> list[str]:
    return [cell if isinstance(cell, str) else f"{cell:.6g}" for cell in row]


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
