"""The sentences say what was measured, either way."""

import numpy as np
import pytest

from polyak.reference_run.flatness import ERROR, LOSS, SHORT, Landscape
from polyak.report import sentences
from polyak.report.tables import IMAGES, Finals
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
        (
            Estimate(0.575, 1e-15, 2),
            "SWA is 0.58 points above SGD in each of 2 seeds, which shows no spread",
        ),
        (Estimate(1e-16, 0.0, 2), "SWA and SGD are the same in each of 2 seeds"),
        (Estimate(-0.57, 0.0003, 5), "0.57 points below SGD (95% interval 0.57 to 0.57, 5 seeds)"),
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


def test_the_lowest_of_the_table_is_compared_as_all_is():
    below, above, within = (
        sentences.describe_table(finals(error)) for error in (13.0, 14.0, 13.705)
    )
    assert below.startswith(
        "Lowest test error: SWA arm, SWA, 13.03%; it is 0.68 points below SGD (95%"
    )
    assert above.startswith(
        "Lowest test error: SGD, 13.71%; the lowest average (SWA arm, SWA) is 0.32 points above SGD"
    )
    assert "no difference found between the lowest average (SWA arm, SWA) and SGD" in within


def land(loss, error, segments=None):
    t = np.array([0.0, 0.5, 1.0])
    line = Line(t, 2.0, {LOSS: np.array(loss), ERROR: np.array(error)})
    empty = np.empty((0, 2))
    return Landscape("swa", SHORT, line, {}, [30, 31, 32], segments, None, empty, (0, 0, 0.5))


def test_line():
    helped = sentences.describe_line(land([0.1, 0.2, 0.3], [14.0, 13.8, 13.5]))
    assert "lowest at 0.00, test error at 1.00 (0 is SGD, 1 is SWA): farther towards SWA" in helped
    assert "SWA is 0.5 points below SGD in a single seed, which shows no spread" in helped
    hurt = sentences.describe_line(land([0.1, 0.2, 0.3], [13.0, 13.2, 13.5]))
    assert "not farther towards SWA" in hurt
    assert "SWA is 0.5 points above SGD in a single seed, which shows no spread" in hurt


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
    assert "the rise from SWA is 0.200 nats below that from SGD in a single seed" in flat
    assert "the high rate" in flat
    assert "the high rate" not in sentences.describe_rays(rays(SGD=0.4, last_iterate=0.41, SWA=0.2))
    steep = sentences.describe_rays(rays(SGD=0.2, last_iterate=0.2, SWA=0.3))
    assert "the rise from SWA is 0.100 nats above that from SGD in a single seed" in steep
    assert "the high rate" not in steep


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


@pytest.mark.parametrize(("average", "said"), [(0.1, "inside"), (0.9, "no lower than they are")])
def test_plane(average, said):
    around = segments([0.5, 0.5, 0.6], [0.6, 0.5, 0.4])
    text = sentences.describe_plane(land([0.1, 0.2, average], [0.1, 0.2, average], around), around)
    assert said in text
    assert f"than {3 if average < 0.5 else 0} of the 3 weights" in text
    assert "0.50 away" in text


@pytest.mark.parametrize(
    ("swa", "said"),
    [
        ((13.0, 13.1, 13.3), "the average is 0.57 points below SGD (95% interval 0.42 to 0.71, 3 seeds)."),
        ((13.0, 13.9, 13.3), "no difference found between the average and SGD (0.30 points below on average, ± "),
        ((13.6, 13.7, 13.8), "the average is 0.00 points below SGD"),
        ((13.7,), "the average is 0.10 points above SGD in a single seed, which shows no spread."),
    ],
)  # fmt: skip
def test_history(swa, said):
    sgd, iterate = (13.6, 13.7, 13.8), (15.2, 15.4, 15.1)
    sgd = (13.5, 13.7, 13.9) if swa == sgd else sgd
    rows = {("sgd", "iterate"): sgd, ("swa", "iterate"): iterate, ("swa", "swa"): swa}
    last = {row: dict(enumerate(values[: len(swa)])) for row, values in rows.items()}
    told = sentences.describe_history(last, IMAGES.metrics[0], "error")
    if "0.00" in said:
        assert "no difference found between the average and SGD" in told
    else:
        assert said in told
    assert " below SGD's" not in told


def test_a_schedule_that_warms_up_is_no_cycle():
    rates = {"sgd": sentences.Rates(0.1, 0.001, 2), "swa": sentences.Rates(0.05, 0.05)}
    rates["cyclic"] = sentences.Rates(0.05, 0.01, 1)
    assert sentences.describe_schedule(rates, {"swa": 9, "cyclic": 4}) == (
        "SGD warms up to 0.1 in 2 epochs, then falls down to 0.001; the SWA arm stays at 0.05 and averages 9 sets of "
        "weights; the cyclic arm warms up to 0.05 in 1 epoch, then cycles down to 0.01 and averages 4 sets of weights."
    )
