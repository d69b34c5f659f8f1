"""Means and variances: merged exactly whatever the split into batches, and those of one input.

`Moments` and `InstanceMoments` merge. The functions below them find the moments of a layer's input
to float32 accuracy, and tell where torch's own kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase


@dataclass
class Moments:
    """Moments of all values seen, per channel: `count` values in each of C channels, shapes (C,).

    Two parts merge as in Chan, Golub and LeVeque (1979): with d the difference of their means,
    ``mean += d * n_b / n`` and ``spread += spread_b + d^2 * n_a * n_b / n``, where the spread is
    the sum of squared deviations from the mean. No sum of squares is ever subtracted from another,
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


class InstanceMoments(Moments):
    """What InstanceNorm keeps: means over instances of each instance's mean and variance.

    `count` is instances and the spread is the sum of their unbiased variances; the variance between
    instances is not part of its definition.
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
        """One instance is enough: each has its own variance."""
        return self.count > 0


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64


def _column(counts: list[int], like: Tensor) -> Tensor:
    if len(set(counts)) == 1:  # nearly always; nothing is sent to a device
        return like.new_full((len(counts), 1), counts[0], dtype=_wide(like))
    column = torch.tensor(counts, dtype=_wide(like), device="cpu")
    return column.to(like.device, non_blocking=True).unsqueeze(1)


# With channels last, and for 16-bit inputs always, torch's CPU kernel adds up float32 values one after
# the other: on 64 images of 56 x 56 the variance is off by 1e-4. Pieces of this many values per
# channel are accurate to 1e-6, and fit into the cache, so they cost no more.
_VALUES_PER_PIECE = 4096

# Up to here the kernel's variance is accurate to 4e-6 anyway, and pieces would only cost time.
_VALUES_TO_TRUST = 8192

# Up to here the same holds for the mean, on which more depends (relative error 4e-7 at worst).
_VALUES_IN_ORDER = 256


def kernel_is_exact(x: Tensor, count: int) -> bool:
    """Whether the batch norm kernel itself finds the variance of `x` to float32 accuracy."""
    if count <= _VALUES_TO_TRUST or x.device.type != "cpu":
        return True
    return x.dtype in (torch.float32, torch.float64) and not channels_come_last(x)


def channels_come_last(x: Tensor) -> bool:
    """Whether the CPU kernel sums in order: vectors, and images in channels-last layout."""
    return x.stride(1) == 1 and x.device.type == "cpu"


def mean_is_exact(x: Tensor, count: int) -> bool:
    """Whether the kernel's mean is as accurate as its variance: not for many values summed in order."""
    return count <= _VALUES_IN_ORDER or not channels_come_last(x)


def mean_into(mean: Tensor, x: Tensor) -> None:
    """The mean per channel, summed pairwise: ten times as accurate as the kernel's on such data.

    An error in the mean of a batch, far from zero, would enter the variance between batches.
    """
    torch.mean(_rows(x), 0, dtype=mean.dtype, out=mean)


def of_values(x: Tensor, dtype: torch.dtype) -> tuple[list[int], Tensor, Tensor]:
    """Counts (K), means and unbiased variances (K, C) of the K pieces of an input (N, C, ...)."""
    if x.device.type != "cpu" or x.numel() == x.shape[1]:
        count = x.numel() // x.shape[1]
        dims = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x.to(dtype), dims, correction=min(1, count - 1))
        return [count], mean.unsqueeze(0), variance.unsqueeze(0)
    pieces = list(_pieces(x))
    means = torch.zeros(len(pieces), x.shape[1], dtype=dtype, device=x.device)
    variances = torch.zeros_like(means)
    for piece, mean, variance in zip(pieces, means, variances, strict=True):
        piece = piece.to(dtype)  # noqa: PLW2901 - in the cache from here on
        torch.batch_norm_update_stats(piece, mean, variance, 1.0)
        if channels_come_last(piece):
            mean_into(mean, piece)
    return [piece.numel() // x.shape[1] for piece in pieces], means, variances


def of_instances(layer: _NormBase, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the instances of their means and unbiased variances, (1, C) each."""
    n_spatial = _rank_without_batch(layer) - 1
    variance, mean = torch.var_mean(x, list(range(-n_spatial, 0)))
    channels = mean.shape[-1]
    return (
        mean.view(-1, channels).mean(0, keepdim=True),
        variance.view(-1, channels).mean(0, keepdim=True),
    )


def n_instances(layer: _NormBase, x: Tensor) -> int:
    """The number of instances in an input; without a batch dimension it is one."""
    return x.shape[0] if x.dim() > _rank_without_batch(layer) else 1


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """Views of `x` with a few thousand values per channel, never a single one."""
    if channels_come_last(x):
        rows = _rows(x)
        yield from rows.tensor_split(-(-len(rows) // _VALUES_PER_PIECE))
        return
    images_per_piece = max(1, _VALUES_PER_PIECE // x[0, 0].numel())
    for start in range(0, len(x), images_per_piece):
        yield x[start : start + images_per_piece]


def _rows(x: Tensor) -> Tensor:
    """The values as a matrix (values per channel, C), a view where channels come last."""
    return x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def _rank_without_batch(layer: _NormBase) -> int:
    rank: int = cast("Any", layer)._get_no_batch_dim()
    return rank
