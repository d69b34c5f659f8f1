"""The page of a search: its sections, its table, its slider."""

from __future__ import annotations

import dataclasses
import json
import re
from html import unescape

import pytest

from polyak.errors import ArgumentError, OutputError
from polyak.report.search import describe, score_table, search_sections, slider, write_search
from polyak.report.sections import render
from polyak.study.found import Comparison, Found, Scored


def one(start, until, score, held=None, family="windows"):
    profile = f"swa:start={start}" if start is not None else "ema:half_life=20"
    return Scored(profile, family, start, until, score, held, 0.01)


WINDOWS = (
    one(0, 80, 0.5, 0.6),
    one(40, 80, 0.3, 0.4),
    one(0, 40, 0.9, 0.8),
    one(60, 80, 0.35, 0.3),
)
EMA = one(None, 80, 0.45, 0.5, "half-lives")
FOUND = Found(
    question="search",
    best=WINDOWS[1],
    answers=(WINDOWS[1], EMA),
    scored=(*WINDOWS, EMA, one(20, 60, float("nan"), float("nan"))),
    references={"SWA of the last quarter": WINDOWS[3]},
    comparisons=(Comparison("best", "SWA of the last quarter", 0.1, -0.1, 0.3),),
    minimize=True,
    examples=(50, 50),
    evaluations=6,
    cached=0,
    unit="steps",
    end=80,
    notes=("A note & <b>more</b>",),
)  # fmt: skip


def along(question):
    rows = (one(0, 40, 0.5, 0.5), one(40, 80, 0.3, 0.3))
    step = Comparison("50% of the run", "all of it", 0.2, 0.1, 0.3)
    return dataclasses.replace(
        FOUND, question=question, best=rows[1], answers=rows, scored=rows, references={}, comparisons=(step,)
    )  # fmt: skip


def test_what_it_says():
    said = describe(FOUND)
    assert "from 40 to 80 steps, score 0.30000" in said
    assert "Minus SWA of the last quarter: +0.10 (−0.10 to +0.30, within noise)." in said
    itself = Comparison("best", "the last interval", 0.0, 0.0, 0.0, same=True)
    said = describe(dataclasses.replace(FOUND, comparisons=(itself,)))
    assert "The best is the last interval itself." in said
    assert "within noise" not in said
    number = dataclasses.replace(FOUND, examples=None)
    assert "No examples were held out, so there is no interval" in describe(number)
    assert "100% of the run, is the earliest" in describe(along("stop"))
    assert "differs from the last by more than noise" in describe(along("stop"))
    assert "not its weights" in describe(along("decay"))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((-0.01968, -0.0308, -0.008279), "Minus EMA: −0.020 (−0.031 to −0.008)."),
        ((0.001038, 1.675e-05, 0.002029), "Minus EMA: +0.0010 (+0.0000 to +0.0020, within noise)."),
        ((0.0, 0.0, 0.0), "The best scores as EMA does on every example."),
        ((12.5, 3.0, 22.0), "Minus EMA: +12.5 (+3.0 to +22.0)."),
    ],
)
def test_a_difference_has_as_many_decimals_as_its_interval_says(numbers, said):
    one = Comparison("best", "EMA", *numbers)
    assert describe(dataclasses.replace(FOUND, comparisons=(one,))).endswith(said)


def test_the_slider_shows_stored_scores_in_order():
    shown = slider(FOUND)
    assert [entry["text"].partition(" ")[0] for entry in shown["entries"]] == ["0", "0", "40", "60"]
    assert "the best" in shown["entries"][shown["at"]]["text"]
    assert all(e["left"] >= 0 and e["left"] + e["width"] <= 100 for e in shown["entries"])
    assert slider(dataclasses.replace(FOUND, scored=(EMA,), best=EMA)) is None


def test_the_table_has_everything():
    table = score_table(FOUND)
    assert len(table.rows) == 6
    assert [row.cells[0].mark for row in table.rows] == ["", "best", "", "", "", ""]


@pytest.mark.parametrize("found", [FOUND, along("decay"), along("stop")], ids=lambda f: f.question)
@pytest.mark.parametrize("examples", [(50, 50), None])
def test_sections_draw(found, examples):
    sections = search_sections([dataclasses.replace(found, examples=examples)])
    (drawn,) = render(sections)
    assert all("<svg" in drawing.svg for drawing in drawn.drawings)
    assert len(drawn.drawings) == (2 if found.question == "search" else 1)


def test_the_page(tmp_path):
    path = write_search([FOUND, along("stop")], tmp_path / "page.html")
    html = path.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert "A note &amp; &lt;b&gt;more" in html
    entries = re.findall(r'data-entries="([^"]*)"', html)
    assert len(json.loads(unescape(entries[0]))) == 4
    with pytest.raises(OutputError, match="exists"):
        write_search(FOUND, path)
    write_search(FOUND, path, overwrite=True)
    with pytest.raises(ArgumentError, match="nothing to write"):
        write_search([], tmp_path / "other.html")
