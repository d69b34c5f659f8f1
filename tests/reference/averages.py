"""An average as its definition says: all weights kept, each with its share, summed in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def average(profile, weights: Sequence[Tensor], times: Sequence[float]) -> Tensor:
    """`sum of share_i * w_i`; the shares come from the profile's cumulative mass alone."""
    shares = shares_of(profile, times)
    kind = torch.complex128 if weights[0].is_complex() else torch.float64
    return sum(share * w.detach().to(kind) for share, w in zip(shares, weights, strict=True))


def shares_of(profile, times: Sequence[float]) -> list[float]:
    """`F(t_i, now) - F(t_(i-1), now)`, scaled to sum to 1 over what was seen."""
    now = times[-1]
    edges = [0.0, *times]
    masses = [
        (profile.mass(b, now) - profile.mass(a, now)) if b > a else 0.0
        for a, b in zip(edges, times, strict=False)
    ]
    masses[0] += profile.initial_mass(now)
    total = sum(masses)
    return [mass / total for mass in masses]


def ema_steps(values: Tensor, decay: float) -> float:
    """The debiased EMA of a long row of numbers, in float64, from its recursion."""
    top = bottom = 0.0
    for value in values.double().tolist():
        top = decay * top + (1 - decay) * value
        bottom = decay * bottom + (1 - decay)
    return top / bottom
