"""Which stored weights make up a profile."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.trajectory import centred_weights

from polyak.errors import ArgumentError
from polyak.maths.pieces import effective_samples, piece_weights
from polyak.maths.profiles import EMA, SWA, After, Annealed, PolynomialEMA, PowerEMA, Window

PROFILES = [
    SWA(), EMA(0.99), EMA(0.9, keep_initial=True), PowerEMA(6.94), PolynomialEMA(1, 0.5), Window(1000), Annealed.from_shape("cosine"),
    After(0, SWA()),
]  # fmt: skip

steps_lists = st.lists(st.integers(0, 10**6), min_size=1, max_size=12, unique=True).map(sorted)


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
@given(steps=steps_lists)
def test_sums_to_one_and_nothing_is_negative(profile, steps):
    if isinstance(profile, After) and steps[-1] == 0:
        return
    weights = piece_weights(profile, steps)
    assert abs(weights.sum() - 1) < 1e-12
    assert (weights >= 0).all()


@given(steps=steps_lists, length=st.integers(1, 10**5))
def test_equals_the_mass_of_every_interval(steps, length):
    profile = Window(length)
    if len(steps) == 1:
        return
    first = steps[0] - (steps[1] - steps[0])
    borders = np.array([first, *steps]) - first
    expected = [
        profile.mass(b, borders[-1]) - profile.mass(a, borders[-1])
        for a, b in itertools.pairwise(borders)
    ]
    np.testing.assert_allclose(piece_weights(profile, steps), expected, atol=1e-12)


@pytest.mark.parametrize(
    "profile", [EMA(0.9), EMA(0.999), EMA(0.9, keep_initial=True), PowerEMA(6.94), PowerEMA(-0.5)]
)
@pytest.mark.parametrize("steps", [[100, 200, 300], [3, 5, 70, 71, 500], [1000, 1001]])
def test_a_centred_snapshot_stands_for_the_time_around_it(profile, steps):
    assert profile.centred
    np.testing.assert_allclose(
        piece_weights(profile, steps), centred_weights(profile, steps), atol=1e-5
    )


def test_which_profiles_are_centred():
    kinds = {type(p).__name__: p.innermost.centred and p.streaming for p in PROFILES}
    assert kinds == {
        "SWA": False, "EMA": True, "PowerEMA": True, "PolynomialEMA": True, "Window": False,
        "Annealed": False, "After": False,
    }  # fmt: skip


def test_known_values():
    assert piece_weights(SWA(), [5, 17, 1000]).tolist() == [1 / 3] * 3  # files count equally
    tail = piece_weights(Window(10_000), range(1000, 21_000, 1000))
    np.testing.assert_allclose(tail, [0.0] * 10 + [0.1] * 10)
    np.testing.assert_allclose(piece_weights(Window(3), [1, 2, 4, 8]), [0, 0, 0, 1])
    np.testing.assert_allclose(piece_weights(Window(6), [1, 2, 4, 8]), [0, 0, 2 / 6, 4 / 6])
    # Annealing along 1 - sqrt in five equal pieces: the mean of sqrt over each piece falls likewise.
    found = piece_weights(Annealed.from_shape("sqrt"), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(found, np.diff(np.sqrt(np.arange(6) / 5)))
    # A linear decay is the plain mean of evenly spaced weights, wherever they begin.
    np.testing.assert_allclose(
        piece_weights(Annealed.from_shape("linear"), [700, 800, 900]), [1 / 3] * 3
    )


def test_a_longer_stretch_counts_more():
    assert piece_weights(PowerEMA(0), [100, 200, 400]).tolist() == [0.375, 0.375, 0.25]
    found = piece_weights(Annealed.from_shape("linear"), [100, 200, 400])
    np.testing.assert_allclose(found, [0.25, 0.25, 0.5])


def test_one_file():
    for profile in (SWA(), EMA(0.5), Window(3), Annealed.from_shape("linear")):
        assert piece_weights(profile, [500]).tolist() == [1.0]


def test_a_start_is_a_training_step():
    assert piece_weights(After(250, SWA()), [100, 200, 300, 400]).tolist() == [0, 0, 0.5, 0.5]
    found = piece_weights(After(200, Annealed.from_shape("linear")), [100, 200, 300, 400])
    np.testing.assert_allclose(found, [0, 0, 0.5, 0.5])
    found = piece_weights(After(200, PowerEMA(0)), [100, 200, 300, 400])
    np.testing.assert_allclose(found, [0, 0, 0.75, 0.25])
    with pytest.raises(ArgumentError, match="starts at step 500"):
        piece_weights(After(500, EMA(0.9)), [100, 400])


@pytest.mark.parametrize("steps", [[], [2, 1], [1, 1], [float("nan")], [[1, 2]]])
def test_bad_steps(steps):
    with pytest.raises(ArgumentError, match="steps"):
        piece_weights(SWA(), steps)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20))
def test_effective_samples_is_what_the_noise_says(weights):
    w = np.array(weights)
    assert 1 - 1e-9 <= effective_samples(w) <= len(w) + 1e-9
    assert effective_samples(w) == pytest.approx((w.sum() ** 2) / (w**2).sum())
    with pytest.raises(ArgumentError):
        effective_samples([0.0])
