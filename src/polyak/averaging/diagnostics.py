"""What an average does with each tensor, why, and what it costs; and how it is doing, in figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.tracker import Member
from polyak.averaging.values import model_value
from polyak.tensors.memory import shape_of
from polyak.tensors.packed import Packed
from polyak.tensors.policy import Kind


@dataclass(frozen=True)
class TensorPlanRow:
    """One tensor: its name, its shape and dtype, what happens to it, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    reason: str


@dataclass(frozen=True)
class TensorPlan:
    """What happens to each tensor; `str(plan)` is a table. `nbytes` is what the average keeps."""

    rows: tuple[TensorPlanRow, ...]
    nbytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        cells = [("tensor", "shape", "dtype", "", "why")]
        cells += [
            (
                row.name,
                "x".join(map(str, row.shape)) or "-",
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


def plan(member: Member) -> TensorPlan:
    """The plan of one average for its model as it is now."""
    member.tracker.finish()
    named, kinds = member.tracker.tensors.inspect()
    rows = [
        TensorPlanRow(
            name,
            shape_of(s.tensor),
            s.tensor.dtype,
            kinds[name].kind.value,
            kinds[name].reason,
        )
        for name, s in named.slots.items()
    ]
    rows += [
        TensorPlanRow(
            alias, (), named.slots[name].tensor.dtype, "tied", f"the same tensor as {name}"
        )
        for alias, name in named.ties.items()
    ]
    held_by, options = member.held_by, member.tracker.options
    nbytes = sum(_bytes_held(row, member) for row in rows)
    weights = sum(_bytes_held(row, member) for row in rows if row.kind == Kind.AVERAGED.value)
    notes = held_by.describe(weights, options, member.accumulator)
    nbytes += weights * (held_by.tensors_per_weight(options) - 1)
    return TensorPlan(tuple(rows), nbytes, (*notes, *member.tracker.notes()))


@torch.no_grad()
def metrics(member: Member) -> dict[str, float]:
    """Drift and health of an average. It reads every weight: call it now and then, not every step.

    - `distance`: L2 norm of average minus live weights, over all that is averaged;
      `relative_distance` divides it by the norm of the live weights;
    - `effective_samples`: 1 / (sum of squared shares): as many equal weights cancel as much noise;
    - `mean_age`: in units of time;  `next_share`: with what share the next weights will enter;
    - `skipped`: updates left out by `nonfinite="skip"`.

    Before the first update all but `skipped` are NaN.
    """
    tracker = member.tracker
    own = tracker.own_weights
    if own is None:
        tracker.refuse_during_loan("metrics()")
    tracker.ready_to_read()
    skipped = float(tracker.skipped)
    if member.accumulator is None or member.is_empty():
        names = ("distance", "relative_distance", "effective_samples", "mean_age", "next_share")
        return dict.fromkeys(names, math.nan) | {"skipped": skipped}
    tensors = tracker.tensors
    pairs = [
        (_squares(model_value(member, i).to(w.device) - w), _squares(w))
        for i, w in enumerate(map(_unpacked, tensors.live if own is None else own))
    ]
    distance, norm = map(math.sqrt, tensors.ranks.total(tensors.whole, pairs))
    clock = member.clock.on_host()
    dt = float(clock.dt) or 1.0
    time: Any = clock.time
    return {
        "distance": distance,
        "relative_distance": distance / norm if norm else math.nan,
        "effective_samples": member.accumulator.effective_samples(clock),
        "mean_age": float(member.profile.mean_age(time)) if time > 0 else 0.0,
        "next_share": float(member.profile.share(time + dt, dt)),
        "skipped": skipped,
    }


def _bytes_held(row: TensorPlanRow, member: Member) -> int:
    values = torch.Size(row.shape).numel()
    if row.kind == Kind.STATISTIC.value:
        return values * row.dtype.itemsize
    if row.kind != Kind.AVERAGED.value:
        return 0
    return values * member.held_by.dtype_held(row.dtype, member.tracker.options).itemsize


def _unpacked(weight: Tensor | Packed) -> Tensor:
    return weight.own() if isinstance(weight, Packed) else weight


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=_exact(tensor))) ** 2


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
