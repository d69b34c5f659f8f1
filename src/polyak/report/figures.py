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

from polyak.report.drawing import BLUE, BROWN, GREEN, GREY, OLIVE, ORANGE, PINK, PURPLE, RED, TEAL
from polyak.study.paired import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm

COLOURS = {"iterate": BLUE, "swa": ORANGE, "ema": GREEN, "power": TEAL, "wsm": RED}
ARM_COLOURS = {
    "sgd": PURPLE, "cosine": PURPLE, "half": PINK, "quarter": OLIVE,
    "swa": BLUE, "constant": BLUE, "cyclic": BROWN,
}  # fmt: skip
"""Of an arm's last weights: the annealed runs, and the iterates that averages are made of."""
FAMILY_COLOURS = {
    "windows": COLOURS["swa"], "half-lives": COLOURS["ema"], "power": COLOURS["power"],
    "annealed": COLOURS["wsm"],
}  # fmt: skip
"""Of averages made afterwards: an equal mean is an SWA, a half-life an EMA's."""
LABELS = {
    "iterate": "iterate", "swa": "SWA", "ema": "EMA", "power": "power EMA", "wsm": "WSM",
    "sgd": "SGD", "half": "half", "quarter": "quarter", "cyclic": "cyclic", "cosine": "cosine",
    "constant": "constant",
}  # fmt: skip


def colour_of(arm: str, weights: str) -> str:
    """One colour for one meaning, in all pictures: an average has its own, an iterate its arm's."""
    return ARM_COLOURS[arm] if weights == "iterate" else COLOURS[weights]


FEWEST = 10
"""The smallest number of predictions for which the accuracy of a bin is drawn."""


@dataclass(frozen=True)
class Curve:
    """One line of a picture."""

    x: ArrayLike
    y: ArrayLike
    colour: str = BLUE
    style: str = "-"


@dataclass(frozen=True)
class Band:
    """A mean over seeds, and the lowest and the highest of them."""

    label: str
    x: NDArray[Any]
    mean: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]


def plot_rates(
    ax: Axes,
    rates: Mapping[str, tuple[ArrayLike, ArrayLike]],
    averaged: Mapping[str, tuple[ArrayLike, ArrayLike]],
) -> None:
    """The rate of each arm, (x, rate), with its averaged weights marked.

    x is completed epochs; the rate of a step is drawn over that step, and a marker shows the rate
    just used.
    """
    for name, (x, rate) in rates.items():
        ax.plot(x, rate, color=ARM_COLOURS.get(name, GREY), label=LABELS.get(name, name), lw=1.4)
    label = "averaged weights"
    for x, rate in averaged.values():
        ax.plot(x, rate, "o", ms=4.5, color=ORANGE, mec="white", mew=0.6, label=label)
        label = "_nolegend_"
    ax.set(xlabel="epochs completed", ylabel="learning rate", ylim=(0, None))
    ax.legend()


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
    from matplotlib.ticker import MaxNLocator

    for label, curve in curves.items():
        ax.plot(curve.x, curve.y, curve.style, color=curve.colour, label=label, lw=1.5)
    if reference is not None:
        ax.axhline(reference, color=PURPLE, ls=":", lw=1.2, label=reference_label)
    ax.set(xlabel="epochs completed", ylabel=ylabel, title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ylim is not None:
        ax.set_ylim(*ylim)
    ax.legend()


def plot_budget(
    ax: Axes,
    averaged: Mapping[str, Band],
    annealed: Mapping[str, Band],
    *,
    ylabel: str,
    ylim: tuple[float, float] | None = None,
) -> None:
    """The iterate and averages of one run over the budget, with annealed runs beside them.

    A line is the mean over the seeds, its band goes from the lowest to the highest of them. The last
    value of an annealed run is a dot, and is drawn across as a dotted line.
    """
    from matplotlib.ticker import MaxNLocator

    for name, band in averaged.items():
        width = 1.2 if name == "iterate" else 2.2
        ax.plot(band.x, band.mean, color=COLOURS[name], lw=width, label=band.label, zorder=3)
        ax.fill_between(band.x, band.low, band.high, color=COLOURS[name], alpha=0.16, lw=0)
    for arm, band in annealed.items():
        colour = ARM_COLOURS[arm]
        ax.plot(band.x, band.mean, "--", color=colour, lw=1.4, label=band.label, zorder=2)
        ax.plot(band.x[-1:], band.mean[-1:], "o", color=colour, ms=6, zorder=4)
        ax.axhline(float(band.mean[-1]), color=colour, ls=":", lw=1.1)
    ax.set(xlabel="epochs completed", ylabel=ylabel, xlim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ylim is not None:
        ax.set_ylim(*ylim)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def plot_reliability(
    ax: Axes,
    confidence: ArrayLike,
    accuracy: ArrayLike,
    count: ArrayLike,
    *,
    title: str,
    colour: str = BLUE,
) -> None:
    """Accuracy against confidence by bin; the bars show the share of predictions in each bin.

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
    ax.plot(x, y, "o-", ms=4, color=colour, label="accuracy")
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02), title=title)
    ax.legend(loc="upper left")


def plot_line(
    ax: Axes, positions: ArrayLike, values: ArrayLike, *, ylabel: str, ends: Sequence[str]
) -> None:
    """A value along the line between two networks, whose positions are marked with their names."""
    x, y = np.asarray(positions, float), np.asarray(values, float)
    ax.plot(x, y, color=GREY, lw=1.6)
    for place, name, colour in zip((0.0, 1.0), ends, (PURPLE, ORANGE), strict=True):
        height = float(np.interp(place, x, y))
        ax.plot([place], [height], "o", ms=7, color=colour, label=name)
    ax.set(xlabel=f"position: 0 is {ends[0]}, 1 is {ends[1]}", ylabel=ylabel)
    ax.legend()


def plot_rays(
    ax: Axes, distances: ArrayLike, values: Mapping[str, NDArray[Any]], *, ylabel: str
) -> None:
    """Values along random rays, one array (rays, distances) for each centre: rays thin, mean thick."""
    x = np.asarray(distances, float)
    for (name, rows), colour in zip(values.items(), (PURPLE, BLUE, ORANGE), strict=False):
        ax.plot(x, rows.T, color=colour, lw=0.7, alpha=0.3)
        ax.plot(x, rows.mean(axis=0), color=colour, lw=2, label=name)
    ax.set(xlabel="distance along a random direction", ylabel=ylabel)
    ax.legend()


def plot_segments(
    ax: Axes, positions: ArrayLike, values: NDArray[Any], names: Sequence[str], *, ylabel: str
) -> None:
    """Values along the segments from checkpoint to checkpoint; dots at the checkpoints.

    `values` is (segments, positions); `names` has one more entry than there are segments.
    """
    inside = np.asarray(positions, float)
    for index, row in enumerate(values):
        ax.plot(index + inside, row, color=GREY, lw=1.6)
        ax.plot([index, index + 1], row[[0, -1]], color=GREY, lw=0.9, ls=":")
    ends = np.append(values[:, 0], values[-1, -1])
    ax.plot(np.arange(len(ends)), ends, "o", ms=4.5, color=BLUE)
    every = max(1, len(names) // 6)
    ax.set_xticks(range(0, len(names), every), list(names)[::every])
    ax.set(xlabel="averaged weights, by epoch", ylabel=ylabel)


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
    for (name, at), mark in zip(points.items(), itertools.cycle("os*D^"), strict=False):
        line = "-" if len(at) > 2 else ""
        ax.plot(
            at[:, 0], at[:, 1], line + mark, color="white", mfc=_mark_colour(name), mec="white",
            ms=11 if mark == "*" else 6, lw=0.8, mew=0.8, label=name,
        )  # fmt: skip
    ax.set(title=title, aspect="equal", xlabel="distance", ylabel="distance")
    if points:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


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


def _mark_colour(name: str) -> str:
    return ORANGE if "SWA" in name else BLUE


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
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
