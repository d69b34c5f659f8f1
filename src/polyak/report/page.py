"""The page of a run and of a comparison: self-contained HTML, drawn from what runs have stored.

`write_report` makes the page of one run, with every picture as a PNG too; `write_comparison` puts
runs side by side: the differences of their recipes, their results, and their pictures.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from polyak.errors import ArgumentError
from polyak.files import file_target, replacing, writing_errors
from polyak.maths.numbers import count
from polyak.reference_run.flatness import Landscape, stored_landscape
from polyak.reference_run.run import Run
from polyak.report import sentences
from polyak.report.drawing import Drawing, Picture, write_png
from polyak.report.figures import plot_results
from polyak.report.opening import opening_of
from polyak.report.sections import (
    RenderedSection,
    Section,
    history_section,
    landscape_sections,
    reliability_section,
    render,
    schedule_section,
)
from polyak.report.sentences import difference
from polyak.report.tables import ArmWeights, Finals, Metric, format_estimate
from polyak.study.paired import t_quantile
from polyak.version import __version__


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `mark` is better, worse, best or nothing."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table."""

    label: str
    cells: list[Cell]


@dataclass(frozen=True)
class Head:
    """The head of a column; its unit stands in a line of its own."""

    text: str
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """A table as the page shows it."""

    caption: str
    columns: list[Head]
    rows: list[Line]


def write_report(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write `report.html` and `figures/*.png` into a run folder and return the page's path.

    With `path` the page is written there, in place of a file if `overwrite`.

    The page needs no network and no script, and has a sentence under each picture. Everything on it
    is drawn from what the run has stored: the surface around its solutions appears once
    `polyak.reference_run.measure_landscape` has measured it. The questions to its record are asked when the
    page is first written; their scores are kept in the record. The run's own page is replaced.

    Raises:
        ArgumentError: the folder is not a run, or none of its arms has finished.
        FormatError: a file of the run is damaged.
        OutputError: the folder cannot be written, or `path` exists and `overwrite` is False.
        MissingExtra: matplotlib is not installed.

    """
    target = None if path is None else file_target(path, overwrite=overwrite)
    run = Run(folder)
    finals = Finals(run.finals())
    if not finals.rows:
        raise ArgumentError(
            f"{run.folder} has no final results yet. Finish the run: "
            f"polyak train --resume --output {shlex.quote(str(run.folder))}"
        )
    land = stored_landscape(run)
    opening = opening_of(run, finals)
    parts = render(_sections(run, finals, land))
    first = [opening.wide] if opening.wide else []
    _write_pngs([*first, *(d for part in parts for d in part.drawings)], run.folder / "figures")
    context = _context(run, finals, land, parts) | {"opening": opening}
    html = environment().get_template("report.html.j2").render(context)
    return write_page(html, target or run.folder / "report.html")


def environment() -> Environment:
    """The templates; all values in them are escaped."""
    return Environment(
        loader=PackageLoader("polyak.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def write_page(html: str, path: Path) -> Path:
    """Write a page in place of an older one."""
    with replacing(path, overwrite=True) as part:
        part.write_text(html, encoding="utf-8")
    return path


def value_table(finals: Finals) -> Table:
    """Means and standard errors; the lowest of each column in bold."""
    best = {
        metric.key: min(finals.mean(row, metric.key).mean for row in finals.rows)
        for metric in finals.metrics
    }
    rows = [
        Line(finals.label(row), [_value(finals, row, m, best) for m in finals.metrics])
        for row in finals.rows
    ]
    where = finals.terms.tested_on.removeprefix("the ").capitalize()
    caption = f"{where}; mean ± standard error over {count(finals.n_seeds, 'seed')}."
    return Table(caption, [Head("weights"), *(_head(m) for m in finals.metrics)], rows)


def difference_table(finals: Finals) -> Table:
    """Paired differences to the annealed arm's last iterate, with 95% intervals."""
    rows = [
        Line(finals.label(row), [_difference(finals, row, metric) for metric in finals.metrics])
        for row in finals.rows
        if row != finals.baseline
    ]
    caption = (
        f"Difference to {finals.terms.baseline_name}, paired seed by seed; mean ± half the 95% interval "
        "(Student's t)."
    )
    return Table(caption, [Head("weights"), *(_head(m, m.unit) for m in finals.metrics)], rows)


def _head(metric: Metric, unit: str = "") -> Head:
    return Head(metric.title, unit or _unit(metric))


def _unit(metric: Metric) -> str:
    return "%" if metric.unit == "points" else metric.unit


def _value(finals: Finals, row: ArmWeights, metric: Metric, best: dict[str, float]) -> Cell:
    value = finals.mean(row, metric.key)
    return Cell(
        format_estimate(value, metric.digits), "best" if value.mean == best[metric.key] else ""
    )


def _difference(finals: Finals, row: ArmWeights, metric: Metric) -> Cell:
    value = finals.difference(row, metric.key)
    if value is None:
        return Cell("")
    mark = {-1: "better", 0: "", 1: "worse"}[sentences.found(value, metric.digits)]
    return Cell(format_estimate(value, metric.digits, signed=True), mark)


def _sections(run: Run, finals: Finals, land: Landscape | None) -> list[Section]:
    parts = [schedule_section(run), history_section(run)]
    if run.recipe.task == "images":
        parts.append(reliability_section(finals, run.averaging_arm()))
    from polyak.report.questions import question_sections  # which uses the tables of this page

    parts += question_sections(run)
    return parts if land is None else [*parts, *landscape_sections(land)]


def _context(
    run: Run, finals: Finals, land: Landscape | None, parts: list[RenderedSection]
) -> dict[str, Any]:
    import torch

    recipe, arm = run.recipe, run.averaging_arm()
    return {
        "name": recipe.name,
        "values": value_table(finals),
        "differences": difference_table(finals),
        "differences_note": _describe_differences(finals),
        "table_note": sentences.describe_table(finals),
        "sections": parts,
        "landscape_note": ""
        if arm is None or recipe.task != "images"
        else _landscape_note(run, land),
        "recipe": recipe.to_toml(),
        "command": f"polyak report {shlex.quote(str(run.folder))}",
        "versions": f"polyak {__version__}, torch {torch.__version__}",
    }


def _describe_differences(finals: Finals) -> str:
    comparisons = (len(finals.rows) - 1) * len(finals.metrics)
    text = "Lower is better everywhere."
    if finals.n_seeds == 1:
        return f"{text} One seed shows no spread: a difference may be due to the seed."
    factor = t_quantile(0.975, finals.n_seeds - 1)
    return (
        f"{text} A difference is coloured if its 95% interval, as shown, does not reach 0; of {comparisons} "
        f"comparisons about {max(1, round(comparisons / 20))} would be coloured by chance. With "
        f"{finals.n_seeds} seeds an interval extends {factor:.1f} standard errors to each side, so a "
        "difference without colour is not shown to be zero either. One without ± is the same in all seeds: it "
        "shows no spread, and has no colour."
    )


def _landscape_note(run: Run, land: Landscape | None) -> str:
    if land is None:
        return (
            "The surface around the solutions has not been measured yet: "
            f"polyak report {shlex.quote(str(run.folder))} measures it."
        )
    return (
        "The surface was measured around the first seed's solutions, on the first "
        f"{land.detail.n_images:,} training images (without augmentation) and test images, with "
        "BatchNorm statistics measured again at every point if the network has them. "
        "Rays are random directions of unit length over all parameters, the same for each centre."
    )


def _write_pngs(drawings: Iterable[Drawing], folder: Path) -> None:
    with writing_errors(folder):
        folder.mkdir(exist_ok=True)
    for drawing in drawings:
        write_png(drawing, folder)


def write_comparison(
    folders: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Write one self-contained page that puts finished runs side by side; return its path.

    Raises:
        ArgumentError: fewer than two runs, the same run twice, or one without final results.
        OutputError: the page exists and `overwrite` is False, or cannot be written.
        MissingExtra: matplotlib is not installed.

    """
    target = file_target(path, overwrite=overwrite)
    runs = named_runs(folders)
    finals = {name: Finals(run.finals()) for name, run in runs.items()}
    results, *parts = render(
        [
            Section("What each is worth", describe_results(finals), result_pictures(finals)),
            *(
                part
                for run in runs.values()
                for part in (schedule_section(run), history_section(run))
            ),
        ]
    )
    context = {
        "names": list(runs),
        "recipes": recipe_table(runs),
        "results": results,
        "tables": [result_table(finals, metric) for metric in metrics_of(finals)],
        "runs": {name: [parts.pop(0), parts.pop(0)] for name in runs},
    }
    html = environment().get_template("compare.html.j2").render(context)
    return write_page(html, target)


def named_runs(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Run]:
    """The runs by the names of their folders, or by whole paths if two names are the same."""
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ArgumentError(
            f"Found {', '.join(map(str, paths)) or 'no runs'}; a comparison needs two or more different runs."
        )
    short = [path.resolve().name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    runs = {name: Run(path) for name, path in zip(names, paths, strict=True)}
    tasks = {name: run.recipe.task for name, run in runs.items()}
    if len(set(tasks.values())) > 1:
        found = ", ".join(f"{name}: {task}" for name, task in tasks.items())
        raise ArgumentError(f"The runs have different tasks ({found}). Compare runs of one task.")
    for run in runs.values():
        if not run.finals():
            raise ArgumentError(
                f"{run.folder} has no final results yet. Finish the run: "
                f"polyak train --resume --output {shlex.quote(str(run.folder))}"
            )
    return runs


def recipe_table(runs: dict[str, Run]) -> Table:
    """The fields in which the recipes differ."""
    recipes = {name: dataclasses.asdict(run.recipe) for name, run in runs.items()}
    fields = next(iter(recipes.values()))
    rows = [
        Line(field, [Cell(str(recipe[field])) for recipe in recipes.values()])
        for field in fields
        if field != "name" and len({str(recipe[field]) for recipe in recipes.values()}) > 1
    ]
    caption = "Fields in which the recipes differ" + ("." if rows else ": none.")
    return Table(caption, [Head("field"), *map(Head, recipes)], rows)


def metrics_of(finals: dict[str, Finals]) -> tuple[Metric, ...]:
    """The metrics of some runs, which are of one task."""
    return next(iter(finals.values())).metrics


def result_table(finals: dict[str, Finals], metric: Metric) -> Table:
    """One metric: weights down, runs across, the lowest of the table in bold."""
    means = [f.mean(row, metric.key).mean for f in finals.values() for row in f.rows]
    rows = [
        Line(label, [_cell(f, row, metric, min(means)) for f in finals.values()])
        for row, label in _all_rows(finals).items()
    ]
    caption = f"{metric.title} ({_unit(metric)}); mean ± standard error."
    return Table(caption, [Head("weights"), *map(Head, finals)], rows)


def describe_results(finals: dict[str, Finals]) -> str:
    """For each run, its SWA (of the constant-rate arm, or else the cyclic one) against its annealed arm."""
    parts, metric = [], metrics_of(finals)[0]
    for name, run in finals.items():
        average = next(
            (
                row
                for row in (("swa", "swa"), ("constant", "swa"), ("cyclic", "swa"))
                if row in run.rows
            ),
            None,
        )
        if average is None:
            parts.append(f"{name} has no SWA")
            continue
        value, other = run.difference(average, metric.key), run.terms.baseline_name
        told = difference("SWA", other, value, metric.unit, metric.digits)
        parts.append(f"{name}: in {metric.title} {told}")
    return "; ".join(parts) + "."


def _all_rows(finals: dict[str, Finals]) -> dict[ArmWeights, str]:
    """The rows of all runs, and what they are called."""
    return {row: run.label(row) for run in finals.values() for row in run.rows}


def _cell(finals: Finals, row: ArmWeights, metric: Metric, best: float) -> Cell:
    if row not in finals.rows:
        return Cell("")
    value = finals.mean(row, metric.key)
    return Cell(format_estimate(value, metric.digits), "best" if value.mean == best else "")


def result_pictures(finals: dict[str, Finals]) -> list[Picture]:
    """The results of runs side by side, a picture for each of the first two metrics."""
    rows = _all_rows(finals)
    pictures = []
    for metric in metrics_of(finals)[:2]:
        values = {
            name: [run.mean(row, metric.key) if row in run.rows else None for row in rows]
            for name, run in finals.items()
        }
        draw = partial(
            plot_results,
            labels=list(rows.values()),
            values=values,
            xlabel=f"{metric.title} ({_unit(metric)})",
        )
        alt = f"{metric.title} of every run's weights, with standard errors"
        pictures.append(Picture(f"results-{metric.key}", alt, draw))
    return pictures
