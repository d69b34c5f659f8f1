"""How an average is doing, in figures to log."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.applying import lendable
from polyak.averaging.following import Following
from polyak.averaging.held import Held
from polyak.averaging.snapshots import Snapshots


@torch.no_grad()
def metrics_of(following: Following, held: Held) -> dict[str, float]:
    """Drift and health of an average. It reads every weight: call it now and then, not every step.

    - `distance`: L2 norm of average minus live weights, over all that is averaged;
      `relative_distance` divides it by the norm of the live weights;
    - `effective_samples`: 1 / (sum of squared shares): as many equal weights cancel as much noise;
    - `mean_age`: in units of time;  `next_share`: with what share the next weights will enter;
    - `skipped`: updates left out by `nonfinite="skip"`.

    Before the first update all but `skipped` are NaN.
    """
    following.refuse_during_loan("metrics()")
    following.ready_to_read()
    skipped = float(following.skipped)
    if held.is_empty():
        names = ("distance", "relative_distance", "effective_samples", "mean_age", "next_share")
        return dict.fromkeys(names, math.nan) | {"skipped": skipped}
    live = following.roster.live
    pairs = zip(lendable(following, held), live, strict=True)
    distance = math.sqrt(sum(_squares(a.to(w.device) - w) for a, w in pairs))
    norm = math.sqrt(sum(map(_squares, live)))
    clock = held.clock.read()
    dt = float(clock.dt) or 1.0
    time: Any = clock.time
    return {
        "distance": distance,
        "relative_distance": distance / norm if norm else math.nan,
        "effective_samples": _effective_samples(held),
        "mean_age": float(held.profile.mean_age(time)) if time > 0 else 0.0,
        "next_share": float(held.profile.share(time + dt, dt)),
        "skipped": skipped,
    }


def _effective_samples(held: Held) -> float:
    if isinstance(held.store, Snapshots):
        return 1 / sum(weight**2 for weight in held.store.weights(held.clock))
    return 1 / float(held.clock.squares)


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=_exact(tensor))) ** 2


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
