"""The planned error of an average made of recorded intervals."""

import itertools

import numpy as np
import pytest
from reference.trajectory import planned_error as obvious_error

from polyak.maths.planning import (
    Span,
    effective_captures,
    interval_weights,
    planned_error,
    smallest_resolved_age,
)
from polyak.maths.profiles import EMA, SWA, After, Annealed, PowerEMA, Window

PROFILES = [
    SWA(), EMA(0.9), EMA(0.97, keep_initial=True), PowerEMA(6.94), Window(25), Annealed.from_shape("cosine"),
    Annealed.from_shape("sqrt"), After(20, SWA()), After(15, EMA(0.9)),
]  # fmt: skip
UNEVEN = [Span(0, 30, 6), Span(30, 40, 2), Span(40, 70, 3), Span(70, 100, 1)]


def even(count, captures=20, length=1000.0):
    edges = np.linspace(0, length, count + 1).tolist()
    return [Span(a, b, captures) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
@pytest.mark.parametrize("until", [100, 70, 55.5])
def test_masses_sum_to_1_and_the_error_is_that_of_the_obvious_sum(profile, until):
    spans = [span for span in UNEVEN if span.start < until]
    weights = interval_weights(profile, spans, until)
    assert abs(weights.sum() - 1) < 1e-12
    assert (weights >= 0).all()
    found = planned_error(profile, spans, weights.tolist(), until)
    triples = [(span.start, span.end, span.captures) for span in spans]
    expected = obvious_error(profile, triples, weights.tolist(), until)
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("age", "count", "expected"),
    [(0.03, 32, 0.094), (0.03, 64, 0.025), (0.1, 16, 0.035), (0.1, 64, 0.0022), (0.3, 8, 0.017)],
)
def test_the_planned_errors_of_the_experiments(age, count, expected):
    # shared/field/trajectory.md, section 2: intervals of which every step is in the mean.
    spans = even(count, captures=58)
    profile = EMA(decay=np.exp(-1 / (age * 1000)).item())
    weights = interval_weights(profile, spans, 1000).tolist()
    assert planned_error(profile, spans, weights, 1000) == pytest.approx(expected, rel=0.45)


def test_few_captures_cost_more_and_a_window_on_edges_costs_only_that():
    profile = Window(250)
    errors = [
        planned_error(profile, s, interval_weights(profile, s, 1000).tolist(), 1000)
        for s in (even(64, 1), even(64, 5), even(64, 20), even(64, 64))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < 0.02 < errors[0]


def test_emas_below_three_percent_are_not_resolved_by_64_intervals():
    assert smallest_resolved_age(even(64), 1000) == pytest.approx(30, rel=0.15)
    assert smallest_resolved_age(even(1), 1000) > 500


def test_effective_samples_count_captures():
    spans = even(4, captures=5)
    assert effective_captures(spans, [0.25] * 4) == pytest.approx(20)
    assert effective_captures(spans, [0, 0, 0, 1.0]) == pytest.approx(5)
    assert spans[0].mean_time == pytest.approx(125)
