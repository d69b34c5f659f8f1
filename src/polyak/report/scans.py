"""Pictures of scans through weight space, and their files: pictures, JSON, CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polyak.errors import ArgumentError
from polyak.files import file_target, replacing
from polyak.report.drawing import GREY, INK, style
from polyak.report.figures import plot_plane, plot_rays
from polyak.study.scans import LineScan, PlaneScan, RayScan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Scan = LineScan | PlaneScan | RayScan
_PICTURES = (".png", ".svg", ".pdf")


def plot_scan(scan: Scan, ax: Axes, *, ylabel: str = "score") -> None:
    """Draw a scan into an `ax`: a line with its checkpoints and barriers, contours, or rays.

    ylabel: what the score is.
    """
    if isinstance(scan, LineScan):
        _plot_path(scan, ax, ylabel)
    elif isinstance(scan, PlaneScan):
        plot_plane(
            ax, scan.x, scan.y, scan.values, scan.points, title=ylabel, minimize=scan.minimize
        )
    else:
        unit = "in lengths of the weights" if scan.normalize else "along a random direction"
        plot_rays(ax, scan.distances, scan.values, ylabel=ylabel, xlabel=f"distance {unit}")


def save_scan(
    scan: Scan, path: str | Path, *, ylabel: str = "score", overwrite: bool = False
) -> None:
    """Write a scan: `.json` all of it, `.csv` one row for each point, `.png`, `.svg` or `.pdf` a picture.

    Raises ArgumentError for another suffix, OutputError if the file exists or cannot be written, MissingExtra if
    matplotlib is not installed.
    """
    target = Path(path)
    check_scan_targets([target], overwrite=overwrite)
    kind = target.suffix.lower()
    if kind == ".json":
        found = (json.dumps(scan.as_dict(), indent=1, allow_nan=False) + "\n").encode()
    elif kind == ".csv":
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(scan.rows())
        found = lines.getvalue().encode()
    else:
        found = _picture(scan, kind.removeprefix("."), ylabel)
    with replacing(target, overwrite=overwrite) as part:
        part.write_bytes(found)


def check_scan_targets(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse what `save_scan` could not write, before hours of evaluations."""
    for path in paths:
        if path.suffix.lower() not in (".json", ".csv", *_PICTURES):
            raise ArgumentError(
                f"{path} ends in {path.suffix or 'no suffix'!r}; expected .json, .csv, .png, .svg or .pdf."
            )
        if path.suffix.lower() in _PICTURES:
            with style():  # raises where there is no matplotlib
                pass
        file_target(path, overwrite=overwrite)
    if len({path.absolute() for path in paths}) < len(paths):
        raise ArgumentError("The same output is named twice. Name each once.")


def _picture(scan: Scan, kind: str, ylabel: str) -> bytes:
    with style():
        from matplotlib.figure import Figure

        figure, pixels = Figure(), io.BytesIO()
        plot_scan(scan, figure.add_subplot(), ylabel=ylabel)
        dated = {"Date": None} if kind == "svg" else None
        figure.savefig(pixels, format=kind, metadata=dated, bbox_inches="tight")
    return pixels.getvalue()


def _plot_path(scan: LineScan, ax: Axes, ylabel: str) -> None:
    ax.plot(scan.distances, scan.values, "-", color=GREY, lw=1.6)
    for name, barrier in zip(scan.names, (*scan.barriers, None), strict=True):
        place = _at(scan, scan.names.index(name))
        ax.plot([scan.distances[place]], [scan.values[place]], "o", ms=6, color=INK)
        ax.annotate(
            name, (scan.distances[place], scan.values[place]), xytext=(0, 6), textcoords="offset points",
            ha="center", fontsize="small",
        )  # fmt: skip
        if barrier is not None:
            _plot_barrier(scan, ax, place, barrier.height, barrier.at)
    ax.set(xlabel="distance along the path", ylabel=ylabel)
    ax.margins(y=0.15)


def _plot_barrier(scan: LineScan, ax: Axes, start: int, height: float, at: float) -> None:
    """The straight line between the ends, and the height above it."""
    index = round(float(scan.positions[start]))
    end = _at(scan, index + 1)
    first, last = scan.values[start], scan.values[end]
    ax.plot(scan.distances[[start, end]], [first, last], ":", color=GREY, lw=1)
    if 0 < height < np.inf:
        place = int(np.argmin(np.abs(scan.positions - (index + at))))
        chord = (1 - at) * first + at * last
        ax.vlines(scan.distances[place], chord, scan.values[place], color=GREY, lw=1)


def _at(scan: LineScan, index: int) -> int:
    return int(np.argmin(np.abs(scan.positions - index)))
