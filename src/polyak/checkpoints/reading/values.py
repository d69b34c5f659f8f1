"""The values of a stored tensor as numbers, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from polyak.checkpoints.reading.dtypes import COMPLEX_PARTS, TORCH_DTYPES
from polyak.checkpoints.reading.layout import StoredTensor

PIECE_BYTES = 1 << 20
"""What is read at once; in float64 at most eight times that lies in memory."""


def pieces(*tensors: StoredTensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same values of several tensors of one shape, flat, piece by piece, in their dtypes.

    Complex numbers come as pairs of real ones, packed values below a byte as bytes.
    """
    sizes = [_itemsize(tensor) for tensor in tensors]
    counts = [tensor.nbytes // size for tensor, size in zip(tensors, sizes, strict=True)]
    step = PIECE_BYTES // max(sizes)
    if len(set(counts)) != 1:
        raise ValueError(f"tensors of different numbers of values: {counts}")
    for begin in range(0, counts[0], step):
        count = min(step, counts[0] - begin)
        yield tuple(
            _values(tensor, begin * size, count * size)
            for tensor, size in zip(tensors, sizes, strict=True)
        )


def _itemsize(tensor: StoredTensor) -> int:
    """Bytes between two values, both parts of a complex number together."""
    known = TORCH_DTYPES.get(tensor.dtype)
    return 1 if known is None else known.itemsize


def _values(tensor: StoredTensor, start: int, length: int) -> torch.Tensor:
    buffer = bytearray(length)
    tensor.read_into(start, memoryview(buffer))
    part = COMPLEX_PARTS.get(tensor.dtype, tensor.dtype)
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES.get(part, torch.uint8))
