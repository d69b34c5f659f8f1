"""The plan: what an average does with each tensor of a model, why, and what it costs.

How an average is doing, in figures to log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.accumulators import BLOCK_UPDATES, SMALLEST_SHARE, Snapshots
from polyak.averaging.tracker import Following, Held
from polyak.averaging.values import lendable
from polyak.tensors.blend import accumulator_dtype
from polyak.tensors.policy import Kind


@dataclass(frozen=True)
class Row:
    """One tensor: its name, its shape and dtype, what happens to it, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What happens to each tensor; `str(plan)` is a table. `nbytes` is what the average keeps."""

    rows: tuple[Row, ...]
    nbytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        cells = [("tensor", "shape", "dtype", "", "why")]
        cells += [
            (
                row.name,
                _shape(row.shape),
                str(row.dtype).removeprefix("torch."),
                row.kind,
                row.reason,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells
        ]
        return "\n".join([*lines, "", *self.notes])


def plan_of(following: Following, held: Held) -> Plan:
    """The plan of one average for its model as it is now."""
    named, kinds = following.roster.look()
    rows = [
        Row(name, tuple(s.tensor.shape), s.tensor.dtype, kinds[name].kind.value, kinds[name].reason)
        for name, s in named.slots.items()
    ]
    rows += [
        Row(alias, (), named.slots[name].tensor.dtype, "tied", f"the same tensor as {name}")
        for alias, name in named.ties.items()
    ]
    one = sum(_kept_bytes(row, following, held) for row in rows)
    notes = (
        _window_notes(held, one) if not held.profile.streaming else _running_notes(following, one)
    )
    return Plan(tuple(rows), one, tuple(notes))


def _kept_bytes(row: Row, following: Following, held: Held) -> int:
    values = torch.Size(row.shape).numel()
    if row.kind == Kind.STATISTIC.value:
        return values * row.dtype.itemsize
    if row.kind != Kind.AVERAGED.value:
        return 0
    wide = accumulator_dtype(row.dtype, following.options.dtype)
    return values * (wide if held.profile.streaming else row.dtype).itemsize


def _running_notes(following: Following, nbytes: int) -> Sequence[str]:
    digits = 1.1e-16 if following.options.dtype is torch.float64 else 6.0e-8
    return (
        f"keeps {_megabytes(nbytes)}; twice that once a share falls below {SMALLEST_SHARE:.1e}, "
        f"when weights gather in blocks of {BLOCK_UPDATES} updates",
        f"resolution: accumulators of float32 weights hold {digits:.1e} of a value, at any share",
    )


def _window_notes(held: Held, nbytes: int) -> Sequence[str]:
    kept = 0 if held.store is None else len(held.store.kept)  # type: ignore[union-attr]
    return (
        f"keeps {_megabytes(nbytes)} for each capture in the window; {kept} now",
        "resolution: snapshots are exact",
    )


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "-"


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
