"""Profiles as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak.errors import ArgumentError
from polyak.maths.profiles import EMA, SWA, After, Annealed, PolynomialEMA, PowerEMA, Window
from polyak.maths.schedules import Constant, Cosine, CyclicLinear, chain
from polyak.maths.text import EXAMPLES, format_profile, parse_profile, parse_schedule

plain = st.one_of(
    st.just(SWA()),
    st.builds(EMA, st.floats(1e-9, 1, exclude_max=True)),
    st.builds(EMA.from_half_life, st.floats(0.001, 1e12)),
    st.builds(PowerEMA, st.floats(-1, 1e6, exclude_min=True)),
    st.builds(PowerEMA.from_relative_std, st.floats(1e-4, 0.2886)),
    st.builds(PolynomialEMA, st.floats(1e-12, 1e12), st.floats(0, 1, exclude_max=True)),
    st.builds(Window, st.floats(1e-6, 1e15)),
    st.sampled_from(["linear", "cosine", "sqrt"]).map(Annealed.from_shape),
)


@given(plain)
def test_round_trip(profile):
    assert parse_profile(format_profile(profile)) == profile


@given(plain, st.floats(0, 1e12))
def test_round_trip_of_a_later_start(profile, start):
    assert parse_profile(format_profile(After(start, profile))) == After(start, profile)


def test_the_first_weights_kept():
    profile = EMA(0.999, keep_initial=True)
    assert format_profile(profile) == "ema:decay=0.999,keep_initial=true"
    assert parse_profile(format_profile(profile)) == profile


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_are_spelled_as_they_are_read(text):
    assert format_profile(parse_profile(text)) == text


def test_a_later_start_of_a_later_start_is_one():
    assert format_profile(After(10, After(5, SWA()))) == "swa:start=15"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Unknown method ''; expected one like swa"),
        ("0.999", "Unknown method '0.999'"),
        ("lawa:length=3", "Unknown method"),
        ("ema", "needs half_life or decay; found none"),
        ("ema:0.999", "bare '0.999'.*ema:half_life=3000 or ema:decay=0.999"),
        ("ema:500", "bare '500'"),
        ("ema:decay=0.9,half_life=3", "found half_life and decay"),
        ("ema:decay=0.9,decay=0.8", "given twice"),
        ("ema:dacay=0.9", "'dacay'.*half_life, decay, keep_initial, start"),
        ("ema:decay=0.9,keep_initial=yes", "true or false"),
        ("ema:decay=3000", "0 < decay < 1"),
        ("power:std=0.5", "0.2887"),
        ("polynomial:k=0.5", "needs c"),
        ("polynomial:c=1,k=1", "k = 1 is PowerEMA"),
        ("window:length=ten", "not a number"),
        ("window", "needs length; found none"),
        ("annealed:shape=step", "cosine, linear, sqrt"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ArgumentError, match=message):
        parse_profile(text)


def test_a_custom_curve_has_no_text():
    with pytest.raises(ArgumentError, match="cannot be written as text"):
        format_profile(Annealed(lambda u: 1 - u * u))


def test_a_schedule_of_pieces():
    pieces = [
        "constant:rate=0.1,steps=50",
        "cosine:start=0.1,end=0.01,steps=50",
        "cyclic:high=0.05,low=0.01,cycle=10,steps=40",
    ]
    assert parse_schedule(pieces) == chain(
        (50, Constant(0.1)),
        (50, Cosine(0.1, 0.01)),
        (40, CyclicLinear(high=0.05, low=0.01, cycle=10)),
    )
    assert parse_schedule(["linear:start=1,end=0,steps=2"])(1) == 0.5
    assert parse_schedule(["sawtooth:high=1,low=0,cycle=2,steps=4"])(1) == 1
    assert parse_schedule(["triangular:high=1,low=0,cycle=2,steps=4"])(0) == 0


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("step:rate=1", "Unknown schedule piece.*constant:rate=0.1,steps=50"),
        ("constant:rate=0.1", "needs steps"),
        ("constant:0.1,steps=5", "bare '0.1'"),
        ("constant:rate=0.1,steps=2.5", "whole number"),
        ("constant:rate=0.1,steps=0", "1 or more"),
        ("cyclic:high=0.1,low=0.2,cycle=3,steps=9", "low <= high"),
    ],
)
def test_pieces_that_are_refused(piece, message):
    with pytest.raises(ArgumentError, match=message):
        parse_schedule([piece])
