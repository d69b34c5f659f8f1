"""Means, paired differences and pooled bins of a run's final records."""

import pytest

from polyak.maths.numbers import count, rounded
from polyak.report.tables import BASELINE, Finals, format_estimate, row_label
from polyak.study.paired import Estimate


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
    assert row_label(("half", "iterate")) == "SGD, half length"


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.125, 2, "0.13"),
        (-0.125, 2, "−0.13"),
        (2.675, 2, "2.68"),
        (17.375 - 16.8, 2, "0.58"),  # as floats a hair below
        (16.8 - 17.375, 2, "−0.58"),
        (0.5749, 2, "0.57"),
        (12.25, 1, "12.3"),
        (0.5, 0, "1"),
        (-0.004, 2, "0.00"),
        (1e-12, 3, "0.000"),
    ],
)
def test_numbers_are_rounded_half_away_from_zero(value, digits, shown):
    assert rounded(value, digits) == shown
    assert format_estimate(Estimate(value, None, 1), digits) == shown


@pytest.mark.parametrize(
    ("value", "signed", "shown"),
    [
        (Estimate(0.5, 0.0, 2), True, "+0.50"),
        (Estimate(0.5, 0.0, 2), False, "0.50"),
        (Estimate(0.5, 0.001, 5), True, "+0.50 ± <0.01"),
        (Estimate(0.5, 0.1, 3), False, "0.50 ± 0.10"),
    ],
)
def test_an_interval_is_never_of_no_width(value, signed, shown):
    assert format_estimate(value, 2, signed=signed) == shown


def test_counts_are_english():
    assert (count(1, "seed"), count(3, "seed"), count(0, "seed")) == (
        "1 seed",
        "3 seeds",
        "0 seeds",
    )
