"""SWAD and two-tailed averaging on a record, against twins that hold every interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import overfit_window as slow
from torch import nn

import polyak
from polyak.errors import ArgumentError, FormatError, NonFiniteError
from polyak.report import write_search

VALUES = np.concatenate(
    [np.linspace(8, 1, 60), 1 + 0.3 * np.sin(np.arange(60)), np.linspace(1, 9, 80)]
)


def record(folder, values=VALUES, interval=10):
    model = nn.Linear(1, 1, bias=False)
    with polyak.Recorder(model, folder, interval=interval, captures=interval) as recorder:
        for value in values:
            nn.init.constant_(model.weight, value)
            recorder.update()
    return polyak.Trajectory(folder)


@pytest.fixture
def trajectory(tmp_path):
    return record(tmp_path / "record")


def loss(state):
    return 0.5 + (state["weight"].double().item() - 1) ** 2


def loss_of(mean):
    return 0.5 + (mean - 1) ** 2


MEANS = VALUES.reshape(20, 10).mean(axis=1)


@pytest.mark.parametrize("rule", [(3, 6, 1.3), (2, 2, 1.1), (1, 1, 1.0), (3, 3, 50.0)])
def test_swad_s_window_of_a_record(trajectory, rule):
    n_start, n_end, tolerance = rule
    found = trajectory.swad(loss, minimize=True, n_start=n_start, n_end=n_end, tolerance=tolerance)
    begins, ends = slow.swad_window([loss_of(m) for m in MEANS], *rule)
    assert found.question == "swad"
    assert found.best.start == 10 * (begins - 1)
    assert found.best.until == 10 * (ends or 20)
    mean = trajectory.average(found.best.profile, found.best.until)["weight"].item()
    assert mean == pytest.approx(VALUES[10 * (begins - 1) : 10 * (ends or 20)].mean(), rel=1e-5)
    assert found.best.score == pytest.approx(loss_of(mean), rel=1e-5)
    assert ("had not ended" in str(found)) == (ends is None)
    assert "Chosen by the rule" in str(found)


def test_a_window_that_never_began(tmp_path):
    falling = record(tmp_path / "record", np.linspace(9, 2, 80))
    found = falling.swad(loss, minimize=True)
    assert (found.best.start, found.best.until) == (70, 80)
    assert "window never began" in str(found)


@pytest.mark.parametrize("points", [20, 10, 4])
def test_two_tails_of_a_record(trajectory, points):
    found = trajectory.two_tailed(loss, minimize=True, points=points)
    every = 20 // points
    begins = slow.two_tailed_begins(MEANS[:, None], every, lambda w: loss_of(float(w[0])))
    assert [one.start for one in found.answers] == [10 * b for b in begins]
    assert [one.until for one in found.answers] == [10 * every * (i + 1) for i in range(points)]
    assert found.best == found.answers[-1]
    assert len(set(begins)) > 1
    again = trajectory.two_tailed(loss, minimize=True, points=points)
    assert (again.evaluations, again.best) == (0, found.best)


def test_two_tails_of_an_accuracy(trajectory):
    found = trajectory.two_tailed(lambda state: -loss(state), maximize=True, points=10)
    same = trajectory.two_tailed(loss, minimize=True, points=10)
    assert (found.best.start, found.best.score) == (same.best.start, -same.best.score)


def test_what_the_rule_chose_is_compared_example_by_example(trajectory, tmp_path):
    def each(state):
        return loss(state) + 0.01 * torch.arange(20)

    for question in ("swad", "two_tailed"):
        found = getattr(trajectory, question)(each, minimize=True, name="each")
        assert len(found.comparisons) == 2
        assert all(one.low is not None for one in found.comparisons)
        page = write_search(found, tmp_path / f"{question}.html").read_text()
        assert "SWAD" in page if question == "swad" else "two-tailed" in page


def test_a_missing_interval_is_passed_over_unless_the_window_needs_it(trajectory):
    folder = trajectory.folder
    trajectory.intervals[2].path.unlink()
    found = polyak.Trajectory(folder).swad(loss, minimize=True)
    assert (found.best.start, found.best.until) == (90, 120)
    polyak.Trajectory(folder).intervals[9].path.unlink()  # that from 100 to 110
    with pytest.raises(FormatError, match="that the rule chooses cannot be made"):
        polyak.Trajectory(folder).swad(loss, minimize=True)


@pytest.mark.parametrize("question", ["swad", "two_tailed"])
def test_checkpoints_instead_of_a_record(tmp_path, question):
    for step, value in enumerate(MEANS, 1):
        torch.save({"weight": torch.full((1, 1), value)}, tmp_path / f"step-{step}.pt")
    run = polyak.Trajectory.from_checkpoints([tmp_path / "step-*.pt"])
    found = getattr(run, question)(loss, minimize=True, until=12)
    assert found.best.until == 12
    assert found.best.score == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("question", "how", "options", "error", "message"),
    [
        ("swad", loss, {"maximize": True}, ArgumentError, "SWAD needs a loss"),
        ("swad", loss, {"minimize": True, "n_end": 0}, ArgumentError, "n_end is 0"),
        ("swad", lambda s: -1.0, {"minimize": True}, ArgumentError, "are not positive"),
        ("swad", lambda s: float("nan"), {"minimize": True}, NonFiniteError, "has the score nan"),
        ("two_tailed", loss, {"minimize": True, "points": 0}, ArgumentError, "points is 0"),
        ("two_tailed", lambda s: float("nan"), {"minimize": True}, NonFiniteError, "has the score nan"),
        ("two_tailed", loss, {"minimize": True, "colour": 1}, ArgumentError, "There is no option colour"),
    ],
)  # fmt: skip
def test_what_is_refused(trajectory, question, how, options, error, message):
    with pytest.raises(error, match=message):
        getattr(trajectory, question)(how, **options)
