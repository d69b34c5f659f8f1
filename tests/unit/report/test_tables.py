"""Means, paired differences and pooled bins of a run's final records."""

import pytest

from polyak.report.tables import BASELINE, Finals, row_label


def record(arm, weights, seed, error, count=(1, 3)):
    bins = {"confidence": [0.2, 0.8], "accuracy": [0.1 * seed, 0.6], "count": list(count)}
    return {
        "arm": arm, "weights": weights, "seed": seed, "error": error, "reliability": bins,
    }  # fmt: skip


FINALS = Finals(
    [
        record("sgd", "iterate", 0, 10.0),
        record("sgd", "iterate", 1, 20.0),
        record("sgd", "iterate", 2, 99.0),  # the seed that the others did not reach
        record("swa", "swa", 0, 9.0),
        record("swa", "swa", 1, 18.5, count=(3, 5)),
    ]
)


def test_rows_stand_in_the_order_of_the_records():
    assert FINALS.rows == [BASELINE, ("swa", "swa")]
    assert FINALS.n_seeds == 3


def test_differences_pair_the_seeds_that_both_have():
    difference = FINALS.difference(("swa", "swa"), "error")
    assert (difference.mean, difference.n) == (pytest.approx(-1.25), 2)
    assert difference.error == pytest.approx(0.25)
    assert FINALS.difference(("swa", "swa"), "error", to=("swa", "ema")) is None


def test_bins_are_pooled_by_their_counts():
    pooled = FINALS.reliability(("swa", "swa"))
    assert pooled["count"] == [4, 8]
    assert pooled["accuracy"] == [pytest.approx((1 * 0.0 + 3 * 0.1) / 4), pytest.approx(0.6)]


def test_an_empty_bin_stays_empty():
    finals = Finals([record("sgd", "iterate", 0, 1.0, count=(0, 2))])
    assert finals.reliability(BASELINE)["accuracy"] == [0.0, pytest.approx(0.6)]


def test_labels():
    assert row_label(("swa", "ema")) == "SWA arm, EMA"
    assert row_label(("cyclic", "iterate")) == "cyclic arm, last iterate"
