"""The sentences say what was measured, either way."""

import numpy as np
import pytest

from polyak.reference_run.flatness import ERROR, LOSS, SHORT, Landscape
from polyak.report import sentences
from polyak.report.tables import Finals
from polyak.study.landscape import Line, Rays, Segments
from polyak.study.paired import Estimate


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Estimate(-0.5, 0.05, 5), "0.50 points below SGD (95% interval 0.36 to 0.64"),
        (Estimate(0.5, 0.05, 5), "0.50 points above SGD (95% interval"),
        (
            Estimate(-0.5, 0.5, 5),
            "no difference found between SWA and SGD (0.50 points below on average, ± 1.39 at 95%",
        ),
        (Estimate(-0.5, None, 1), "a single seed, which shows no spread"),
        (None, "no seed has both SWA and SGD"),
    ],
)
def test_a_difference_claims_no_more_than_its_interval(value, said):
    assert said in sentences.difference("SWA", "SGD", value, "points", 2)


def finals(swa_error):
    base = {"nll": 0.5, "nll_scaled": 0.4, "ece": 5.0}
    rows = {("sgd", "iterate"): 13.7, ("swa", "iterate"): 15.2, ("swa", "swa"): swa_error}
    return Finals(
        {"arm": arm, "weights": weights, "seed": seed, "error": error + 0.01 * seed * (1 + i), **base}
        for i, ((arm, weights), error) in enumerate(rows.items())
        for seed in range(3)
    )  # fmt: skip


def test_where_averaging_did_not_help_the_table_s_sentence_says_so():
    assert "No average beat annealed SGD" in sentences.describe_table(finals(14.0))
    assert "No average" not in sentences.describe_table(finals(13.0))


def land(loss, error, segments=None):
    t = np.array([0.0, 0.5, 1.0])
    line = Line(t, 2.0, {LOSS: np.array(loss), ERROR: np.array(error)})
    empty = np.empty((0, 2))
    return Landscape("swa", SHORT, line, {}, [30, 31, 32], segments, None, empty, (0, 0, 0.5))


def test_line():
    helped = sentences.describe_line(land([0.1, 0.2, 0.3], [14.0, 13.8, 13.5]))
    assert "lowest at 0.00, test error at 1.00 (0 is SGD" in helped
    assert "farther towards SWA" in helped
    hurt = sentences.describe_line(land([0.1, 0.2, 0.3], [13.0, 13.2, 13.5]))
    assert "averaging did not help" in hurt


def rays(**rises):
    return {
        name.replace("_", " "): Rays(
            np.array([0.0, 4.0]), {LOSS: np.array([[0.1, 0.1 + rise], [0.1, 0.1 + rise]])}
        )
        for name, rise in rises.items()
    }


def test_rays():
    flat = sentences.describe_rays(rays(SGD=0.4, last_iterate=0.39, SWA=0.2))
    assert "risen by 0.400 nats from SGD, 0.390 from the last iterate and 0.200 from SWA" in flat
    assert "flatter than SGD, by a factor of 2.0" in flat
    assert "last iterate: the high rate" not in flat
    assert "the high rate" in sentences.describe_rays(rays(SGD=0.4, last_iterate=0.21, SWA=0.2))
    assert "not flatter" in sentences.describe_rays(rays(SGD=0.2, last_iterate=0.2, SWA=0.3))


def segments(*rows):
    values = np.array(rows, float)
    return Segments(np.array([0.0, 0.5, 1.0]), np.ones(len(rows)), {LOSS: values, ERROR: values})


def test_segments():
    epochs = [30, 31, 32]
    assert "share one basin" in sentences.describe_segments(
        segments([1, 0.9, 1], [1, 0.8, 1]), epochs
    )
    low = sentences.describe_segments(segments([1, 1.01, 1], [1, 1.02, 1]), epochs)
    assert "0.0200 nats, between epochs 31 and 32, 2.0%" in low
    assert "one basin" in low
    assert "more than one basin" in sentences.describe_segments(
        segments([1, 1.5, 1], [1, 1, 1]), epochs
    )


@pytest.mark.parametrize(("average", "said"), [(0.1, "inside"), (0.9, "did not help")])
def test_plane(average, said):
    around = segments([0.5, 0.5, 0.6], [0.6, 0.5, 0.4])
    text = sentences.describe_plane(land([0.1, 0.2, average], [0.1, 0.2, average], around), around)
    assert said in text
    assert f"than {3 if average < 0.5 else 0} of the 3 weights" in text
    assert "0.50 away" in text


def test_history():
    last = {("sgd", "iterate"): 13.7, ("swa", "iterate"): 15.2, ("swa", "swa"): 13.9}
    said = sentences.describe_history(last, "%", 1, "error")
    assert "13.9%, below its own iterate (15.2%) and not below SGD's" in said
