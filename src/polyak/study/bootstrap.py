"""The paired bootstrap: an interval of the mean of differences, example by example."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyak.errors import ArgumentError

RESAMPLES = 10_000
MOST_DRAWN = 10_000
"""Beyond this many examples the bootstrap's limit is used, mean +- 1.96 standard errors."""

_CHUNK = 4_000_000  # drawn at once


def paired_bootstrap(scores: Tensor, baseline: Tensor) -> tuple[float, float, float]:
    """The mean of `scores - baseline` and its 95% percentile bootstrap interval: (mean, low, high).

    Both are one score per example, (n,), of the same examples: what makes an example hard for both cancels.
    10,000 resamples in float64 by a fixed seed, so that the same scores give the same interval.

    Raises ArgumentError for fewer than two examples, or where the lengths differ.

    >>> paired_bootstrap(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.5]))
    (0.5, 0.5, 0.5)
    """
    if scores.shape != baseline.shape or scores.ndim != 1 or len(scores) < 2:
        raise ArgumentError(
            f"scores have shape {tuple(scores.shape)} and the baseline {tuple(baseline.shape)}; expected (n,) "
            "for both, with n at least 2."
        )
    difference = scores.double().cpu() - baseline.double().cpu()
    mean, n = float(difference.mean()), len(difference)
    if n > MOST_DRAWN:
        half = 1.959963984540054 * float(difference.std()) / math.sqrt(n)
        return mean, mean - half, mean + half
    generator = torch.Generator().manual_seed(0)
    rows = max(1, _CHUNK // n)
    means = [
        difference[torch.randint(n, (min(rows, RESAMPLES - done), n), generator=generator)].mean(1)
        for done in range(0, RESAMPLES, rows)
    ]
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return mean, float(low), float(high)
