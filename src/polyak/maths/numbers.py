"""Numbers as tables, sentences and the terminal show them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Context, Decimal

_HUGE = 1e15


def rounded(value: float, digits: int, *, signed: bool = False) -> str:
    """A number with so many decimals, half away from zero, with a true minus sign.

    >>> rounded(0.125, 2), rounded(-0.125, 2), rounded(0.125, 2, signed=True), rounded(-0.001, 2)
    ('0.13', '−0.13', '+0.13', '0.00')
    >>> rounded(17.375 - 16.8, 2)  # 0.575, though as a float it is 0.57499999999999929
    '0.58'
    """
    if _HUGE <= abs(value) < math.inf:
        return f"{value:{'+' if signed else ''}.5g}".replace("-", "−", 1)
    at = as_shown(value, digits) or Decimal(0).scaleb(-digits)  # no negative zero
    return f"{at:{'+' if signed else ''}f}".replace("-", "−")


def as_shown(value: float, digits: int) -> Decimal:
    """The number that `rounded` shows, to compare with others that are shown."""
    exact = Decimal(repr(float(value)))
    if not exact.is_finite():
        return exact
    # What arithmetic with floats adds is far below six decimals more.
    exact = exact.quantize(Decimal(1).scaleb(-digits - 6), ROUND_HALF_EVEN, _ALL_DIGITS)
    return exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP, _ALL_DIGITS)


_ALL_DIGITS = Context(prec=700)  # of any float, and of the decimals of any other beside it


def plus_minus(half: float, digits: int) -> str:
    """`± 0.12`, or that it is less than can be shown: an interval is never of no width.

    >>> plus_minus(0.1234, 2), plus_minus(0.001, 2)
    ('± 0.12', '± <0.01')
    """
    if as_shown(half, digits):
        return f"± {rounded(half, digits)}"
    return f"± <{rounded(10.0**-digits, digits)}"


def significant(value: float, digits: int) -> str:
    """A number with so many digits, with a true minus sign.

    >>> significant(-0.123456, 3), significant(1234567.0, 4)
    ('−0.123', '1.235e+06')
    """
    text = f"{value:.{digits}g}"
    return f"−{text[1:]}" if text.startswith("-") else text


def difference(value: float, low: float, high: float) -> tuple[str, str, str, bool]:
    """A difference and its interval, with as many decimals as the interval has to say.

    The last one is whether the interval, as it is shown, holds 0.

    >>> difference(-0.01968, -0.0308, -0.008279)
    ('−0.020', '−0.031', '−0.008', False)
    >>> difference(0.001038, 1.675e-05, 0.002029)
    ('+0.0010', '+0.0000', '+0.0020', True)
    """
    digits = decimals(high / 2 - low / 2 or value, 2)
    shown = [rounded(one, digits, signed=True) for one in (value, low, high)]
    holds_0 = low <= 0 <= high or not all(as_shown(one, digits) for one in (low, high))
    return shown[0], shown[1], shown[2], holds_0


def shared_decimals(values: Iterable[float]) -> int:
    """How many decimals numbers of one table have: four digits of their spread, five of one alone.

    >>> shared_decimals([0.45213, 0.47]), shared_decimals([1.25]), shared_decimals([3.0, math.nan, 4000.0])
    (5, 4, 0)
    """
    finite = [float(one) for one in values if math.isfinite(one)]
    spread = max(finite) - min(finite) if finite else 0.0
    return decimals(spread, 4) if spread else decimals(finite[0] if finite else 0.0, 5)


def for_terminal(text: str) -> str:
    """The text, with ASCII signs where the encoding of the standard output has no true ones."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return text.replace("−", "-").replace("±", "+-")
    return text


def percent(share: float, digits: int = 0) -> str:
    """`40%` of 0.4."""
    return f"{rounded(100 * share, digits)}%"


def decimals(value: float, significant: int) -> int:
    """How many decimals show so many significant digits of a number; none of a large one.

    >>> decimals(1.8512, 5), decimals(0.0113, 2), decimals(1234.5, 3), decimals(0.0, 3)
    (4, 3, 0, 2)
    """
    power = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    return max(0, significant - 1 - power)


def count(number: int, what: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
