"""The page of what a record answers: its three questions, each a section, and a slider over averages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polyak.errors import require
from polyak.files import file_target, replacing
from polyak.maths.numbers import decimals, difference, percent, rounded
from polyak.maths.text import parse_profile
from polyak.report.drawing import Picture
from polyak.report.page import Cell, Head, Line, Table, environment
from polyak.report.search_figures import plot_along, plot_lengths, plot_windows
from polyak.report.sections import Section, render
from polyak.study.found import QUESTIONS, Comparison, Found, Scored, score_decimals
from polyak.version import __version__


def write_search(
    found: Found | Sequence[Found], path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write one self-contained page of what questions to a record found; return its path.

    The page needs no network. Its only script moves the slider; without it a table has the same scores.

    Raises:
        ArgumentError: there is nothing in `found`.
        OutputError: the page exists and `overwrite` is False, or cannot be written.
        MissingExtra: matplotlib is not installed.

    """
    several = [found] if isinstance(found, Found) else list(found)
    require(bool(several), "There is nothing to write a page of; expected what a search found.")
    target = file_target(path, overwrite=overwrite)
    context = {
        "title": " · ".join(QUESTIONS[one.question] for one in several),
        "parts": [
            {"section": section, "table": score_table(one), "slider": slider(one), "found": one}
            for one, section in zip(several, render(search_sections(several)), strict=True)
        ],
        "versions": f"polyak {__version__}",
    }
    html = environment().get_template("search.html.j2").render(context)
    with replacing(target, overwrite=overwrite) as part:
        part.write_text(html, encoding="utf-8")
    return target


def search_sections(found: Sequence[Found]) -> list[Section]:
    """One section for each question, to be put into any page by `report.sections.render`."""
    return [Section(QUESTIONS[one.question], describe(one), _pictures(one)) for one in found]


def describe(found: Found) -> str:
    """What was found, in sentences."""
    best, unit = found.best, found.unit
    score = rounded(best.score, score_decimals(found))
    if found.question == "stop":
        first = (
            f"The best average that ends at {best.until:,g} {unit}, {percent(best.until / found.end)} of the run, "
            "is the earliest from which on none is shown to be worse than the best one at the end."
        )
    elif found.question == "decay":
        first = (
            "Each point is an average of the shape of a decay that ends there. It forecasts the quality after a real "
            f"decay, not its weights. The best one is at {best.until:,g} {unit}."
        )
    elif found.question != "search":
        first = f"{QUESTIONS[found.question]}: {_where(best, unit)}, score {score}."
    else:
        first = f"Best of {len(found.scored)}: {_where(best, unit)}, score {score}."
    return " ".join([first, *_honest(found)])


def _honest(found: Found) -> list[str]:
    """How sure it is."""
    if not found.examples:
        return [
            "No examples were held out, so there is no interval, and the best is flattered by having been "
            "chosen."
        ]
    chose, held = found.examples
    said = f"Chosen on {chose:,} examples, compared on {held:,} others."
    if found.question not in ("stop", "decay"):
        return [said, *(_sentence(one) for one in found.comparisons)]
    close = [one.what for one in found.comparisons if one.within_noise]
    if not close:
        return [said, "Every earlier end differs from the last by more than noise."]
    return [said, f"Within noise of the last: {', '.join(close)}."]


def _sentence(one: Comparison) -> str:
    """With as many decimals as the interval has to say; within noise is what reaches 0 as it is shown."""
    if one.same:
        return f"The best is {one.against} itself."
    if one.low is None or one.high is None:
        return f"Minus {one.against}: {rounded(one.difference, decimals(one.difference, 2), signed=True)}."
    if one.low == one.high == one.difference == 0:
        return f"The best scores as {one.against} does on every example."
    value, low, high, holds_0 = difference(one.difference, one.low, one.high)
    return f"Minus {one.against}: {value} ({low} to {high}{', within noise' if holds_0 else ''})."


def score_table(found: Found) -> Table:
    """Everything that was evaluated; the best in bold."""
    names = {one: name for name, one in found.references.items()}
    rows, digits = [], score_decimals(found)
    for one in [*found.scored, *(r for r in names if r not in found.scored)]:
        mark = "best" if one == found.best else ""
        held = "" if one.held_out is None else rounded(one.held_out, digits)
        begins = "" if one.start is None else f"{one.start:,g}"
        score = rounded(one.score, digits)
        texts = [begins, f"{one.until:,g}", score, held, f"{one.error:.2g}"]
        said = ", ".join(filter(None, [mark, names.get(one, "")]))
        rows.append(Line(one.profile, [Cell(text, mark) for text in texts] + [Cell(said)]))
    better = "lower" if found.minimize else "higher"
    caption = (
        f"Scores, {better} is better; times in {found.unit}. The planned error is that of making the average from "
        "the record."
    )
    columns = ["average", "begins", "ends", "score", "held out", "planned error", ""]
    return Table(caption, [*map(Head, columns)], rows)


def slider(found: Found) -> dict[str, Any] | None:
    """What the slider shows of each window, from where it begins and ends; None if there is none."""
    names = {one: name for name, one in found.references.items()}
    shown = [one for one in found.scored if one.start is not None and not one.failed]
    shown.sort(key=lambda one: (one.until, one.start))
    if not shown:
        return None
    origin = min(one.start or 0.0 for one in shown)
    span, digits = found.end - origin, score_decimals(found)
    entries = [
        {
            "left": 100 * ((one.start or 0.0) - origin) / span,
            "width": 100 * (one.until - (one.start or 0.0)) / span,
            "text": f"{one.start or 0:,g} to {one.until:,g} {found.unit}: score {rounded(one.score, digits)}"
            + ("" if one.held_out is None else f", held out {rounded(one.held_out, digits)}")
            + (", the best" if one == found.best else "")
            + (f", {names[one]}" if one in names else ""),
        }
        for one in shown
    ]
    at = shown.index(found.best) if found.best in shown else 0
    return {"entries": entries, "at": at}


def _pictures(found: Found) -> list[Picture]:
    title = f"score ({'lower' if found.minimize else 'higher'} is better)"
    if found.question in ("stop", "decay"):
        rows = [one for one in found.answers if not one.failed]
        alt = f"{QUESTIONS[found.question]}: the score at {len(rows)} ends"
        draw = partial(
            plot_along,
            ends=[100 * one.until / found.end for one in rows],
            scores=[one.score for one in rows],
            intervals=_intervals(found, rows),
            best=100 * found.best.until / found.end,
            ylabel=title,
        )
        return [Picture(found.question, alt, draw)]
    pictures = []
    windows = [one for one in found.scored if one.start is not None and not one.failed]
    if windows:
        draw = partial(
            plot_windows,
            starts=[one.start or 0.0 for one in windows],
            ends=[one.until for one in windows],
            scores=[one.score for one in windows],
            marks=_marks(found),
            unit=found.unit,
            title=title,
            minimize=found.minimize,
        )
        alt = f"The scores of {len(windows)} windows by where they begin and end"
        pictures.append(Picture("windows", alt, draw, (4.2, 4.2)))
    curves = _curves(found)
    if curves:
        lines = {k: one.score for k, one in found.references.items() if not one.failed}
        draw = partial(plot_lengths, curves=curves, references=lines, unit=found.unit, ylabel=title)
        pictures.append(Picture("lengths", "The score by mean age, by family", draw, (4.2, 3.6)))
    return pictures


def _intervals(found: Found, rows: Sequence[Scored]) -> list[tuple[float, float]] | None:
    """Of each score, around the last one: the interval of its held-out difference."""
    pairs = dict(zip([one.until for one in found.answers[:-1]], found.comparisons, strict=True))
    if not found.examples:
        return None
    last = rows[-1].score
    spans = [pairs.get(one.until) for one in rows]
    return [
        (one.score, one.score)
        if span is None or span.low is None or span.high is None
        else (last + span.low, last + span.high)
        for one, span in zip(rows, spans, strict=True)
    ]


def _marks(found: Found) -> dict[str, tuple[float, float]]:
    """The best and the references that are windows, (begins, ends)."""
    named = {"best": found.best, **found.references}
    return {name: (one.start, one.until) for name, one in named.items() if one.start is not None}


def _curves(found: Found) -> dict[str, tuple[list[float], list[float]]]:
    """Of averages that end at the end: family -> mean ages and scores."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for one in found.scored:
        if one.until == found.end and not one.failed:
            age = parse_profile(one.profile).mean_age(one.until)
            curves.setdefault(one.family, []).append((age, one.score))
    return {
        family: ([a for a, _ in sorted(rows)], [s for _, s in sorted(rows)])
        for family, rows in curves.items()
    }


def _where(one: Scored, unit: str) -> str:
    if one.start is None:
        return f"{one.profile} at {one.until:,g} {unit}"
    shape = "" if one.family == "windows" else f" ({one.profile.partition(',')[0]})"
    return f"from {one.start:,g} to {one.until:,g} {unit}{shape}"
