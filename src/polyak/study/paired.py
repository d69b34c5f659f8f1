"""Means and paired differences over seeds, with Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polyak.errors import ArgumentError


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with its standard error, None for a single seed.

    Seeds that all agree show no spread, as a single one does: they do so by chance where values are
    counts of few examples, and an interval of no width would call anything found.
    """

    mean: float
    error: float | None
    n: int

    def half_width(self, confidence: float = 0.95) -> float | None:
        """Half the width of the t interval; None without spread: of a single seed, or where all agree."""
        # What arithmetic with floats leaves of no difference is no spread.
        if self.error is None or self.error <= 1e-12 + 1e-9 * abs(self.mean):
            return None
        return t_quantile((1 + confidence) / 2, self.n - 1) * self.error

    @property
    def sign(self) -> int:
        """+1 or -1 if the 95% interval is on one side of 0, else 0."""
        half = self.half_width()
        if half is None or abs(self.mean) <= half:
            return 0
        return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error, s / sqrt(n) with s^2 = sum (x - mean)^2 / (n - 1).

    >>> estimate([1.0, 3.0])
    Estimate(mean=2.0, error=1.0, n=2)
    """
    n = len(values)
    if n == 0:
        raise ArgumentError("There are no values; an estimate needs at least one.")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n), n)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The mean of `values - baseline`, seed by seed: what both have in common cancels.

    Raises ArgumentError if their lengths differ.
    """
    if len(values) != len(baseline):
        raise ArgumentError(
            f"There are {len(values)} values and {len(baseline)} of the baseline; expected one of each for "
            "every seed."
        )
    return estimate([value - base for value, base in zip(values, baseline, strict=True)])


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with a whole number of degrees of freedom, by bisection.

    >>> round(t_quantile(0.975, 4), 4)
    2.7764
    """
    if not (0.5 <= probability < 1 and freedom >= 1):
        raise ArgumentError(
            f"probability is {probability} and freedom {freedom}; expected 0.5 <= probability < 1 and "
            "freedom >= 1."
        )
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2 == 1
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 if odd else 1, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    both = (2 / math.pi) * (theta + sine * total) if odd else sine * total
    return 0.5 + both / 2
