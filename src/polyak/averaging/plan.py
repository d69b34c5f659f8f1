"""The plan: what an average does with each tensor of a model, why, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polyak.averaging.following import Following
from polyak.averaging.held import Held
from polyak.averaging.running import BLOCK_UPDATES, SMALLEST_SHARE
from polyak.tensors.blend import accumulator_dtype
from polyak.tensors.policies import Kind


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
