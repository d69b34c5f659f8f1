"""The sections of a run's page: a title, pictures, and the sentence under them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from polyak.reference_run.arm import arm_schedule, steps_per_epoch
from polyak.reference_run.flatness import ERROR, LOSS, Landscape
from polyak.reference_run.recipe import AVERAGING_ARMS, Recipe
from polyak.reference_run.run import Run
from polyak.report import sentences
from polyak.report.budget import BySeed, mean_curve
from polyak.report.drawing import Drawing, Picture, draw
from polyak.report.figures import (
    Curve,
    plot_history,
    plot_line,
    plot_plane,
    plot_rates,
    plot_rays,
    plot_reliability,
    plot_segments,
)
from polyak.report.tables import (
    BASELINE,
    IMAGES,
    WORDS,
    ArmWeights,
    Finals,
    Terms,
    arm_name,
    curve_name,
    row_label,
)

VALUES = {LOSS: "training loss (nats)", ERROR: "test error (%)"}
_SHOWN = {
    "images": {"error": "error", "nll": "NLL"},
    "words": {"nll": "loss"},
}
"""By task, the validation values over time: their key and their name."""


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


def _terms(run: Run) -> Terms:
    return WORDS if run.recipe.task == "words" else IMAGES


def schedule_section(run: Run) -> Section:
    """The rate of every arm, with the weights that are averaged."""
    steps = steps_per_epoch(run.recipe, len(run.data.train))
    rates, averaged, ends, counts = {}, {}, {}, {}
    for arm in run.recipe.arms:
        schedule = arm_schedule(run.recipe, arm, steps)
        total = run.recipe.last_epoch(arm) * steps
        at = np.arange(run.recipe.first_epoch(arm) * steps, total)
        name = curve_name((arm, "iterate"), _terms(run))
        if arm in AVERAGING_ARMS:
            name = f"iterate, {arm_name(arm)}"
        rates[name] = (at + 1) / steps, np.array([schedule(int(step)) for step in at])
        ends[arm] = _rates(run.recipe, arm, float(rates[name][1].max()))
        points = [p for p in schedule.averaging_points() if p <= total]
        if arm in AVERAGING_ARMS:
            counts[arm] = len(points)
            if points and len(points) <= run.recipe.epochs + 1:
                averaged[_averaged(arm)] = (
                    np.array(points) / steps,
                    np.array([schedule(p - 1) for p in points]),
                )
    picture = Picture(
        "schedule",
        "Learning rate of each arm over the epochs, with the averaged weights marked",
        partial(plot_rates, rates=rates, averaged=averaged),
    )
    return Section("The schedule", sentences.describe_schedule(ends, counts), [picture])


def _averaged(arm: str) -> str:
    """What a legend calls the weights of an arm that its SWA is made of."""
    return f"averaged weights{', cyclic arm' if arm == 'cyclic' else ''}"


def _rates(recipe: Recipe, arm: str, highest: float) -> sentences.Rates:
    """What the rate of an arm does after its warm-up, if it begins with one; a decay may begin within it."""
    warmup = recipe.warmup_epochs if recipe.first_epoch(arm) < recipe.warmup_epochs else 0
    if arm == "cyclic":
        return sentences.Rates(recipe.cycle_high, recipe.cycle_low, warmup)
    if arm in AVERAGING_ARMS:
        return sentences.Rates(recipe.swa_rate, recipe.swa_rate, warmup)
    return sentences.Rates(highest, recipe.rate * recipe.final_ratio, warmup)


def history_section(run: Run) -> Section:
    """Validation error and loss over time, a picture for each arm."""
    pictures, told = [], []
    terms = _terms(run)
    for key, what in _SHOWN[run.recipe.task].items():
        metric = next(metric for metric in terms.metrics if metric.key == key)
        values = {arm: found for arm in run.recipe.arms if (found := _values(run, arm, key))}
        last = {
            (arm, weights): {seed: by_epoch[max(by_epoch)] for seed, by_epoch in by_seed.items()}
            for arm, kinds in values.items()
            for weights, by_seed in kinds.items()
            if _is_finished(run, arm, by_seed)
        }
        told.append(sentences.describe_history(last, metric, what))
        curves = {
            arm: {weights: mean_curve(by_seed)[:2] for weights, by_seed in kinds.items()}
            for arm, kinds in values.items()
        }
        baseline, kind = terms.baseline
        end = float(curves[baseline][kind][1][-1])
        unit = "%" if metric.unit == "points" else metric.unit
        for arm, series in curves.items():
            draw = partial(
                plot_history,
                curves={
                    curve_name((arm, weights), terms): Curve(x, y)
                    for weights, (x, y) in series.items()
                },
                ylabel=f"validation {what} ({unit})",
                reference=None if arm == baseline else end,
                reference_label=f"{terms.baseline_name} at the end",
                ylim=_common_limits(curves),
                title=arm_name(arm, terms),
            )
            alt = f"Validation {what} over the epochs, iterate and averages: {arm_name(arm, terms)}"
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
                name=row_label(row),
            ),
        )
        for row in wanted
    ]
    return Section(
        "Is it as right as it is sure?", sentences.describe_reliability(bins, ece), pictures
    )


def _values(run: Run, arm: str, key: str) -> dict[str, BySeed]:
    """By kind of weights and seed: a value by epoch."""
    found: dict[str, BySeed] = {}
    for record in run.records():
        if record["kind"] == "epoch" and record["arm"] == arm:
            for weights, values in record["evaluations"].items():
                by_epoch = found.setdefault(weights, {}).setdefault(record["seed"], {})
                by_epoch[record["epoch"]] = values[key]
    return {weights: _finished(run, arm, by_seed) for weights, by_seed in found.items()}


def _finished(run: Run, arm: str, by_seed: BySeed) -> BySeed:
    """The seeds that have finished the arm, or all where none has: a curve of its beginning."""
    end = run.recipe.last_epoch(arm)
    return {seed: by for seed, by in by_seed.items() if max(by) == end} or by_seed


def _is_finished(run: Run, arm: str, by_seed: BySeed) -> bool:
    return all(max(by) == run.recipe.last_epoch(arm) for by in by_seed.values())


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
                    dots=_averaged(land.arm),
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
                values={_centre(land, name): rays.values[key] for name, rays in land.rays.items()},
                ylabel=label,
            ),
        )
        for key, label in VALUES.items()
    ]
    return Section("Along random rays", sentences.describe_rays(land.rays), pictures)


def _centre(land: Landscape, name: str) -> str:
    is_cyclic = land.arm == "cyclic" and "iterate" in name
    return f"{name}, cyclic arm" if is_cyclic else name


def _plane(land: Landscape, sentence: str) -> Section:
    grid = land.grid
    points = {_averaged(land.arm): land.path, "SWA": np.array([land.average[:2]])}
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
