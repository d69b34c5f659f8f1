"""The page of a run: one self-contained HTML file, light and dark, with every picture as a PNG too."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

import polyak
from polyak.checkpoints.files import replacing
from polyak.errors import ArgumentError, OutputError
from polyak.report import sections, sentences
from polyak.report.drawing import Drawing, write_png
from polyak.report.measure import Landscape, averaging_arm, detail_for, measure
from polyak.report.surroundings import landscape_sections
from polyak.report.tables import BASELINE, METRICS, Finals, Metric, Row, row_label, spelled
from polyak.study.paired import t_quantile
from polyak.training.run import Run


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
class Table:
    """A table as the page shows it."""

    caption: str
    columns: list[str]
    rows: list[Line]


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` and `figures/*.png` into a run folder and return the page's path.

    The page needs no network and no script. It measures the surface around the first seed's
    solutions (see `polyak.report.measure`), draws what `polyak.report.figures` has, and says in a
    sentence under each picture what was measured. An older page is replaced.

    Raises:
        ArgumentError: The folder is no run, or one that has not finished its first arm.
        OutputError: The folder cannot be written.
        MissingExtra: matplotlib is not installed.

    """
    run = Run(folder)
    finals = Finals(run.finals())
    if not finals.rows:
        raise ArgumentError(
            f"{run.folder} has no final results yet. Let the run finish: "
            f"polyak train --output {run.folder} --resume"
        )
    arm = averaging_arm(run)
    land = None if arm is None else measure(run, arm, detail_for(run))
    parts = sections.shown(_sections(run, finals, land))
    _write_pngs((d for part in parts for d in part.drawings), run.folder / "figures")
    html = environment().get_template("report.html.j2").render(_context(run, finals, land, parts))
    return write_page(html, run.folder / "report.html")


def environment() -> Environment:
    """The templates; whatever is put into them is escaped."""
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
        for metric in METRICS
    }
    rows = [
        Line(row_label(row), [_value(finals, row, m, best) for m in METRICS]) for row in finals.rows
    ]
    caption = f"Test images; mean ± standard error over {finals.n_seeds} seed(s)."
    return Table(caption, ["weights", *(_column(m) for m in METRICS)], rows)


def difference_table(finals: Finals) -> Table:
    """Paired differences to SGD's last iterate, with 95% intervals."""
    rows = [
        Line(row_label(row), [_difference(finals, row, metric) for metric in METRICS])
        for row in finals.rows
        if row != BASELINE
    ]
    caption = "Difference to SGD, paired seed by seed; mean ± half the 95% interval (Student's t)."
    return Table(caption, ["weights", *(m.title for m in METRICS)], rows)


def _column(metric: Metric) -> str:
    return f"{metric.title} ({'%' if metric.unit == 'points' else metric.unit})"


def _value(finals: Finals, row: Row, metric: Metric, best: dict[str, float]) -> Cell:
    value = finals.mean(row, metric.key)
    return Cell(spelled(value, metric.digits), "best" if value.mean == best[metric.key] else "")


def _difference(finals: Finals, row: Row, metric: Metric) -> Cell:
    value = finals.difference(row, metric.key)
    if value is None:
        return Cell("")
    mark = {-1: "better", 0: "", 1: "worse"}[value.sign]
    return Cell(spelled(value, metric.digits, signed=True), mark)


def _sections(run: Run, finals: Finals, land: Landscape | None) -> list[sections.Section]:
    parts = [sections.schedule_section(run), sections.history_section(run)]
    parts.append(sections.reliability_section(finals, averaging_arm(run)))
    return parts if land is None else [*parts, *landscape_sections(land)]


def _context(
    run: Run, finals: Finals, land: Landscape | None, parts: list[sections.Shown]
) -> dict[str, Any]:
    import torch

    recipe, data = run.recipe, run.data
    subtitle = (
        f"{recipe.epochs} epochs in every arm, {finals.n_seeds} seed(s), {len(data.train):,} images "
        f"to train on, {len(data.validation):,} to validate, {len(data.test):,} to test."
    )
    return {
        "name": recipe.name,
        "subtitle": subtitle,
        "verdict": [] if land is None else sentences.verdict(finals, land.arm),
        "values": value_table(finals),
        "differences": difference_table(finals),
        "about_differences": _about_differences(finals),
        "about_table": sentences.about_table(finals),
        "sections": parts,
        "landscape_note": "" if land is None else _landscape_note(land),
        "recipe": recipe.to_toml(),
        "command": f"polyak report {run.folder}",
        "versions": f"polyak {polyak.__version__}, torch {torch.__version__}",
    }


def _about_differences(finals: Finals) -> str:
    comparisons = (len(finals.rows) - 1) * len(METRICS)
    text = "Lower is better everywhere."
    if finals.n_seeds == 1:
        return f"{text} One seed shows no spread: take no difference for more than that seed's."
    factor = t_quantile(0.975, finals.n_seeds - 1)
    return (
        f"{text} A difference is coloured where its 95% interval does not hold 0; of "
        f"{comparisons} comparisons about {max(1, round(comparisons / 20))} would be by chance. "
        f"With {finals.n_seeds} seeds an interval reaches {factor:.1f} standard errors to each "
        "side, so what is not coloured is not shown to be equal either."
    )


def _landscape_note(land: Landscape) -> str:
    return (
        "The surface was measured around the first seed's solutions, on the first "
        f"{land.detail.n_images:,} training images (without augmentation) and test images, with "
        "BatchNorm statistics measured anew at every point where the network has them. "
        "Rays are random directions of unit length over all parameters, the same for each centre."
    )


def _write_pngs(drawings: Iterable[Drawing], folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Could not make {folder}: {error.strerror}. Make the run folder writable."
        ) from error
    for drawing in drawings:
        write_png(drawing, folder)
