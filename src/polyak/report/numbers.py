"""Numbers as tables and sentences show them."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal


def rounded(value: float, digits: int, *, signed: bool = False) -> str:
    """A number with so many decimals, half away from zero, with a true minus sign.

    >>> rounded(0.125, 2), rounded(-0.125, 2), rounded(0.125, 2, signed=True), rounded(-0.001, 2)
    ('0.13', '−0.13', '+0.13', '0.00')
    >>> rounded(17.375 - 16.8, 2)  # 0.575, though as a float it is 0.57499999999999929
    '0.58'
    """
    at = as_shown(value, digits) or Decimal(0).scaleb(-digits)  # no negative zero
    return f"{at:{'+' if signed else ''}f}".replace("-", "−")


def as_shown(value: float, digits: int) -> Decimal:
    """The number that `rounded` shows, to compare with others that are shown."""
    exact = Decimal(repr(float(value)))
    if not exact.is_finite():
        return exact
    # What arithmetic with floats adds is far below six decimals more.
    exact = exact.quantize(Decimal(1).scaleb(-digits - 6), ROUND_HALF_EVEN)
    return exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)


def plus_minus(half: float, digits: int) -> str:
    """`± 0.12`, or that it is less than can be shown: an interval is never of no width.

    >>> plus_minus(0.1234, 2), plus_minus(0.001, 2)
    ('± 0.12', '± <0.01')
    """
    if as_shown(half, digits):
        return f"± {rounded(half, digits)}"
    return f"± <{rounded(10.0**-digits, digits)}"


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
