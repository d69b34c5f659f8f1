"""Arguments of the wrong type or out of their domain: one sentence of ours, whichever constructor it is."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import polyak
from polyak.errors import ArgumentError
from polyak.maths import effective_samples, parse_profile, parse_schedule, piece_weights
from polyak.schedules import (
    Chain,
    Constant,
    Cosine,
    CyclicLinear,
    Linear,
    PerEpoch,
    Sawtooth,
    Triangular,
    Warmup,
    chain,
)

NOT_NUMBERS = [None, "0.5", "", b"1", True, np.True_, 1j, [], [0.5], {}, object(), Decimal("0.5")]
NOT_NUMBERS += [torch.ones(2), np.ones(1), polyak.SWA, math.nan, -math.inf, 10**400]

TAKE_NUMBERS = {
    "decay": polyak.EMA,
    "half-life": polyak.EMA.from_half_life,
    "gamma": polyak.PowerEMA,
    "c": lambda value: polyak.PolynomialEMA(value, 0.5),
    "k": lambda value: polyak.PolynomialEMA(1, value),
    "std": polyak.PowerEMA.from_relative_std,
    "length": polyak.Window,
    "After": lambda x: polyak.After(x, polyak.SWA()),
    "rate": Constant,
    "start": lambda x: Linear(x, 0.1),
    "end": lambda x: Cosine(0.1, x),
    "high": lambda x: CyclicLinear(high=x, low=0.0, cycle=2),
    "low": lambda x: Sawtooth(high=1, low=x, cycle=2),
    "Triangular high": lambda x: Triangular(high=x, low=0, cycle=2),
    "now": lambda x: polyak.SWA().weights([1, 2], now=2 if x is None else x),
    "times": lambda x: polyak.SWA().weights([1, x]),
    "steps": lambda x: piece_weights(polyak.SWA(), [1, x]),
    "weights": lambda x: effective_samples([1, x]),
    "scales": lambda x: polyak.LRSchedule(
        torch.optim.SGD([nn.Parameter(torch.ones(1))]), Constant(0.1), scales=[x]
    ),
}
TAKE_LISTS = {"times", "steps", "weights", "scales"}
_NUMBERS_TO_NUMPY = (str, bytes, bool, np.bool_, Decimal, list, np.ndarray, torch.Tensor)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("what", TAKE_NUMBERS)
def test_what_is_no_number(what, value):
    if what in TAKE_LISTS and isinstance(value, _NUMBERS_TO_NUMPY):
        pytest.skip("numbers, to NumPy")
    if what == "now" and value is None:
        pytest.skip("the default")
    with pytest.raises(ArgumentError):
        TAKE_NUMBERS[what](value)


@pytest.mark.parametrize(
    "value", [None, "3", True, 2.5, 0, -1, math.nan, 1 << 63, [3], torch.ones(2)]
)
@pytest.mark.parametrize(
    "build",
    [
        lambda n: Linear(0.1, 0.1, n if n is not None else 0),
        lambda n: CyclicLinear(high=1, low=0, cycle=n),
        lambda n: chain((n, Constant(0.1))),
        lambda n: Chain(((n, Constant(0.1)),)),
        lambda n: Warmup(n, Constant(0.1)),
        lambda n: Constant(0.1).per_epoch(n),
        lambda n: Constant(0.1).per_epoch(2).over(n),
    ],
)
def test_what_is_no_number_of_steps(build, value):
    with pytest.raises(ArgumentError, match=r"expected (a whole number|1 or more|0 or more|less)"):
        build(value)


@pytest.mark.parametrize("value", [polyak.SWA, 0.9, None, "swa", Constant(0.1)])
def test_what_is_no_profile(value):
    for use in (lambda v: polyak.After(3, v), lambda v: piece_weights(v, [1, 2])):
        with pytest.raises(ArgumentError, match="Expected a profile"):
            use(value)
    if value != "swa":
        with pytest.raises(ArgumentError, match="Expected a profile"):
            polyak.Average(nn.Linear(1, 1), value)


@pytest.mark.parametrize("value", [Constant, 0.1, None, "constant", polyak.SWA()])
def test_what_is_no_schedule(value):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    for use in (
        lambda v: chain((3, v)),
        lambda v: Warmup(3, v),
        lambda v: PerEpoch(v, 3),
        lambda v: polyak.LRSchedule(optimizer, v),
    ):
        with pytest.raises(ArgumentError, match="a schedule, such as"):
            use(value)


def test_a_class_is_to_be_called():
    for use in (lambda: polyak.After(1, polyak.SWA), lambda: chain((1, CyclicLinear))):
        with pytest.raises(ArgumentError, match=r"Call it: (SWA|CyclicLinear)\(\.\.\.\)"):
            use()


@pytest.mark.parametrize("pieces", [Constant(0.1), (3,), (1, 2, 3), None, "ab"])
def test_a_chain_joins_pairs(pieces):
    with pytest.raises(ArgumentError):
        chain(pieces)
    with pytest.raises(ArgumentError):
        Chain([(3, Constant(0.1))])


@pytest.mark.parametrize("curve", ["cosine", None, 0.5, polyak.SWA, lambda u: "x", lambda u: None])
def test_what_is_no_curve(curve):
    with pytest.raises(ArgumentError):
        polyak.Annealed(curve)


@pytest.mark.parametrize("flag", [None, 0, "true"])
def test_what_is_no_flag(flag):
    for use in (
        lambda: polyak.EMA(0.9, keep_initial=flag),
        lambda: CyclicLinear(high=1, low=0, cycle=2, include_start=flag),
    ):
        with pytest.raises(ArgumentError, match="expected True or False"):
            use()


def test_numbers_of_numpy_are_numbers():
    for value in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        assert polyak.EMA(value) == polyak.EMA(0.5)
        assert repr(polyak.EMA(value)) == "EMA(decay=0.5, keep_initial=False)"
    assert repr(polyak.Window(np.int64(3))) == "Window(length=3.0)"
    assert repr(polyak.Window(3)) == "Window(length=3)"
    assert CyclicLinear(high=np.float32(1), low=0, cycle=np.int64(2))(1) == 0


@pytest.mark.parametrize("text", [None, 3, ["swa"], polyak.SWA()])
def test_what_is_no_text(text):
    with pytest.raises(ArgumentError, match="Expected the text of a method"):
        parse_profile(text)
    with pytest.raises(ArgumentError):
        parse_schedule([text])


def test_a_wrong_piece_is_called_a_piece():
    with pytest.raises(ArgumentError, match="Unknown schedule piece 'cosin:start=1'"):
        parse_schedule(["cosin:start=1"])
    with pytest.raises(ArgumentError, match="Expected a list of schedule pieces"):
        parse_schedule("constant:rate=0.1,steps=50")
    with pytest.raises(ArgumentError, match="Unknown method 'smw'"):
        parse_profile("smw")
