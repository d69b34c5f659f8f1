"""Runs side by side: what differs in their recipes, what each is worth, and their pictures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from polyak.checkpoints.files import refuse_existing
from polyak.errors import ArgumentError
from polyak.report.drawing import Picture
from polyak.report.figures import plot_results
from polyak.report.page import Cell, Line, Table, environment, write_page
from polyak.report.sections import Section, history_section, schedule_section, shown
from polyak.report.sentences import difference
from polyak.report.tables import METRICS, Finals, Metric, Row, row_label, spelled
from polyak.training.run import Run


def write_comparison(
    folders: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Write one self-contained page that puts finished runs side by side; return its path.

    Raises:
        ArgumentError: Fewer than two runs, the same run twice, or one without final results.
        OutputError: The page exists and `overwrite` is False, or cannot be written.
        MissingExtra: matplotlib is not installed.

    """
    refuse_existing(Path(path), overwrite=overwrite)
    runs = named_runs(folders)
    finals = {name: Finals(run.finals()) for name, run in runs.items()}
    results, *parts = shown(
        [
            Section("What each is worth", about_results(finals), _pictures(finals)),
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
        "tables": [result_table(finals, metric) for metric in METRICS],
        "runs": {name: [parts.pop(0), parts.pop(0)] for name in runs},
    }
    html = environment().get_template("compare.html.j2").render(context)
    return write_page(html, Path(path))


def named_runs(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Run]:
    """The runs by the names of their folders, by whole paths where two names are the same."""
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ArgumentError(
            f"A comparison needs two or more different runs, got {', '.join(map(str, paths)) or 'none'}."
        )
    short = [path.resolve().name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    runs = {name: Run(path) for name, path in zip(names, paths, strict=True)}
    for run in runs.values():
        if not run.finals():
            raise ArgumentError(
                f"{run.folder} has no final results yet. Let it finish: "
                f"polyak train --output {run.folder} --resume"
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
    return Table(caption, ["field", *recipes], rows)


def result_table(finals: dict[str, Finals], metric: Metric) -> Table:
    """One metric: weights down, runs across, the lowest of the table in bold."""
    means = [f.mean(row, metric.key).mean for f in finals.values() for row in f.rows]
    rows = [
        Line(row_label(row), [_cell(f, row, metric, min(means)) for f in finals.values()])
        for row in _all_rows(finals)
    ]
    caption = f"{metric.title} ({'%' if metric.unit == 'points' else metric.unit}); mean ± standard error."
    return Table(caption, ["weights", *finals], rows)


def about_results(finals: dict[str, Finals]) -> str:
    """For each run, its SWA (of the constant-rate arm, or else the cyclic one) against its SGD."""
    parts = []
    for name, run in finals.items():
        average = next(
            (row for row in (("swa", "swa"), ("cyclic", "swa")) if row in run.rows), None
        )
        if average is None:
            parts.append(f"{name} has no SWA")
            continue
        value = run.difference(average, "error")
        parts.append(f"{name}: in test error {difference('SWA', 'SGD', value, 'points', 2)}")
    return "; ".join(parts) + "."


def _all_rows(finals: dict[str, Finals]) -> list[Row]:
    return list(dict.fromkeys(row for run in finals.values() for row in run.rows))


def _cell(finals: Finals, row: Row, metric: Metric, best: float) -> Cell:
    if row not in finals.rows:
        return Cell("")
    value = finals.mean(row, metric.key)
    return Cell(spelled(value, metric.digits), "best" if value.mean == best else "")


def _pictures(finals: dict[str, Finals]) -> list[Picture]:
    rows = _all_rows(finals)
    pictures = []
    for metric in METRICS[:2]:
        values = {
            name: [run.mean(row, metric.key) if row in run.rows else None for row in rows]
            for name, run in finals.items()
        }
        draw = partial(
            plot_results,
            labels=[row_label(row) for row in rows],
            values=values,
            xlabel=f"{metric.title} ({'%' if metric.unit == 'points' else metric.unit})",
        )
        alt = f"{metric.title} of every run's weights, with standard errors"
        pictures.append(Picture(f"results-{metric.key}", alt, draw))
    return pictures
