"""Statistics of normalisation layers, the slow and obvious way: all values at once, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel of values (N, C, ...), in two passes."""
    flat = values.detach().double().transpose(0, 1).reshape(values.shape[1], -1)
    mean = flat.sum(1) / flat.shape[1]
    variance = ((flat - mean[:, None]) ** 2).sum(1) / (flat.shape[1] - 1)
    return mean, variance


def instance_statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means over instances of each instance's mean and unbiased variance."""
    flat = values.detach().double().flatten(2)
    return flat.mean(2).mean(0), flat.var(2).mean(0)


def batch_statistics_one_by_one(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What torch's `update_bn` computes: the mean over batches of their means and variances."""
    means, variances = zip(*(channel_statistics(b) for b in batches), strict=True)
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)
