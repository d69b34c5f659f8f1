"""A tensor stored in chunks: boxes that tile it, each in a file of its own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyak.checkpoints.reading.gather import GatheredTensor, Strided
from polyak.checkpoints.reading.layout import DTYPE_BITS, Span, read_spans
from polyak.errors import FormatError

_MAX_CELLS = 4_000_000


class Chunk(ABC):
    """A box of a tensor, from `first`, of size `shape`; where its values lie is found when asked."""

    def __init__(self, first: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self.first = first
        self.shape = shape

    @abstractmethod
    def source(self) -> Strided:
        """Where the values lie. May read, and be called by several threads at once."""


class ChunkedTensor(GatheredTensor):
    """A tensor of chunks. Raises FormatError unless every value lies in exactly one of them."""

    def __init__(
        self, name: str, dtype: str, shape: Sequence[int], chunks: Sequence[Chunk]
    ) -> None:
        super().__init__(name, dtype, shape)
        self.chunks = sorted(
            (chunk for chunk in chunks if math.prod(chunk.shape)), key=lambda chunk: chunk.first
        )
        _check_tiling(self.shape, self.chunks)
        self._first = np.array([chunk.first for chunk in self.chunks], np.int64)
        self._last = self._first + np.array([chunk.shape for chunk in self.chunks], np.int64)
        self._spans: tuple[Span, ...] | None = None

    @property
    def spans(self) -> tuple[Span, ...] | None:
        """The chunks one after the other, where they are slabs of whole rows stored in order."""
        if self._spans is None and self._are_slabs():
            spans = []
            for chunk in self.chunks:
                source, count = chunk.source(), math.prod(chunk.shape)
                if not is_row_major(chunk.shape, source.strides):
                    return None
                spans.append(Span(source.file, source.base, count * source.kind.itemsize))
            self._spans = tuple(spans)
        return self._spans

    def _are_slabs(self) -> bool:
        return all(chunk.shape[1:] == self.shape[1:] for chunk in self.chunks)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `StoredTensor.read_into`."""
        spans = self.spans
        if spans is None:
            super().read_into(start, buffer)
        else:
            read_spans(spans, start, buffer)

    def read_box(self, first: tuple[int, ...], out: NDArray[Any]) -> None:
        """Fill `out` from every chunk that the box touches."""
        begin, end = np.array(first), np.array(first) + out.shape
        touched = ((self._first < end) & (self._last > begin)).all(axis=1)
        for number in np.flatnonzero(touched).tolist():
            low = np.maximum(self._first[number], begin)
            high = np.minimum(self._last[number], end)
            target = out[tuple(map(slice, (low - begin).tolist(), (high - begin).tolist()))]
            inside = (low - self._first[number]).tolist()
            self.chunks[number].source().read_box(inside, target)


def row_major(shape: Sequence[int]) -> list[int]:
    """The strides, in values, of a dense row-major tensor.

    >>> row_major((2, 3, 4))
    [12, 4, 1]
    """
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether values lie one after the other; the stride of a single index does not matter."""
    wanted = row_major(shape)
    return 0 in shape or all(
        size == 1 or stride == want
        for size, stride, want in zip(shape, strides, wanted, strict=True)
    )


def _check_tiling(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
    """On the grid of all edges, every cell must belong to exactly one chunk."""
    for chunk in chunks:
        box = zip(chunk.first, chunk.shape, shape, strict=False)
        if not len(chunk.first) == len(chunk.shape) == len(shape) or any(
            first + size > whole for first, size, whole in box
        ):
            raise FormatError(f"has a chunk at {chunk.first} that leaves its shape {list(shape)}")
    edges = [sorted({0, *(chunk.first[axis] for chunk in chunks)}) for axis in range(len(shape))]
    if math.prod(map(len, edges)) > _MAX_CELLS:
        raise FormatError(f"is cut into more than {_MAX_CELLS} cells")
    covered = np.zeros(tuple(map(len, edges)), bool)
    for chunk in chunks:
        cells = tuple(
            slice(int(np.searchsorted(edge, first)), int(np.searchsorted(edge, first + size)))
            for edge, first, size in zip(edges, chunk.first, chunk.shape, strict=True)
        )
        if covered[cells].any():
            raise FormatError(f"has chunks that overlap, at {chunk.first}")
        covered[cells] = True
    stored = sum(math.prod(chunk.shape) for chunk in chunks)
    if stored != math.prod(shape):
        raise FormatError(
            f"has {math.prod(shape)} values, and {stored} are stored: a rank's file is missing"
        )


def itemsize_of(dtype: str) -> int:
    """Whole bytes a value."""
    return DTYPE_BITS[dtype] // 8
