"""Values that are not finite: found by one pass over each result, explained only when found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.checkpoints.merging.plan import Chunk, Segment
from polyak.checkpoints.reading.dtypes import TORCH_DTYPES, itemsize
from polyak.checkpoints.reading.layout import StoredTensor
from polyak.errors import NonFiniteError

# The first magnitude that rounds to infinity: the largest finite value and half a unit above it.
_LIMITS = {
    "F64": float("inf"),
    "F32": 2.0**127 * (2 - 2.0**-24),
    "F16": 65520.0,
    "BF16": 2.0**127 * (2 - 2.0**-8),
}


def fits(total: Tensor, dtype: str) -> bool:
    """Whether all values are finite once written as `dtype`; one pass, and a NaN passes nothing."""
    low, high = torch.aminmax(total)
    limit = _LIMITS[dtype]
    return -limit < low.item() and high.item() < limit


def explained(
    paths: Sequence[str], segment: Segment, chunk: Chunk, total: Tensor
) -> NonFiniteError:
    """Which tensor of which input holds what is not finite; looked for only after it was found."""
    for tensor, first, last in segment.tensors_in(chunk.begin, chunk.end):
        for path, source in zip(paths, tensor.sources, strict=True):
            if source is None:
                continue
            at = _first_non_finite(source, segment, first, last)
            if at is not None:
                return NonFiniteError(
                    f"{tensor.name} of {path} is not finite (value {at[0]} of it is {at[1]}). "
                    "Leave this checkpoint out, or take the tensor from the newest (--exclude)."
                )
    name = _overflowing(segment, chunk, total)
    return NonFiniteError(
        f"{name}: the average exceeds what {segment.written_as} can hold, though every input is "
        "finite. Write a wider dtype."
    )


def _first_non_finite(
    source: StoredTensor, segment: Segment, first: int, last: int
) -> tuple[int, float] | None:
    size = itemsize(segment.read_as)
    raw = bytearray((last - first) * size)
    source.read_into(first * size, memoryview(raw))
    values = torch.frombuffer(raw, dtype=TORCH_DTYPES[segment.read_as])
    bad = torch.nonzero(~torch.isfinite(values))
    return None if not len(bad) else (first + int(bad[0]), float(values[int(bad[0])]))


def _overflowing(segment: Segment, chunk: Chunk, total: Tensor) -> str:
    position = 0
    names: list[str] = []
    for tensor, first, last in segment.tensors_in(chunk.begin, chunk.end):
        if not fits(total[position : position + last - first], segment.written_as):
            names.append(tensor.name)
        position += last - first
    return ", ".join(names)
