"""The pictures of a run: each a function that takes an `ax` and plain arrays.

They are independent of runs, files and pages, so that you can call them as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyak.report.drawing import GREY
from polyak.report.meanings import colour_of, dashes_of, distinct_colours
from polyak.study.paired import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm

FEWEST = 10
"""The smallest number of predictions for which the accuracy of a bin is drawn."""

_CHARACTERS_PER_INCH, _HANDLE = 13, 5
"""About as many characters of a legend stand in an inch; the line before a name takes the place of some."""


@dataclass(frozen=True)
class Curve:
    """One line of a picture."""

    x: ArrayLike
    y: ArrayLike


@dataclass(frozen=True)
class Band:
    """A mean over seeds, and the lowest and the highest of them."""

    x: NDArray[Any]
    mean: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]


def legend_above(ax: Axes, title: str = "", order: Sequence[str] = ()) -> None:
    """The legend, under the title, where no data are: above the axes; in two columns if they fit."""
    by_name = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    names = [name for name in order or by_name if name in by_name]
    handles = [by_name[name] for name in names]
    if not names:
        ax.set_title(title)
        return
    characters = _CHARACTERS_PER_INCH * ax.get_window_extent().width / ax.figure.dpi
    first, second = names[: (len(names) + 1) // 2], names[(len(names) + 1) // 2 :]
    needed = sum(max(map(len, column), default=0) + _HANDLE for column in (first, second))
    ax.legend(
        handles, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.2, markerscale=0.8,
        title=title or None, ncols=2 if second and needed <= characters else 1,
    )  # fmt: skip


def plot_rates(
    ax: Axes,
    rates: Mapping[str, tuple[ArrayLike, ArrayLike]],
    averaged: Mapping[str, tuple[ArrayLike, ArrayLike]],
) -> None:
    """Rates by name, (x, rate), and the weights that are averaged at theirs.

    x is completed epochs; the rate of a step is drawn over that step, and a marker shows the rate
    just used.
    """
    for name, (x, rate) in rates.items():
        ax.plot(x, rate, color=colour_of(name), label=name, lw=1.4)
    for name, (x, rate) in averaged.items():
        ax.plot(x, rate, "o", ms=5, color=colour_of(name), mec="white", mew=0.8, label=name)
    ax.set(xlabel="epochs completed", ylabel="learning rate", ylim=(0, None))
    legend_above(ax)


def plot_history(  # noqa: PLR0913 - keyword-only
    ax: Axes,
    curves: Mapping[str, Curve],
    *,
    ylabel: str,
    reference: float | None = None,
    reference_label: str = "SGD at the end",
    ylim: tuple[float, float] | None = None,
    title: str = "",
) -> None:
    """Values over epochs; `reference`, the final value of the annealed run, is drawn across."""
    for name, curve in curves.items():
        _plot(ax, name, curve.x, curve.y)
    if reference is not None:
        colour = colour_of(reference_label)
        ax.axhline(reference, color=colour, ls=":", lw=1.2, label=reference_label)
    _over_epochs(ax, ylabel, ylim)
    legend_above(ax, title)


def plot_budget(
    ax: Axes,
    averaged: Mapping[str, Band],
    annealed: Mapping[str, Band],
    *,
    ylabel: str,
    ylim: tuple[float, float] | None = None,
) -> None:
    """The iterate and averages of one run over the budget, with annealed runs beside them, by name.

    A line is the mean over the seeds, its band goes from the lowest to the highest of them. The last
    value of an annealed run is a dot, and is drawn across as a dotted line.
    """
    for name, band in averaged.items():
        _plot(ax, name, band.x, band.mean, zorder=3)
        ax.fill_between(band.x, band.low, band.high, color=colour_of(name), alpha=0.16, lw=0)
    for name, band in annealed.items():
        _plot(ax, name, band.x, band.mean, zorder=2)
        ax.plot(band.x[-1:], band.mean[-1:], "o", color=colour_of(name), ms=6, zorder=4)
        ax.axhline(float(band.mean[-1]), color=colour_of(name), ls=":", lw=1.1)
    ax.set_xlim(0, None)
    _over_epochs(ax, ylabel, ylim)
    legend_above(ax)


def _plot(ax: Axes, name: str, x: ArrayLike, y: ArrayLike, zorder: float = 2) -> None:
    """A line as its meaning is drawn: averages wide, iterates narrow, annealed runs dashed."""
    dashes, is_average = dashes_of(name), "iterate" not in name
    width = 1.4 if dashes == "--" else 2.2 if is_average else 1.2
    ax.plot(x, y, dashes, color=colour_of(name), lw=width, label=name, zorder=zorder)


def _over_epochs(ax: Axes, ylabel: str, ylim: tuple[float, float] | None) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set(xlabel="epochs completed", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ylim is not None:
        ax.set_ylim(*ylim)


def plot_reliability(
    ax: Axes,
    confidence: ArrayLike,
    accuracy: ArrayLike,
    count: ArrayLike,
    *,
    name: str,
) -> None:
    """Accuracy of the named weights against confidence by bin; the bars show the share of predictions in each bin.

    Bins of fewer than `FEWEST` predictions are left out of the line: their accuracy is noise. On the
    diagonal a prediction made with 80% confidence is right in 80% of cases; below it the network is
    overconfident.
    """
    counts = np.asarray(count, float)
    x, y = np.asarray(confidence, float), np.asarray(accuracy, float)
    ax.bar(
        x, counts / counts.sum(), width=0.04, color=GREY, alpha=0.5, label="share of predictions"
    )
    x, y = x[counts >= FEWEST], y[counts >= FEWEST]
    ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    ax.plot(x, y, "o-", ms=4, color=colour_of(name), label=name)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    legend_above(ax)


def plot_line(
    ax: Axes, positions: ArrayLike, values: ArrayLike, *, ylabel: str, ends: Sequence[str]
) -> None:
    """A value along the line between two networks, whose positions are marked with their names."""
    x, y = np.asarray(positions, float), np.asarray(values, float)
    ax.plot(x, y, color=GREY, lw=1.6)
    for place, name in zip((0.0, 1.0), ends, strict=True):
        height = float(np.interp(place, x, y))
        ax.plot([place], [height], "o", ms=7, color=colour_of(name), label=name)
    ax.set(xlabel=f"position: 0 is {ends[0]}, 1 is {ends[1]}", ylabel=ylabel)
    legend_above(ax)


def plot_rays(
    ax: Axes,
    distances: ArrayLike,
    values: Mapping[str, NDArray[Any]],
    *,
    ylabel: str,
    xlabel: str = "distance along a random direction",
) -> None:
    """Values along random rays, one array (rays, distances) for each centre: rays thin, mean thick."""
    x = np.asarray(distances, float)
    for name, colour in distinct_colours(values).items():
        ax.plot(x, values[name].T, color=colour, lw=0.7, alpha=0.3)
        ax.plot(x, values[name].mean(axis=0), color=colour, lw=2, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    legend_above(ax)


def plot_segments(
    ax: Axes,
    positions: ArrayLike,
    values: NDArray[Any],
    names: Sequence[str],
    *,
    ylabel: str,
    dots: str = "averaged weights",
) -> None:
    """Values along the segments from checkpoint to checkpoint; dots at the checkpoints.

    `values` is (segments, positions); `names` has one more entry than there are segments; `dots` is what the
    checkpoints are.
    """
    inside = np.asarray(positions, float)
    for index, row in enumerate(values):
        ax.plot(index + inside, row, color=GREY, lw=1.6)
        ax.plot([index, index + 1], row[[0, -1]], color=GREY, lw=0.9, ls=":")
    ends = np.append(values[:, 0], values[-1, -1])
    ax.plot(np.arange(len(ends)), ends, "o", ms=4.5, color=colour_of(dots), label=dots)
    every = max(1, len(names) // 6)
    ax.set_xticks(range(0, len(names), every), list(names)[::every])
    ax.set(xlabel="epoch", ylabel=ylabel)
    legend_above(ax)


def plot_plane(  # noqa: PLR0913 - keyword-only arguments do not count
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    values: NDArray[Any],
    points: Mapping[str, NDArray[Any]],
    *,
    title: str,
    minimize: bool = True,
) -> None:
    """Contours of a value on a plane, `values` (y, x), with named points (n, 2) on it.

    Levels are evenly spaced in the logarithm of the height above the lowest value, as in the paper,
    so that the bottom of a basin is visible beside its walls; below the highest value where more is
    better. What is not finite stays blank.
    """
    known = np.ma.masked_invalid(values)
    if known.count():
        _contours(ax, x, y, known, minimize=minimize)
    colours = distinct_colours(points)
    for (name, at), mark in zip(points.items(), itertools.cycle("os*D^"), strict=False):
        line = "-" if len(at) > 2 else ""
        ax.plot(
            at[:, 0], at[:, 1], line + mark, color="white", mfc=colours[name], mec="white",
            ms=11 if mark == "*" else 6, lw=0.8, mew=0.8, label=name,
        )  # fmt: skip
    ax.set(aspect="equal", xlabel="distance", ylabel="distance")
    legend_above(ax, title)


def _contours(ax: Axes, x: ArrayLike, y: ArrayLike, known: Any, *, minimize: bool) -> None:
    low, high = float(known.min()), float(known.max())
    span = max(high - low, 1e-9 * max(1.0, abs(low)))
    steps = span * np.concatenate([[0], np.geomspace(0.01, 1, 12)])
    levels = low + steps if minimize else (low + span - steps)[::-1]
    colours = "viridis" if minimize else "viridis_r"
    shape = ax.contourf(x, y, known, levels=levels, cmap=colours, norm=_even(levels))
    ax.figure.colorbar(shape, ax=ax, format="%.3g", fraction=0.046, pad=0.04)


def _even(levels: NDArray[Any]) -> BoundaryNorm:
    """The same number of colours between two low levels as between two high ones."""
    from matplotlib.colors import BoundaryNorm

    return BoundaryNorm(levels, 256)


def _ink() -> str:
    from matplotlib import rcParams

    return str(rcParams["text.color"])


def plot_results(
    ax: Axes,
    labels: Sequence[str],
    values: Mapping[str, Sequence[Estimate | None]],
    *,
    xlabel: str,
) -> None:
    """Means with standard errors, a row for each label and a marker for each run."""
    ink = _ink()
    marks = "osD^v"  # colours have a meaning, and runs are not among them
    for index, (name, row) in enumerate(values.items()):
        known = [(i, value) for i, value in enumerate(row) if value is not None]
        offset = 0.5 * ((index + 0.5) / len(values) - 0.5)
        ax.errorbar(
            [value.mean for _, value in known],
            [i + offset for i, _ in known],
            xerr=[value.error or 0.0 for _, value in known],
            fmt=marks[index % len(marks)], ms=5, color=GREY if index % 2 else ink, label=name,
        )  # fmt: skip
    ax.set_yticks(range(len(labels)), list(labels))
    ax.set(xlabel=xlabel)
    ax.invert_yaxis()
    legend_above(ax)
