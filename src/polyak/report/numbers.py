"""Numbers as tables and sentences show them."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal


def rounded(value: float, digits: int, *, signed: bool = False) -> str:
    """A number with so many decimals, half away from zero, with a true minus sign.

    >>> rounded(0.125, 2), rounded(-0.125, 2), rounded(0.125, 2, signed=True), rounded(-0.001, 2)
    ('0.13', '−0.13', '+0.13', '0.00')
    """
    # Of the number as it is printed: 2.675 is 2.68, though the float is just below.
    at = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    if not at:
        at = abs(at)
    return f"{at:{'+' if signed else ''}f}".replace("-", "−")


def as_shown(value: float, digits: int) -> Decimal:
    """The number that `rounded` shows, to compare with others that are shown."""
    return Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)


def count(number: int, what: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
