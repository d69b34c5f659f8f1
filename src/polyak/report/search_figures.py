"""Pictures of what a search found; each takes an `ax` and plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from polyak.report.drawing import GREY, INK
from polyak.report.figures import legend_above
from polyak.report.meanings import colour_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = (("*", 15), ("s", 9), ("D", 8), ("^", 9))
_FAMILIES = {"windows": "o-", "half-lives": "s--", "power": "D-.", "annealed": "^:"}
"""Candidates have no colour: those are of what they are compared with."""


def plot_windows(  # noqa: PLR0913 - keyword-only arguments do not count
    ax: Axes,
    starts: Sequence[float],
    ends: Sequence[float],
    scores: Sequence[float],
    marks: Mapping[str, tuple[float, float]],
    *,
    unit: str,
    title: str,
    minimize: bool = True,
) -> None:
    """A map of scores: each window a point at (begins, ends), coloured by its score; some are marked.

    Colours tell the best ones apart, which are close to each other beside the worst.
    """
    from matplotlib.colors import PowerNorm

    low, high = min(scores), max(scores)
    norm = PowerNorm(0.35 if minimize else 1 / 0.35, low, max(high, low + 1e-12))
    points = ax.scatter(
        starts, ends, c=scores, norm=norm, cmap="viridis" if minimize else "viridis_r", s=46,
        edgecolors=GREY, linewidths=0.6,
    )  # fmt: skip
    for (name, (start, end)), (shape, size) in zip(marks.items(), _MARKS, strict=False):
        ax.plot(
            [start], [end], shape, ms=size, mfc="none", color=_colour_of(name), mew=1.8, label=name, ls="",
        )  # fmt: skip
    top = max(ends)
    ax.plot([min(starts), top], [min(starts), top], color=GREY, lw=0.8, ls=":")
    ax.figure.colorbar(points, ax=ax, format="%.4g", fraction=0.046, pad=0.04)
    ax.set(xlabel=f"begins ({unit})", ylabel=f"ends ({unit})")
    legend_above(ax, title)


def plot_lengths(
    ax: Axes,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    references: Mapping[str, float],
    *,
    unit: str,
    ylabel: str,
) -> None:
    """Scores of averages that end at the end, by mean age: a curve for each family, references across."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for family, (ages, scores) in curves.items():
        look = _FAMILIES.get(family, "o-")
        ax.plot(ages, scores, look, ms=4, lw=1.3, color=INK, label=family)
    styles = (":", "--", "-.")
    for (name, score), style in zip(references.items(), styles, strict=False):
        ax.axhline(score, color=_colour_of(name), ls=style, lw=1.2, label=name)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=f"mean age ({unit})", ylabel=ylabel)
    legend_above(ax)


def plot_along(
    ax: Axes,
    ends: Sequence[float],
    scores: Sequence[float],
    intervals: Sequence[tuple[float, float]] | None,
    best: float,
    *,
    ylabel: str,
) -> None:
    """Scores by where averages end, in percent of the run; bars: interval of the difference to the last."""
    ax.plot(ends, scores, "o-", ms=4.5, color=INK, label="best average that ends there")
    ax.axhline(scores[-1], color=GREY, ls=":", lw=1.2, label="at the end")
    if intervals is not None:
        low, high = np.array(intervals).T
        ax.vlines(ends, low, high, color=INK, lw=1.2, alpha=0.7, label="95% of the difference")
    ax.axvline(best, color=GREY, lw=1.4, ls="--", label="the answer")
    ax.set(xlabel="of the run (%)", ylabel=ylabel)
    legend_above(ax)


def _colour_of(name: str) -> str:
    return INK if name == "best" else colour_of(name)
