"""The three questions to a run's record, on its page: every sentence is true of the numbers."""

import re
import shutil

import pytest
from reference.tiny_run import make_run, write_record

from polyak.reference_run.run import Run
from polyak.report.page import write_report
from polyak.report.questions import question_sections


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "batchnorm"])
def folder(request, tmp_path_factory):
    """A run whose swa arm has the record of a walk from its initial weights."""
    folder = make_run(
        tmp_path_factory.mktemp("runs") / "tiny",
        arms=("sgd", "swa"),
        batchnorm=request.param,
        branch_at=0.75,
    )
    write_record(folder)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


def test_the_record_answers_three_questions_in_sentences_that_hold(folder, page):
    run = Run(folder)
    record = run.trajectory(0, "swa")
    page = re.sub(r"\s+", " ", page)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert {
        "Which average is best",
        "What if I had decayed from here",
        "When could I have stopped",
    } < {*headings}
    assert f"all steps after epoch {run.recipe.swa_epoch}" in page
    which, decay, stop = (re.sub(r"\s+", " ", part.sentence) for part in question_sections(run))
    assert f"holds the mean of each of {len(record.intervals)} intervals" in which
    n = len(run.data.validation)
    assert f"Chosen on {n // 2} examples, compared on {n - n // 2} others." in which
    begin, end = map(float, re.search(r"from ([\d,.]+) to ([\d,.]+) steps, score", which).groups())
    assert 0 <= begin < end <= record.end
    for other in ("SWA", "EMA", "the last iterate"):
        said = re.search(rf"Minus {other}: (\S+) \((\S+) to ([^ ,)]+)(, within noise)?\)", which)
        middle, low, high = (float(number.replace("−", "-")) for number in said.groups()[:3])
        assert low <= middle <= high
        assert bool(said[4]) == (low <= 0 <= high)
    assert f"from epoch {run.recipe.constant_until * run.recipe.epochs:g} on" in decay
    until = float(re.search(r"ends at ([\d,.]+) steps", stop)[1])
    assert f"{until / record.end:.0%} of the run" in stop
    assert which.split("'")[0] in page


def test_without_a_record_there_are_no_questions_and_a_damaged_one_is_said(folder, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    for path in (copied / "record" / "seed-0" / "swa").glob("interval-*"):
        path.write_bytes(b"nothing")
    (said,) = question_sections(Run(copied))
    assert said.sentence.startswith("Nothing: ")
    shutil.rmtree(copied / "record")
    assert question_sections(Run(copied)) == []
