"""A checkpoint whose floating tensors have another dtype, cast while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from polyak.checkpoints.reading.extra_state import tensors_in
from polyak.checkpoints.reading.stored import (
    FLOATS,
    TORCH_DTYPES,
    Checkpoint,
    StoredTensor,
    accumulator,
    itemsize,
)


class CastTensor(StoredTensor):
    """The values of another tensor, rounded to nearest where this dtype is narrower."""

    __slots__ = ("_stored",)

    def __init__(self, stored: StoredTensor, dtype: str) -> None:
        super().__init__(stored.name, dtype, stored.shape)
        self._stored = stored

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `StoredTensor.read_into`."""
        size, own = itemsize(self.dtype), itemsize(self._stored.dtype)
        first, last = start // size, -(-(start + len(buffer)) // size)
        raw = bytearray((last - first) * own)
        if not raw:
            return
        self._stored.read_into(first * own, memoryview(raw))
        values = torch.frombuffer(raw, dtype=TORCH_DTYPES[self._stored.dtype])
        cast = values.to(TORCH_DTYPES[self.dtype]).view(torch.uint8).numpy().data
        buffer[:] = cast[start - first * size :][: len(buffer)]


def cast(checkpoint: Checkpoint, dtypes: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with floating tensors in these dtypes, by name; the others, and extra state, as they are."""
    kept = tensors_in(checkpoint.extra)
    tensors = {
        name: CastTensor(tensor, dtypes[name])
        if tensor.dtype in FLOATS and name not in kept and dtypes.get(name, tensor.dtype) != tensor.dtype
        else tensor
        for name, tensor in checkpoint.tensors.items()
    }  # fmt: skip
    return replace(checkpoint, tensors=tensors)


def widened(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every floating tensor in the dtype that sums run in."""
    names = {torch.float32: "F32", torch.float64: "F64"}
    floats = {n: t.dtype for n, t in checkpoint.tensors.items() if t.dtype in FLOATS}
    return cast(checkpoint, {n: names[accumulator(dtype)] for n, dtype in floats.items()})
