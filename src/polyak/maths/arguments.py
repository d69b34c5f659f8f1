"""Numbers that come from outside: plain ones pass, anything else is refused with what was found."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyak.errors import ArgumentError, require


def number(what: str, value: float) -> float:
    """A number as Python's own float or int, NumPy's scalars included; ArgumentError for anything else.

    Text, booleans and complex numbers are none, and neither is an integer beyond the range of floats.

    >>> number("EMA decay", np.float32(0.5)), number("Window length", 3)
    (0.5, 3)
    """
    if type(value) is float:
        return value
    if type(value) is int or (isinstance(value, Real) and not isinstance(value, bool | np.bool_)):
        try:
            plain = float(value)
        except OverflowError:
            raise ArgumentError(f"{what} is too large; expected a number below 1e308.") from None
        return value if type(value) is int else plain
    raise ArgumentError(f"{what} is {_shown(value)}; expected a number.")


def numbers(what: str, values: Iterable[float]) -> NDArray[np.float64]:
    """A list of numbers as an array; ArgumentError for anything else. `what` is their plural."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ArgumentError(
            f"The {what} are {_shown(values)}; expected a list of numbers."
        ) from None


def count(what: str, value: int, least: int = 0) -> int:
    """A whole number, `least` or more; ArgumentError for anything else."""
    whole: int | None = None
    with contextlib.suppress(TypeError, RuntimeError):  # torch's, of tensors that hold several
        whole = operator.index(value)
    if whole is None or isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{what} is {_shown(value)}; expected a whole number.")
    require(whole >= least, f"{what} is {whole}; expected {least} or more.")
    require(whole < 1 << 63, f"{what} is too large; expected less than 2^63.")
    return whole


def at_least_one(what: str, value: int) -> int:
    """A whole number, 1 or more; ArgumentError for anything else."""
    count(what, value, 1)
    return value


def flag(what: str, value: object) -> None:
    """ArgumentError unless the value is True or False."""
    require(isinstance(value, bool), f"{what} is {_shown(value)}; expected True or False.")


def _shown(value: Any) -> str:
    """The value as code, cut to one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
