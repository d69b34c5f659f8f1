"""The page of a run and of a comparison: self-contained, complete, the same every time."""

import re
from dataclasses import asdict

import numpy as np
import pytest
from reference.tiny_run import make_run

from polyak.errors import ArgumentError, FormatError, OutputError
from polyak.reference_run.flatness import measure_landscape, stored_landscape
from polyak.reference_run.run import Run
from polyak.report.page import named_runs, write_comparison, write_report

OPENING = ["The average over the whole budget", "What to do next"]
HEADINGS = [
    *OPENING,
    "What each is worth",
    "The schedule",
    "Error and loss over time",
    "Is it as right as it is sure?",
    "From SGD&#39;s solution to SWA&#39;s",
    "Along random rays",
    "From checkpoint to checkpoint",
    "The plane through the first, the middle and the last",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "tiny")
    measured_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


def measured_report(folder):
    measure_landscape(Run(folder))
    return write_report(folder)


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_it_holds_what_a_report_holds(page):
    assert headings(page) == HEADINGS
    assert len(re.findall("<figcaption", page)) == len(HEADINGS) - 2
    assert "SWA arm, last iterate" in page
    assert "polyak report" in page


def test_it_needs_no_network_and_no_script(page):
    assert "<script" not in page
    linked = re.findall(r'(?:src|href|xlink:href|url)\s*[=(]\s*"?([^")\s>]+)', page)
    assert all(target.startswith(("#", "data:")) for target in linked)
    assert len(page) < 3_000_000


def test_ids_differ_all_over_the_page(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 100
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used <= set(ids)


def test_pictures_read_on_light_and_dark(page):
    assert "currentColor" in page
    assert "#1b1f24" not in page.split("</style>", 1)[1]  # ink would be lost on a dark page


def test_every_picture_is_a_png_too(folder, page):
    pictures = sorted((folder / "figures").glob("*.png"))
    assert (
        len(pictures) == page.count("<svg ") - 1 == 21
    )  # the first is drawn for narrow screens too
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_the_same_run_gives_the_same_page(folder, page):
    write_report(folder)
    assert (folder / "report.html").read_text() == page


def test_batchnorm_statistics_are_measured_at_every_point(tmp_path):
    page = measured_report(make_run(tmp_path / "normed", batchnorm=True)).read_text()
    assert headings(page) == HEADINGS


def test_a_run_of_sgd_alone_has_no_surface(tmp_path):
    page = measured_report(make_run(tmp_path / "<b>alone<b>", arms=("sgd",))).read_text()
    assert headings(page) == HEADINGS[2:6]
    assert "No averaging arm has finished yet" in page
    assert "<b>" not in page
    assert "&lt;b&gt;alone" in page


def test_a_run_that_was_stopped_shows_what_it_has(tmp_path):
    folder = make_run(tmp_path / "stopped")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"sgd"' in line))
    page = measured_report(folder).read_text()
    assert headings(page) == HEADINGS[2:6]
    assert "No average beat annealed SGD" not in page  # none was tried


def test_the_cyclic_arm_stands_in_for_swa(tmp_path):
    page = measured_report(make_run(tmp_path / "note", arms=("sgd", "cyclic"))).read_text()
    assert headings(page) == HEADINGS


def test_it_draws_what_is_stored_and_measures_nothing(tmp_path, folder, page, monkeypatch):
    def measuring(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr("polyak.study.surface.Surface.__enter__", measuring)
    write_report(folder)
    assert (folder / "report.html").read_text() == page
    assert measure_landscape(Run(folder)).arm == "swa"  # a second time it is only read
    other = write_report(make_run(tmp_path / "unmeasured")).read_text()
    assert headings(other) == HEADINGS[:6]
    assert "has not been measured yet: polyak report" in other
    assert "annealed SGD of the same length" in other


def test_the_surface_reads_back_as_it_was_measured(tmp_path):
    run = Run(make_run(tmp_path / "again", arms=("sgd", "cyclic")))
    measured = measure_landscape(run)
    np.testing.assert_equal(asdict(stored_landscape(run)), asdict(measured))


def test_a_damaged_surface_is_one_message(tmp_path):
    folder = make_run(tmp_path / "damaged")
    (folder / "landscape.json").write_text('{"arm": "swa"}')
    with pytest.raises(FormatError, match=r"landscape\.json is damaged .*Delete it"):
        stored_landscape(Run(folder))


def test_no_run(tmp_path):
    with pytest.raises(ArgumentError, match="is not a run"):
        write_report(tmp_path)


def test_a_run_without_results(tmp_path):
    folder = make_run(tmp_path / "begun")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ArgumentError, match=r"no final results yet.*--resume"):
        write_report(folder)


def test_a_folder_that_cannot_be_written(tmp_path):
    folder = make_run(tmp_path / "full", arms=("sgd",))
    (folder / "figures").write_text("a file where the folder belongs")
    with pytest.raises(OutputError, match="figures"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_page_may_be_written_elsewhere(tmp_path, folder, page):
    assert write_report(folder, tmp_path / "mine.html").read_text() == page


def test_the_code_on_the_page_loads_the_averaged_model(page):
    code = re.search(r"<pre>(from polyak.*?)</pre>", page, re.DOTALL)[1].replace("&#39;", "'")
    found = {}
    exec(code, found)
    assert len(code.splitlines()) == 3
    assert not found["model"].training


def test_it_says_what_was_trained_on_what(tmp_path):
    folder = make_run(tmp_path / "facts", arms=("sgd", "swa"), network="residual")
    (folder / "run.json").write_text('{"started": "2026-03-04T05:06", "threads": "1", "jobs": "2"}')
    said = re.findall(r"<dd>(.*?)</dd>", write_report(folder).read_text())
    assert said[0].startswith("reference.tiny_run:images: 60 images to train on, 60 to validate on")
    assert said[1] == "a small residual network with BatchNorm, 72,890 parameters"
    assert said[2].startswith("8 epochs, 3 seeds")
    assert said[3].startswith("2026-03-04, 1 thread in each of 2 processes side by side")


def test_runs_side_by_side(tmp_path, folder):
    other = make_run(tmp_path / "annealed", arms=("sgd", "swa"), rate=0.05)
    path = write_comparison([folder, other], tmp_path / "compare.html")
    page = path.read_text()
    assert headings(page)[:2] == ["What differs", "What each is worth"]
    assert "<td>rate</td><td>0.1</td><td>0.05</td>" in page
    assert {"tiny", "annealed"} <= set(headings(page))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    with pytest.raises(OutputError, match="overwrite"):
        write_comparison([folder, other], path)
    write_comparison([folder, other], path, overwrite=True)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, folder):
    other = make_run(tmp_path / "tiny", arms=("sgd",))
    assert list(named_runs([folder, other])) == [str(folder), str(other)]


def test_a_comparison_needs_two_runs(tmp_path, folder):
    for folders in ([], [folder], [folder, folder]):
        with pytest.raises(ArgumentError, match="two or more different runs"):
            write_comparison(folders, tmp_path / "compare.html")
