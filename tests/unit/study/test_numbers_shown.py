"""How the terminal shows numbers: as the pages do."""

import io
import math
import sys

import numpy as np
import pytest

from polyak.maths.numbers import rounded, shared_decimals
from polyak.study.found import Comparison, Found, Scored
from polyak.study.scans import Barrier, LineScan


def found(*scores, difference=(-0.01968, -0.0308, -0.008279)):
    scored = [Scored("swa", "windows", 0.0, 10.0 * i, s, s, 0.1) for i, s in enumerate(scores, 1)]
    compared = Comparison("best", "EMA", *difference)
    references = {"EMA": scored[-1]}
    return Found(
        "search", scored[0], (scored[0],), tuple(scored), references, (compared,), True, (50, 50), 2, 0,
        "steps", 20.0,
    )  # fmt: skip


LINE = LineScan(
    minimize=False,
    evaluations=3,
    cached=0,
    names=("a-1", "b"),
    positions=np.array([-0.5, 0.0, 1.0]),
    distances=np.array([-2.0, 0.0, 4.0]),
    values=np.array([-0.123456789, -0.2, -0.3]),
    barriers=(Barrier("a-1", "b", 0.25, 0.5, 0.5, -0.0123, -0.0456, 0.0210),),
)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (found(-1.2345678, -1.5), ["−1.2346", "−1.5000", "−0.020, 95% interval −0.031 to −0.008"]),
        (
            LINE,
            ["−0.5", "−2", "−0.1235", "−0.3000", "−0.012, 95% interval −0.046 to +0.021, within"],
        ),
        (Comparison("best", "EMA", -0.0123456, None, None), ["EMA: −0.012 on the data"]),
        (
            Comparison("best", "EMA", 0.001038, 1.675e-05, 0.002029),
            ["+0.0000 to +0.0020, within noise"],
        ),
        (Comparison("best", "EMA", 0.0, 0.0, 0.0), ["no difference on any example"]),
    ],
)
def test_true_minus_signs_and_digits_by_the_spread(shown, expected):
    text = str(shown)
    for one in expected:
        assert one in text
    assert "-" not in text.replace("a-1", "")


@pytest.mark.parametrize("shown", [found(-1.0, -2.0), LINE])
@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "-"), ("latin-1", "-"), ("utf-8", "−")])
def test_a_terminal_without_the_sign_gets_a_hyphen(monkeypatch, shown, encoding, sign):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    print(shown)
    sys.stdout.flush()
    assert f" {sign}0.0" in written.getvalue().decode(encoding)


@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf, 1e300, 1e-300, -1e30])
def test_no_score_is_too_wild_to_be_shown(wild):
    assert str(found(1.5, wild))
    assert str(found(wild, 1.5, difference=(wild, -abs(wild), abs(wild))))
    assert rounded(wild, shared_decimals([wild, 1.0]))
