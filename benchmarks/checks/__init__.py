"""The checks of the conformance table, by subject. Each takes a peer and gives a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """Passed or not, and the number that shows it."""

    passed: bool
    shown: str = ""


@dataclass(frozen=True)
class Check:
    """What is checked, in words for the table; `found` is how its figure reads."""

    subject: str
    title: str
    run: Callable[[Any], Result]


CHECKS: list[Check] = []


def check(subject: str, title: str) -> Callable[[Callable[[Any], Result]], Callable[[Any], Result]]:
    """Add a function to the table."""

    def register(function: Callable[[Any], Result]) -> Callable[[Any], Result]:
        CHECKS.append(Check(subject, title, function))
        return function

    return register


def near(found: float, expected: float, relative: float) -> Result:
    """Passes within a relative error; shows found and expected where it does not."""
    error = abs(found - expected) / abs(expected)
    return Result(error <= relative, f"{found:.4g}, not {expected:.4g}")


def below(figure: float, bound: float, what: str) -> Result:
    """Passes up to a bound."""
    return Result(figure <= bound, f"{what} {figure:.1e}")
