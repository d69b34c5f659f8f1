"""The sections of a run's page: a title, pictures, and the sentence under them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from polyak.reference_run.arm import arm_schedule, steps_per_epoch
from polyak.reference_run.flatness import ERROR, LOSS, Landscape
from polyak.reference_run.recipe import AVERAGING_ARMS
from polyak.reference_run.run import Run
from polyak.report import sentences
from polyak.report.drawing import Drawing, Picture, draw
from polyak.report.figures import (
    LABELS,
    Curve,
    colour_of,
    plot_history,
    plot_line,
    plot_plane,
    plot_rates,
    plot_rays,
    plot_reliability,
    plot_segments,
)
from polyak.report.tables import BASELINE, IMAGES, WORDS, ArmWeights, Finals, row_label

VALUES = {LOSS: "training loss (nats)", ERROR: "test error (%)"}
_SHOWN = {
    "images": (("error", "error", "%", 1), ("nll", "NLL", " nats", 3)),
    "words": (("nll", "loss", " nats per byte", 3),),
}
"""By task, the validation values over time: key, name, unit, digits."""


@dataclass(frozen=True)
class Section:
    """The content under one heading."""

    title: str
    sentence: str
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class RenderedSection:
    """A section with its pictures drawn."""

    title: str
    sentence: str
    drawings: list[Drawing]


def render(parts: Iterable[Section]) -> list[RenderedSection]:
    """Draw the pictures of some sections, with ids that are unique on a page."""
    number = itertools.count()
    return [
        RenderedSection(
            part.title, part.sentence, [draw(p, f"p{next(number)}-") for p in part.pictures]
        )
        for part in parts
    ]


def schedule_section(run: Run) -> Section:
    """The rate of every arm, with the weights that are averaged."""
    steps = steps_per_epoch(run.recipe, len(run.data.train))
    rates, averaged, ends, counts = {}, {}, {}, {}
    for arm in run.recipe.arms:
        schedule = arm_schedule(run.recipe, arm, steps)
        total = run.recipe.last_epoch(arm) * steps
        at = np.arange(run.recipe.first_epoch(arm) * steps, total)
        rate = np.array([schedule(int(step)) for step in at])
        rates[arm] = (at + 1) / steps, rate
        ends[arm] = float(rate.max()), float(rate.min())
        if arm == "cyclic":  # its first step is already below the high rate
            ends[arm] = run.recipe.cycle_high, run.recipe.cycle_low
        points = [p for p in schedule.averaging_points() if p <= total]
        if arm in AVERAGING_ARMS:
            counts[arm] = len(points)
            marked = points if len(points) <= run.recipe.epochs + 1 else []
            averaged[arm] = np.array(marked) / steps, np.array([schedule(p - 1) for p in marked])
    picture = Picture(
        "schedule",
        "Learning rate of each arm over the epochs, with the averaged weights marked",
        partial(plot_rates, rates=rates, averaged=averaged),
    )
    return Section("The schedule", sentences.describe_schedule(ends, counts), [picture])


def history_section(run: Run) -> Section:
    """Validation error and loss over time, a picture for each arm."""
    pictures, told = [], []
    terms = WORDS if run.recipe.task == "words" else IMAGES
    for key, what, unit, digits in _SHOWN[run.recipe.task]:
        curves = {arm: found for arm in run.recipe.arms if (found := _history(run, arm, key))}
        last = {
            (arm, weights): float(y[-1])
            for arm, series in curves.items()
            for weights, (_, y) in series.items()
        }
        told.append(sentences.describe_history(last, unit, digits, what))
        limits = _common_limits(curves)
        for arm, series in curves.items():
            lines = {
                LABELS[weights]: Curve(
                    x, y, colour_of(arm, weights), ":" if weights == "iterate" else "-"
                )
                for weights, (x, y) in series.items()
            }
            draw = partial(
                plot_history,
                curves=lines,
                ylabel=f"validation {what}{' (%)' if unit == '%' else f' ({unit.strip()})'}",
                reference=None if arm == terms.baseline[0] else last[terms.baseline],
                reference_label=f"{terms.baseline_name} at the end",
                ylim=limits,
                title=f"{LABELS[arm]} arm",
            )
            alt = (
                f"Validation {what} of the {LABELS[arm]} arm over the epochs, iterate and averages"
            )
            pictures.append(Picture(f"{key}-{arm}", alt, draw))
    title = "Error and loss over time" if run.recipe.task == "images" else "Loss over time"
    return Section(title, " ".join(told), pictures)


def reliability_section(finals: Finals, arm: str | None) -> Section:
    """Reliability diagrams of SGD, and of the averaging arm's last iterate and average."""
    wanted: list[ArmWeights] = [BASELINE]
    if arm is not None:
        wanted += [(arm, "iterate"), (arm, "swa")]
    bins = {row_label(row): finals.reliability(row) for row in wanted}
    ece = {row_label(row): finals.mean(row, "ece").mean for row in wanted}
    pictures = [
        Picture(
            f"reliability-{'-'.join(row)}",
            f"Reliability diagram of {row_label(row)}: accuracy against confidence",
            partial(
                plot_reliability,
                confidence=bins[row_label(row)]["confidence"],
                accuracy=bins[row_label(row)]["accuracy"],
                count=bins[row_label(row)]["count"],
                title=row_label(row),
                colour=colour_of(*row),
            ),
        )
        for row in wanted
    ]
    return Section(
        "Is it as right as it is sure?", sentences.describe_reliability(bins, ece), pictures
    )


def _history(run: Run, arm: str, key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By kind of weights: epochs, and the mean over the seeds that have them."""
    sums: dict[str, dict[int, list[float]]] = {}
    for record in run.records():
        if record["kind"] == "epoch" and record["arm"] == arm:
            for weights, values in record["evaluations"].items():
                sums.setdefault(weights, {}).setdefault(record["epoch"], []).append(values[key])
    return {
        weights: (np.array(list(by)), np.array([np.mean(v) for v in by.values()]))
        for weights, by in sums.items()
    }


def _common_limits(
    curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]],
) -> tuple[float, float]:
    """One scale for all arms, without the first epochs, which would compress the rest."""
    late = np.concatenate(
        [y[len(y) // 8 :] for series in curves.values() for _, y in series.values()]
    )
    margin = 0.05 * float(late.max() - late.min())
    return float(late.min()) - margin, float(late.max()) + margin


def landscape_sections(land: Landscape) -> list[Section]:
    """The surface around the solutions: line, rays, segments and plane."""
    sections = [_line(land), _rays(land)]
    if land.segments is not None:
        names = [str(epoch) for epoch in land.epochs]
        pictures = [
            Picture(
                f"segments-{key}",
                f"{label} along the segments between consecutive averaged weights",
                partial(
                    plot_segments,
                    positions=land.segments.positions,
                    values=land.segments.values[key],
                    names=names,
                    ylabel=label,
                ),
            )
            for key, label in VALUES.items()
        ]
        sentence = sentences.describe_segments(land.segments, land.epochs)
        sections.append(Section("From checkpoint to checkpoint", sentence, pictures))
        if land.grid is not None:
            sections.append(_plane(land, sentences.describe_plane(land, land.segments)))
    return sections


def _line(land: Landscape) -> Section:
    pictures = [
        Picture(
            f"line-{key}",
            f"{label} along the line from SGD's weights to the average",
            partial(
                plot_line,
                positions=land.line.positions,
                values=land.line.values[key],
                ylabel=label,
                ends=("SGD", "SWA"),
            ),
        )
        for key, label in VALUES.items()
    ]
    return Section("From SGD's solution to SWA's", sentences.describe_line(land), pictures)


def _rays(land: Landscape) -> Section:
    distances = land.rays["SGD"].distances
    pictures = [
        Picture(
            f"rays-{key}",
            f"{label} along random rays from SGD, the last iterate and SWA",
            partial(
                plot_rays,
                distances=distances,
                values={name: rays.values[key] for name, rays in land.rays.items()},
                ylabel=label,
            ),
        )
        for key, label in VALUES.items()
    ]
    return Section("Along random rays", sentences.describe_rays(land.rays), pictures)


def _plane(land: Landscape, sentence: str) -> Section:
    grid = land.grid
    points = {"averaged weights": land.path, "SWA": np.array([land.average[:2]])}
    pictures = [
        Picture(
            f"plane-{key}",
            f"{label} on the plane through the first, middle and last averaged weights",
            partial(
                plot_plane,
                x=grid.x,
                y=grid.y,
                values=grid.values[key],
                points=points,
                title=label,
            ),
            (4.2, 4.2),
        )
        for key, label in VALUES.items()
        if grid is not None
    ]
    title = "The plane through the first, the middle and the last"
    return Section(title, sentence, pictures)
