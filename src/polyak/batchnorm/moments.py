"""Means and variances that are merged exactly, whatever the split into batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass
class Moments:
    """Moments of all values seen, per channel: `count` values in each of C channels, shapes (C,).

    Two parts merge as in Chan, Golub and LeVeque (1979): with d the difference of their means,
    ``mean += d * n_b / n`` and ``spread += spread_b + d^2 * n_a * n_b / n``, where the spread is
    the sum of squared deviations from the mean. Nothing is ever subtracted from a sum of squares,
    so a mean far from zero costs no digits.
    """

    count: float
    mean: Tensor
    spread: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Self:
        """Nothing seen yet; float64 wherever the device has it, else float32."""
        zeros = torch.zeros_like(like, dtype=_wide(like))
        return cls(0.0, zeros, zeros.clone())

    @classmethod
    def of(cls, counts: list[int], means: Tensor, variances: Tensor) -> Self:
        """The moments of K batches: values per channel, means and *unbiased* variances (K, C)."""
        n, total = _column(counts, means), float(sum(counts))
        means = means.to(n.dtype)
        mean = (n * means).sum(0) / total
        spread = (n - 1) * variances.to(n.dtype) + n * (means - mean) ** 2
        return cls(total, mean, spread.sum(0))

    def add(self, other: Self) -> None:
        """Take in the moments of other values."""
        self.merge(other.count, other.mean, other.spread)

    def merge(self, count: float, mean: Tensor, spread: Tensor) -> None:
        """Take in the moments of other values."""
        if count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.spread = count, mean, spread
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.spread = self.spread + spread + delta**2 * (self.count * count / total)
        self.count = total

    def variance(self, *, unbiased: bool = True) -> Tensor:
        """The variance; the unbiased one is what layers store, and needs two values."""
        return self.spread / (self.count - 1 if unbiased else self.count)

    def is_enough(self) -> bool:
        """Whether an unbiased variance exists."""
        return self.count > 1

    def is_finite(self) -> bool:
        """Whether nothing but finite values was seen, and nothing overflowed."""
        return bool((self.mean + self.spread).isfinite().all())


class InstanceMoments(Moments):
    """What InstanceNorm keeps: means over instances of each instance's mean and variance.

    `count` is instances and the spread is the sum of their unbiased variances; what lies between
    instances is no part of its definition.
    """

    @classmethod
    def of(cls, counts: list[int], means: Tensor, variances: Tensor) -> Self:
        """The moments of K batches: their instances, the means of the instances' moments (K, C)."""
        n, total = _column(counts, means), float(sum(counts))
        mean = (n * means.to(n.dtype)).sum(0) / total
        return cls(total, mean, (n * variances.to(n.dtype)).sum(0))

    def merge(self, count: float, mean: Tensor, spread: Tensor) -> None:
        """Take in the moments of other instances."""
        if count == 0:
            return
        total = self.count + count
        self.mean = self.mean + (mean - self.mean) * (count / total)
        self.spread = self.spread + spread
        self.count = total

    def variance(self, *, unbiased: bool = True) -> Tensor:
        """The mean of the instances' variances."""
        return self.spread / self.count

    def is_enough(self) -> bool:
        """One instance is enough: each has a variance of its own."""
        return self.count > 0


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64


def _column(counts: list[int], like: Tensor) -> Tensor:
    column = torch.tensor(counts, dtype=_wide(like))
    return column.to(like.device, non_blocking=True).unsqueeze(1)
