"""All pictures of all pages: one colour for one meaning, and legends where no data are."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from reference.tiny_run import make_run, make_words_run, write_record

import polyak
from polyak.reference_run.flatness import measure_landscape
from polyak.reference_run.run import Run
from polyak.report import drawing, meanings
from polyak.report.budget import budget_of
from polyak.report.drawing import Picture
from polyak.report.opening import budget_pictures
from polyak.report.page import result_pictures
from polyak.report.questions import question_sections
from polyak.report.scans import plot_scan
from polyak.report.search import search_sections
from polyak.report.sections import (
    history_section,
    landscape_sections,
    reliability_section,
    schedule_section,
)
from polyak.report.tables import Finals
from polyak.schedules import Constant, CyclicLinear, chain
from polyak.study.found import Found, Scored
from polyak.study.scans import RayScan

MEANT = {
    drawing.PURPLE: {
        "SGD", "SGD at the end", "cosine", "cosine at the end", "annealed over the whole length", "Base LR schedule",
    },
    drawing.PINK: {"SGD, half length", "cosine, half length", "annealed in half the length"},
    drawing.OLIVE: {"cosine, quarter length", "annealed in a quarter of the length"},
    drawing.BLUE: {
        "iterate", "iterate, constant rate", "last iterate", "the last iterate", "SWA arm, last iterate",
        "iterate, SWA arm", "iterate, constant arm", "averaged weights", "Averaged weights", "SWA LR schedule",
    },
    drawing.BROWN: {
        "iterate, cyclic arm", "averaged weights, cyclic arm", "last iterate, cyclic arm", "cyclic arm, last iterate",
        "mine.pt",  # anyone's, which gets a colour that is left in its picture
    },
    drawing.ORANGE: {"SWA", "its SWA", "SWA arm, SWA", "cyclic arm, SWA"},
    drawing.GREEN: {"EMA", "its EMA"},
    drawing.TEAL: {"power EMA", "its power EMA"},
}  # fmt: skip
NEUTRAL = {
    "share of predictions", "best", "windows", "half-lives", "power", "annealed", "at the end", "the answer",
    "95% of the difference", "best average that ends there", "images", "again",
}  # fmt: skip


def pictures_of(run):
    finals = Finals(run.finals())
    arm = run.averaging_arm()
    sections = [schedule_section(run), history_section(run), *question_sections(run)]
    if run.recipe.task == "images":
        sections += [reliability_section(finals, arm), *landscape_sections(measure_landscape(run))]
    return [
        *budget_pictures(budget_of(run, finals.metrics[0].key), finals),
        *(picture for section in sections for picture in section.pictures),
    ]


def searched():
    """Every family and every reference, which the pages of runs do not have."""
    rows = [
        Scored(f"{name}={40 - 10 * i}", family, None, 80, 0.3 + i / 10, None, 0.01)
        for i in range(2)
        for family, name in (("half-lives", "ema:half_life"), ("power", "ema:half_life"), ("annealed", "ema:half_life"))
    ]  # fmt: skip
    swa = Scored("swa:start=40", "windows", 40, 80, 0.25, None, 0.01)
    found = Found(
        question="search", best=swa, answers=(swa,), scored=(swa, *rows), minimize=True, comparisons=(),
        references={"SWA": swa, "EMA": rows[0], "the last iterate": rows[1]}, examples=None, evaluations=7,
        cached=0, unit="steps", end=80,
    )  # fmt: skip
    return search_sections([found])[0].pictures


def others():
    schedule = chain((50, Constant(0.1)), (40, CyclicLinear(high=0.05, low=0.01, cycle=10)))
    rays = RayScan(
        distances=np.arange(3.0), values={name: np.ones((2, 3)) for name in ("SWA", "EMA", "mine.pt")},
        normalize=None, minimize=True, evaluations=1, cached=0,
    )  # fmt: skip
    return [
        Picture("schedule", "", lambda ax: polyak.plot_schedule(schedule, ax)),
        Picture("rays", "", lambda ax: plot_scan(rays, ax)),
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    images, words = Run(make_run(folder / "images")), Run(make_words_run(folder / "words"))
    cyclic = Run(make_run(folder / "again", arms=("sgd", "cyclic")))
    write_record(images.folder)
    write_record(words.folder, "constant")
    beside = {run.folder.name: Finals(run.finals()) for run in (images, cyclic)}
    return [
        *(picture for run in (images, words, cyclic) for picture in pictures_of(run)),
        *result_pictures(beside),
        *searched(),
        *others(),
    ]


@pytest.fixture(scope="module")
def drawn(pictures):
    """Each picture's figure and the axes it was given."""
    found = []
    with drawing.style():
        for picture in pictures:
            figure = Figure(figsize=picture.size_inches)
            ax = figure.add_subplot()
            picture.draw(ax)
            figure.draw_without_rendering()
            found.append((picture, figure, ax))
    return found


def colours_of(artist):
    """What is seen of a line, a mark, bars or an area."""
    if hasattr(artist, "get_color"):
        line, face = artist.get_color(), getattr(artist, "get_markerfacecolor", lambda: None)()
        edge = getattr(artist, "get_markeredgecolor", lambda: None)()
        seen = [c for c in (face, line, edge) if c is not None and not isinstance(c, np.ndarray)]
        seen += [*np.atleast_2d(line)] if isinstance(line, np.ndarray) else []
    elif isinstance(artist, StepPatch):
        seen = [artist.get_edgecolor()]
    else:
        seen = [*np.atleast_2d(artist.get_facecolor())]
    return {to_hex(colour) for colour in seen if not isinstance(colour, str) or colour != "none"}


def artists_of(ax):
    """Without areas that are coloured by a value."""
    marks = [c for c in ax.collections if c.get_array() is None]
    return [*ax.lines, *ax.patches, *marks]


def test_every_name_has_one_colour_and_every_colour_one_meaning(drawn):
    seen = {}
    for _, _, ax in drawn:
        for artist in artists_of(ax):
            name = str(artist.get_label())
            if not name.startswith("_"):
                seen.setdefault(name, set()).update(colours_of(artist) - {"#ffffff"})
        for container in ax.containers:
            seen.setdefault(container.get_label(), set())
    neutral = {drawing.INK, drawing.GREY}
    meant = {name: {colour} for colour, names in MEANT.items() for name in names}
    assert {name: c for name, c in seen.items() if not c <= neutral} == meant
    assert {name for name, c in seen.items() if c <= neutral} == NEUTRAL
    colours = [colour for _, _, colour in meanings.MEANINGS]
    assert len({*colours}) == len(colours)


def test_what_is_coloured_has_its_name_in_the_legend(drawn):
    plain = {drawing.INK, drawing.GREY, "#ffffff"}
    for picture, _, ax in drawn:
        artists = artists_of(ax)
        named = [a for a in artists if not str(a.get_label()).startswith("_")]
        seen = set().union(*map(colours_of, artists)) - plain
        assert seen <= set().union(*map(colours_of, named), plain), picture.name


def test_legends_stand_where_no_data_are(drawn):
    for picture, figure, ax in drawn:
        legend = ax.get_legend()
        if legend is None:
            assert not ax.get_legend_handles_labels()[0], picture.name
            continue
        box = legend.get_window_extent()
        assert not any(box.overlaps(other.get_window_extent()) for other in figure.axes), (
            picture.name
        )
        names = [text.get_text() for text in legend.get_texts()]
        assert len({*names}) == len(names), picture.name
        assert box.width <= 1.15 * figure.bbox.width, picture.name
