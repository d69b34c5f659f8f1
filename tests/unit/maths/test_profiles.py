"""Known values, domains, and what only some profiles have."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from reference import profiles as twin

from polyak.errors import ArgumentError
from polyak.maths.profiles import EMA, SWA, After, Annealed, PolynomialEMA, PowerEMA, Window


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_gammas_of_edm2(std, gamma):
    assert PowerEMA.from_relative_std(std).gamma == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("std", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.28, 0.2886])
def test_relative_std_round_trip(std):
    assert PowerEMA.from_relative_std(std).relative_std == pytest.approx(std, rel=1e-9)


def test_relative_std_is_that_of_the_profile():
    profile, now = PowerEMA.from_relative_std(0.1), 1000
    times = np.arange(1, now + 1)
    weights = profile.weights(times) @ np.stack([times, times**2.0], axis=1)
    assert math.sqrt(weights[1] - weights[0] ** 2) / now == pytest.approx(0.1, rel=1e-3)


def test_a_half_life_halves():
    profile = EMA.from_half_life(500)
    weights = profile.weights(range(1, 5001))
    assert weights[-501] / weights[-1] == pytest.approx(0.5, rel=1e-12)
    assert profile.half_life(1e7) == pytest.approx(500, rel=1e-9)


def test_every_k_steps_keeps_the_horizon():
    every, tenth = EMA(0.99), EMA(0.99)
    one_by_one = every.weights(range(1, 1001)).reshape(-1, 10).sum(axis=1)
    np.testing.assert_allclose(tenth.weights(range(10, 1001, 10)), one_by_one, rtol=1e-12)


def test_equal_steps_have_equal_shares_in_swa():
    assert [SWA().share(n, 1) for n in (1, 2, 3)] == [1, 1 / 2, 1 / 3]
    np.testing.assert_array_equal(SWA().weights(range(100, 1001, 100)), np.full(10, 0.1))


def test_digits_do_not_cancel():
    # 1 - F(now - dt, now) would lose eight digits here.
    assert EMA.from_half_life(1e8).share(1e10, 1) == pytest.approx(math.log(2) / 1e8, rel=1e-7)
    assert PowerEMA(gamma=3).share(1e12, 1) == pytest.approx(4e-12, rel=1e-11)
    assert PowerEMA(gamma=3).interval_mass(5e11, 5e11 + 1, 1e12) == pytest.approx(5e-13, rel=1e-10)


@pytest.mark.parametrize("now", [1e-3, 1.0, 100.0, 1440.0, 1445.0, 1e6])
def test_the_mean_age_of_a_young_ema(now):
    profile = EMA.from_half_life(1e5)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    brute = weights @ [profile.mass(x, now) for x in (nodes + 1) * now / 2] * now / 2
    assert profile.mean_age(now) == pytest.approx(brute, rel=1e-11)


def test_before_its_start_nothing_enters():
    profile = After(100, SWA())
    assert [profile.share(t, 1) for t in (1, 99, 100)] == [0, 0, 0]
    assert [profile.share(t, 1) for t in (101, 102)] == [1, 0.5]
    assert profile.share(100.5, 1) == 1  # of a step that straddles the start, the part after it
    assert profile.start == 100
    with pytest.raises(ArgumentError, match="empty until 100"):
        profile.weights([50, 100])


TIMES = [1.0, 2.5, 3.0, 40.0, 1e6, 1e6 + 1]


@pytest.mark.parametrize("c", [1e-3, 1.0, 7.94])
def test_polynomial_average_runs_from_exponential_to_power(c):
    pairs = [(0.0, EMA(math.exp(-c)), 1e-11)]
    pairs += [
        (1 - gap, PowerEMA(c - 1), 100 * (1 + c) * gap + 1e-11) for gap in (1e-5, 1e-9, 2**-53)
    ]
    for k, other, limit in pairs:
        profile = PolynomialEMA(c, k)
        for before, now in itertools.pairwise(TIMES):
            for found, expected in (
                (profile.share(now, now - before), other.share(now, now - before)),
                (profile.mass(before, now), other.mass(before, now)),
                (profile.interval_mass(1.0, before, now), other.interval_mass(1.0, before, now)),
                (profile.mean_age(now), other.mean_age(now)),
            ):
                assert found == pytest.approx(expected, rel=limit, abs=limit / 100), k


def test_polynomial_average_keeps_its_digits_at_huge_times():
    # By hand: where dt is far below the horizon t^k / c, the share is dt c t^-k.
    assert PolynomialEMA(1, 0.5).share(1e12, 1) == pytest.approx(1e-6 - 0.5e-12, rel=1e-9)
    assert PolynomialEMA(2, 1 - 1e-12).share(1e15, 1) == pytest.approx(2e-15, rel=1e-9)
    assert PolynomialEMA(1, 0.5).mass(1e12 - 1e6, 1e12) == pytest.approx(math.exp(-1), rel=1e-6)
    assert PolynomialEMA(1, 0.5).mean_age(1e12) == pytest.approx(1e6, rel=1e-6)
    assert PolynomialEMA(1, 0.5).half_life(1e12) == pytest.approx(math.log(2) * 1e6, rel=1e-6)
    assert PolynomialEMA(1e12, 0).share(1e9, 1) == 1.0
    assert PolynomialEMA(1e-12, 0.5).share(2, 1) == pytest.approx(1 - math.sqrt(0.5), rel=1e-11)


@pytest.mark.parametrize("p", [0.55, 0.75, 0.9])
def test_polynomial_average_is_the_p_ema_in_the_long_run(p):
    profile = PolynomialEMA(c=1, k=p)
    gaps = [abs(profile.share(n, 1) * (n + 1) ** p - 1) for n in (100, 10_000, 1_000_000)]
    assert all(gap < n**-p for gap, n in zip(gaps, (100, 10_000, 1_000_000), strict=True))
    noise = np.random.default_rng(0).normal(size=20_000)
    walk = noise.cumsum() / 100 + noise
    ours = float(profile.weights(range(1, len(walk) + 1)) @ walk)
    # Beside the noise that is left in either, the square root of half the share.
    assert abs(ours - twin.p_ema(walk.tolist(), p)) < 0.02 * math.sqrt(profile.share(20_000, 1) / 2)


@pytest.mark.parametrize("inner", [SWA(), EMA(0.99), PowerEMA(3)])
def test_before_its_start_nothing_enters_on_a_device(inner):
    profile = After(100, inner)
    times = torch.tensor([0.0, 50.0, 100.0, 101.0], dtype=torch.float64)
    assert [float(profile.share(t, 1.0)) for t in times] == [0, 0, 0, 1]


def test_an_ema_that_keeps_the_first_weights_starts_with_them_alone():
    np.testing.assert_array_equal(EMA(0.9, keep_initial=True).weights([0]), [1.0])
    with pytest.raises(ArgumentError, match="empty"):
        EMA(0.9).weights([0])


def test_the_innermost_profile():
    assert After(5, After(3, SWA())).innermost == SWA().innermost == SWA()


def test_a_window_that_has_moved_on_holds_nothing():
    with pytest.raises(ArgumentError, match="None of the weights taken"):
        Window(5).weights([1, 2, 3], now=20)


def test_linear_annealing_is_the_plain_mean():
    np.testing.assert_allclose(
        Annealed.from_shape("linear").weights(range(1, 9)), np.full(8, 1 / 8), rtol=1e-12
    )


def test_one_s_own_curve():
    profile = Annealed(curve=quadratic)
    np.testing.assert_allclose(profile.weights([1, 2]), [0.25, 0.75])
    assert profile.mean_age(3) == pytest.approx(3 * (1 - 2 / 3), rel=1e-12)
    assert "quadratic" in repr(profile)
    assert "0x" not in repr(profile)


def quadratic(u: float) -> float:
    return 1 - u * u


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(0.0), "0 < decay < 1"),
        (lambda: EMA(1.0), "0 < decay < 1"),
        (lambda: EMA(500), "from_half_life"),
        (lambda: EMA(math.nan), "decay"),
        (lambda: EMA.from_half_life(0), "half-life"),
        (lambda: EMA.from_half_life(-3), "half-life"),
        (lambda: EMA.from_half_life(math.inf), "half-life"),
        (lambda: PowerEMA(-1), "gamma > -1"),
        (lambda: PolynomialEMA(1, 1), r"k = 1 is PowerEMA\(gamma=c - 1\)"),
        (lambda: PolynomialEMA(1, -0.1), "0 <= k < 1"),
        (lambda: PolynomialEMA(1, math.nan), "0 <= k < 1"),
        (lambda: PolynomialEMA(0, 0.5), "from 1e-12 to 1e12"),
        (lambda: PolynomialEMA(math.inf, 0.5), "from 1e-12 to 1e12"),
        (lambda: PowerEMA(math.inf), "finite"),
        (lambda: PowerEMA.from_relative_std(0), r"0 < std < 0\.2887"),
        (lambda: PowerEMA.from_relative_std(0.2887), r"0 < std < 0\.2887"),
        (lambda: Window(0), "positive"),
        (lambda: Window(math.inf), "finite"),
        (lambda: Annealed.from_shape("exponential"), "cosine, linear, sqrt"),
        (lambda: Annealed(lambda u: 1 - u / 2), "exactly 0 at 1"),
        (lambda: Annealed(lambda u: math.exp(-u)), "exactly 0 at 1"),
        (lambda: Annealed(lambda u: (1 - u) * (1 + 9 * u)), "rises"),
        (lambda: After(-1, SWA()), "0 or later"),
        (lambda: After(5, EMA(0.9, keep_initial=True)), "which weights are the first"),
    ],
)
def test_domains(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
