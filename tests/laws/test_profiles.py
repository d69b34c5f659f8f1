"""What holds for every profile. A new profile is one line in TABLE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import profiles as twin

from polyak.errors import ArgumentError
from polyak.maths.profiles import (
    EMA,
    SWA,
    After,
    Annealed,
    PolynomialEMA,
    PowerEMA,
    Profile,
    Window,
)

# The profile, and what it averages from one tensor a step, as its source computes it.
TABLE: list[tuple[Profile, Callable[[list[float]], float]]] = [
    (SWA(), twin.swa),
    (EMA(0.9), lambda w: twin.ema_debiased(w, 0.9)),
    (EMA.from_half_life(5.0), lambda w: twin.ema_debiased(w, 0.5 ** (1 / 5))),
    (EMA(0.9, keep_initial=True), lambda w: twin.ema_as_torch(w, 0.9)),
    (PowerEMA(gamma=6.94), lambda w: twin.power_ema(w, 6.94)),
    (PowerEMA(gamma=-0.5), lambda w: twin.power_ema(w, -0.5)),
    (PolynomialEMA(c=1, k=0.5), lambda w: twin.polynomial_ema(w, 1, 0.5)),
    (PolynomialEMA(c=0.02, k=0), lambda w: twin.polynomial_ema(w, 0.02, 0)),
    (PolynomialEMA(c=3, k=0.95), lambda w: twin.polynomial_ema(w, 3, 0.95)),
    (Window(length=7), lambda w: twin.window(w, 7)),
    (Window(length=1000), lambda w: twin.window(w, 1000)),
    (Annealed.from_shape("linear"), twin.swa),
    (Annealed.from_shape("cosine"), twin.annealed_cosine),
    (Annealed.from_shape("sqrt"), twin.annealed_sqrt),
    (After(4, SWA()), lambda w: twin.swa(w[4:])),
    (After(4, EMA(0.9)), lambda w: twin.ema_debiased(w[4:], 0.9)),
    (After(4, PowerEMA(gamma=2)), lambda w: twin.power_ema(w[4:], 2)),
    (After(4, PolynomialEMA(c=1, k=0.5)), lambda w: twin.polynomial_ema(w[4:], 1, 0.5)),
    (After(4, Window(length=7)), lambda w: twin.window(w[4:], 7)),
    (After(3, After(1, SWA())), lambda w: twin.swa(w[4:])),
]
PROFILES = [pytest.param(profile, id=repr(profile)) for profile, _ in TABLE]
every_profile = pytest.mark.parametrize("profile", PROFILES)
streaming_profiles = pytest.mark.parametrize(
    "profile", [pytest.param(p, id=repr(p)) for p, _ in TABLE if p.streaming]
)

increasing_times = st.lists(st.floats(0.01, 10), min_size=1, max_size=12).map(
    lambda steps: (4.0 + np.cumsum(steps)).tolist()
)


def first_time(profile: Profile) -> int:
    """Time counts from the first weights where they are kept, otherwise from one step before."""
    return 0 if profile.initial_mass(1) else 1


def running(profile: Profile, times: list[float], weights: list[float]) -> float:
    """`average += share * (weights - average)`, the first with share 1."""
    average, before = weights[0], times[0]
    for time, w in zip(times[1:], weights[1:], strict=True):
        average += profile.share(time, time - before) * (w - average)
        before = time
    return average


@pytest.mark.parametrize(("profile", "average"), [pytest.param(p, f, id=repr(p)) for p, f in TABLE])
@pytest.mark.parametrize("n", [5, 6, 30, 200])
def test_weights_are_those_of_the_source(profile, average, n):
    values = np.random.default_rng(0).normal(size=n).tolist()
    times = list(range(first_time(profile), n + first_time(profile)))
    assert profile.weights(times) @ values == pytest.approx(average(values), abs=1e-12)


@every_profile
@given(times=increasing_times)
def test_mass_sums_to_one(profile, times):
    now = times[-1]
    assert profile.mass(now, now) == pytest.approx(1, abs=1e-12)
    assert profile.mass(0.0, now) == pytest.approx(profile.initial_mass(now), abs=1e-12)
    pieces = [0.0, *times]
    total = sum(profile.interval_mass(a, b, now) for a, b in itertools.pairwise(pieces))
    assert total + profile.initial_mass(now) == pytest.approx(1, abs=1e-12)
    assert profile.weights(times).sum() == pytest.approx(1, abs=1e-12)
    assert (profile.weights(times) >= 0).all()


@every_profile
@given(times=increasing_times)
def test_mass_never_falls(profile, times):
    masses = [profile.mass(x, times[-1]) for x in [0.0, *times]]
    assert all(a <= b + 1e-15 for a, b in itertools.pairwise(masses))


@every_profile
@given(times=increasing_times)
def test_interval_mass_is_the_difference_of_masses(profile, times):
    now = times[-1]
    for a, b in zip([0.0, *times], times, strict=False):
        difference = profile.mass(b, now) - profile.mass(a, now)
        assert profile.interval_mass(a, b, now) == pytest.approx(difference, abs=1e-12)


@every_profile
@given(times=increasing_times)
def test_share_is_what_the_newest_hold(profile, times):
    now = times[-1]
    dt = now - times[-2] if len(times) > 1 else now - 4
    assert profile.share(now, dt) == pytest.approx(1 - profile.mass(now - dt, now), abs=1e-12)


@streaming_profiles
@given(times=increasing_times)
def test_shares_reproduce_the_profile(profile, times):
    values = np.random.default_rng(len(times)).normal(size=len(times)).tolist()
    expected = profile.weights(times) @ values
    assert running(profile, times, values) == pytest.approx(expected, abs=1e-12)


@streaming_profiles
@given(times=increasing_times, part=st.floats(0.05, 0.95))
def test_splitting_a_step_changes_nothing(profile, times, part):
    values = np.random.default_rng(len(times)).normal(size=len(times)).tolist()
    split_times, split_values = [times[0]], [values[0]]
    for before, time, value in zip(times, times[1:], values[1:], strict=False):
        split_times += [before + part * (time - before), time]
        split_values += [value, value]
    whole = running(profile, times, values)
    assert running(profile, split_times, split_values) == pytest.approx(whole, abs=1e-12)


@every_profile
@given(times=increasing_times, part=st.floats(0.05, 0.95))
def test_splitting_an_interval_splits_its_mass(profile, times, part):
    now, half = times[-1], part * times[-1]
    whole = profile.interval_mass(0.0, now, now)
    parts = profile.interval_mass(0.0, half, now) + profile.interval_mass(half, now, now)
    assert parts == pytest.approx(whole, abs=1e-12)


@every_profile
@pytest.mark.parametrize("now", [5.0, 40.0])
def test_mean_age_is_the_integral_of_the_mass(profile, now):
    n = 100_000
    midpoints = (np.arange(n) + 0.5) * (now / n)
    brute = sum(profile.mass(x, now) for x in midpoints.tolist()) * now / n
    assert profile.mean_age(now) == pytest.approx(brute, rel=2e-6)


@every_profile
@pytest.mark.parametrize("now", [5.0, 40.0])
def test_half_of_the_average_is_older_than_the_half_life(profile, now):
    age = profile.half_life(now)
    if profile.initial_mass(now) > 0.5:
        assert age == now
    else:
        assert profile.mass(now - age, now) == pytest.approx(0.5, abs=1e-9)


@every_profile
def test_effective_samples_against_noise(profile):
    times = list(range(first_time(profile), 60))
    noise = np.random.default_rng(1).normal(size=(len(times), 20_000))
    variance = (profile.weights(times) @ noise).var()
    assert profile.effective_samples(times) == pytest.approx(1 / variance, rel=0.05)


@every_profile
def test_later_the_shares_are_those_among_what_was_seen(profile):
    times = list(range(first_time(profile), 50))
    later = profile.weights(times, now=52.0)
    assert later.sum() == pytest.approx(1, abs=1e-12)
    if profile.streaming:  # nothing entered, so the running average is what it was
        np.testing.assert_allclose(later, profile.weights(times), atol=1e-13)


@streaming_profiles
def test_the_share_holds_for_tensors_on_a_device(profile):
    for now, dt in [(1.0, 1.0), (4.0, 1.0), (4.5, 1.0), (9.0, 2.5), (1e6, 1.0), (1e6, 1e3)]:
        expected = profile.share(now, dt)
        on_device = profile.share(
            torch.tensor(now, dtype=torch.float64), torch.tensor(dt, dtype=torch.float64)
        )
        assert on_device.dtype == torch.float64
        assert on_device.shape == ()
        assert on_device.item() == pytest.approx(expected, rel=1e-14, abs=1e-300)
        assert float(profile.share(torch.tensor(now, dtype=torch.float64), dt)) == pytest.approx(
            expected, rel=1e-14, abs=1e-300
        )


@every_profile
def test_masses_hold_for_arrays_and_tensors(profile):
    for x, now in [(2.0, 9.0), (7.5, 9.0), (9.0, 9.0)]:
        expected = profile.mass(x, now)
        if not isinstance(getattr(profile, "profile", profile), Annealed):  # its curve is of floats
            as_array = profile.mass(np.array([x]), now)
            assert as_array[0] == pytest.approx(expected, rel=1e-14, abs=1e-300)
        as_tensor = profile.mass(torch.tensor(x, dtype=torch.float64), now)
        assert float(as_tensor) == pytest.approx(expected, rel=1e-14, abs=1e-300)


@every_profile
def test_times_that_do_not_increase_are_refused(profile):
    for times, message in [
        ([], "list of times"),
        ([5, 5], "must increase"),
        ([6, 5], "must increase"),
        ([-1, 5], "at least 0"),
        ([1, math.nan], "finite"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            profile.weights(times)
    with pytest.raises(ArgumentError, match="after it"):
        profile.weights([5, 6], now=5)


@every_profile
def test_a_profile_is_a_value(profile):
    assert profile == eval(repr(profile))
    assert hash(profile) == hash(eval(repr(profile)))
