"""exp, log and limits for floats, NumPy arrays and 0-d tensors alike.

Tensors are recognised by their methods, so nothing here imports torch. All are typed as float; the
result is of the kind that was passed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def exp(x: float) -> float:
    """`e^x`."""
    return _elementwise("exp", x)


def expm1(x: float) -> float:
    """`e^x - 1`, without cancelling digits where x is small."""
    return _elementwise("expm1", x)


def log(x: float) -> float:
    """`ln x`, and minus infinity at 0, where the math module raises."""
    if isinstance(x, int | float):
        return math.log(x) if x > 0 else -math.inf
    return _elementwise("log", x)


def log1p(x: float) -> float:
    """`ln(1 + x)`, and minus infinity at -1, where the math module raises."""
    if isinstance(x, int | float):
        return math.log1p(x) if x > -1 else -math.inf
    return _elementwise("log1p", x)


def at_least(x: float, limit: float) -> float:
    """`max(x, limit)`."""
    if isinstance(x, int | float):
        return max(x, limit)
    result: float = x.clip(min=limit)
    return result


def at_most(x: float, limit: float) -> float:
    """`min(x, limit)`."""
    if isinstance(x, int | float):
        return min(x, limit)
    result: float = x.clip(max=limit)
    return result


def _elementwise(name: str, x: Any) -> float:
    if isinstance(x, int | float):
        return float(getattr(math, name)(x))
    if hasattr(x, name):
        of_tensor: float = getattr(x, name)()
        return of_tensor
    with np.errstate(divide="ignore"):  # log(0) is intended
        of_array: float = getattr(np, name)(x)
    return of_array
