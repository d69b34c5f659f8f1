"""Paired differences over seeds, and Student's t against published quantiles."""

import math
import statistics

import pytest

from polyak.errors import ArgumentError
from polyak.study.paired import Estimate, estimate, paired, t_quantile

# Two-sided 95% and 99% (Abramowitz and Stegun, table 26.10).
TABLE = [
    (1, 12.706, 63.657),
    (2, 4.303, 9.925),
    (3, 3.182, 5.841),
    (4, 2.776, 4.604),
    (5, 2.571, 4.032),
    (10, 2.228, 3.169),
    (30, 2.042, 2.750),
    (120, 1.980, 2.617),
]


@pytest.mark.parametrize(("freedom", "at_95", "at_99"), TABLE)
def test_quantiles(freedom, at_95, at_99):
    assert t_quantile(0.975, freedom) == pytest.approx(at_95, abs=5.1e-4)
    assert t_quantile(0.995, freedom) == pytest.approx(at_99, abs=5.1e-4)


def test_estimate_is_that_of_the_standard_library():
    values = [13.7, 13.5, 14.1, 13.2, 13.9]
    got = estimate(values)
    assert got.mean == pytest.approx(statistics.mean(values))
    assert got.error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert got.half_width() == pytest.approx(2.7764451 * got.error)


def test_what_pairs_have_in_common_cancels():
    got = paired([11.0, 22.1, 32.9], [10.0, 21.0, 32.0])
    assert got.mean == pytest.approx(1.0)
    assert got.error == pytest.approx(0.1 / math.sqrt(3))
    assert got.sign == 1


def test_sign_needs_the_whole_interval_on_one_side():
    assert Estimate(-1.0, 0.1, 5).sign == -1
    assert Estimate(-1.0, 0.5, 5).sign == 0
    assert Estimate(-1.0, None, 1).sign == 0


def test_one_seed_has_no_spread():
    assert estimate([3.0]).half_width() is None


def test_seeds_that_all_agree_show_no_spread_either():
    got = paired([17.375, 17.975, 0.575], [16.8, 17.4, 0.0])  # floats differ in the sixteenth digit
    assert got.half_width() is None
    assert got.sign == 0
    assert paired([1.0, 2.0], [0.9, 1.9 + 1e-6]).half_width() > 0


def test_bad_input():
    with pytest.raises(ArgumentError, match="no values"):
        estimate([])
    with pytest.raises(ArgumentError, match="2 values and 1"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(ArgumentError, match="freedom"):
        t_quantile(0.975, 0)
