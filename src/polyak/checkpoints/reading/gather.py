"""Tensors whose row-major bytes are not one run in a file: strided, chunked, or big-endian.

All of them are read in bounded memory: a request for row-major bytes is cut into boxes of values, and
each box is gathered from where its values are stored.
"""

from __future__ import annotations

import itertools
import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyak.checkpoints.reading.stored import (
    COMPLEX_PARTS,
    ByteFile,
    Span,
    StoredTensor,
    itemsize,
    read_spans,
)
from polyak.errors import FormatError

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The first index and the size along every dimension."""

SCRATCH_BYTES = 4 << 20
"""The most that one read fetches to pick values from."""

_WASTE = 16  # rather than many small reads, fetch up to this many times what is wanted


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Values `start` to `stop` in row-major order, as boxes: at most two per dimension.

    >>> list(boxes((3, 4), 2, 9))
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    (first, begin), (last, end) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        yield from _in_row(first, shape, begin, end)
        return
    if begin:
        yield from _in_row(first, shape, begin, inner)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if end:
        yield from _in_row(last, shape, 0, end)


def _in_row(row: int, shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    for first, size in boxes(shape[1:], begin, end):
        yield (row, *first), (1, *size)


class Strided:
    """Values in a file at `base + itemsize * sum(index * stride)`.

    base: in bytes. strides: in values, one per dimension. itemsize: bytes per value.
    """

    def __init__(self, file: ByteFile, base: int, strides: Sequence[int], itemsize: int) -> None:
        self.file, self.base, self.strides = file, base, tuple(strides)
        self.kind = value_kind(itemsize)

    def read_box(self, first: Sequence[int], out: NDArray[Any]) -> None:
        """Fill `out` with the box that begins at `first` and has the shape of `out`.

        The dimensions are walked in storage order. As many of the innermost as fit the scratch memory,
        without too many unwanted values in between, are fetched by one read.
        """
        start = sum(index * stride for index, stride in zip(first, self.strides, strict=True))
        order = sorted(
            (axis for axis, size in enumerate(out.shape) if size > 1),
            key=lambda axis: -self.strides[axis],
        )
        strides = tuple(self.strides[axis] for axis in order)
        single = [axis for axis, size in enumerate(out.shape) if size == 1]
        index: tuple[Any, ...] = (..., *(0 for _ in single))
        view = out.transpose(*order, *single)[index]
        split = self._split(view.shape, strides)
        inner = _extent(view.shape[split:], strides[split:])
        if split and inner == math.prod(view.shape[split:]):
            self._fetch_runs(start, strides[:split], view, inner)
            return
        for outer in np.ndindex(*view.shape[:split]):
            skip = sum(index * stride for index, stride in zip(outer, strides, strict=False))
            self._fetch(start + skip, strides[split:], view[(*outer, ...)])

    def _fetch_runs(
        self, start: int, strides: tuple[int, ...], out: NDArray[Any], length: int
    ) -> None:
        """Read runs of `length` values each, `strides` apart, one by one, and move them all at once."""
        offsets = np.array([self.base + start * self.kind.itemsize])
        for size, stride in zip(out.shape, strides, strict=False):
            offsets = np.add.outer(offsets, np.arange(size) * (stride * self.kind.itemsize))
        scratch = np.empty(out.shape, self.kind)
        memory, run = scratch.reshape(-1).view(np.uint8).data, length * self.kind.itemsize
        for number, offset in enumerate(offsets.reshape(-1).tolist()):
            self.file.read_into(offset, memory[number * run : (number + 1) * run])
        out[...] = scratch

    def _split(self, sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
        """The number of outer dimensions to loop over."""
        for split in range(len(sizes)):
            wanted = math.prod(sizes[split:])
            extent = _extent(sizes[split:], strides[split:])
            if extent * self.kind.itemsize <= SCRATCH_BYTES and extent <= _WASTE * wanted:
                return split
            if extent == wanted:
                return (
                    split  # no unwanted values: one read, straight into place if in row-major order
                )
        return len(sizes)

    def _fetch(self, start: int, strides: tuple[int, ...], out: NDArray[Any]) -> None:
        """One read per scratch of rows; a single one straight into `out` if no value has to move."""
        offset = self.base + start * self.kind.itemsize
        extent = _extent(out.shape, strides)
        if extent == out.size and out.flags.c_contiguous:
            self.file.read_into(offset, out.reshape(-1).view(np.uint8).data)
            return
        for begin in range(0, out.shape[0], step := _rows(out, strides, self.kind.itemsize)):
            part = out[begin : begin + step]
            scratch = np.empty(_extent(part.shape, strides), self.kind)
            self.file.read_into(
                offset + begin * strides[0] * self.kind.itemsize,
                scratch.view(np.uint8).data,
            )
            part[...] = np.lib.stride_tricks.as_strided(
                scratch, part.shape, [stride * self.kind.itemsize for stride in strides]
            )


def value_kind(itemsize: int) -> np.dtype[Any]:
    """A NumPy dtype to move values of `itemsize` bytes with."""
    return np.dtype("c16") if itemsize == 16 else np.dtype(f"u{itemsize}")


def _extent(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """From the first value of a box to the last, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _rows(out: NDArray[Any], strides: tuple[int, ...], itemsize: int) -> int:
    """How many rows of the outermost dimension one scratch holds."""
    inner = _extent(out.shape[1:], strides[1:]) * itemsize
    return 1 + max(0, SCRATCH_BYTES - inner) // (strides[0] * itemsize)


class GatheredTensor(StoredTensor):
    """A tensor whose row-major bytes are gathered, box by box, by `read_box`."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `StoredTensor.read_into`."""
        size = itemsize(self.dtype)
        before, stop = start % size, start + len(buffer)
        if before or stop % size:  # not whole values: gather a few bytes more
            whole = bytearray(-(-stop // size) * size - (start - before))
            self._read_values(start - before, memoryview(whole), size)
            buffer[:] = memoryview(whole)[before : before + len(buffer)]
        else:
            self._read_values(start, buffer, size)

    def _read_values(self, start: int, buffer: memoryview, size: int) -> None:
        values = np.frombuffer(buffer, np.uint8).view(value_kind(size))
        done, begin = 0, start // size
        for first, sizes in boxes(self.shape, begin, begin + len(values)):
            count = math.prod(sizes)
            self.read_box(first, values[done : done + count].reshape(sizes))
            done += count

    @abstractmethod
    def read_box(self, first: tuple[int, ...], out: NDArray[Any]) -> None:
        """Fill `out` with the box of its shape that begins at `first`."""


TILE_BYTES = 4 << 20
"""What is gathered at once. A transposed matrix costs one small read per column however many rows are
fetched, so fetching more rows at once means fewer reads."""

MAX_TILES = 16
"""Tiles kept at most, of all tensors; each is dropped when it has been read to its end."""


class StridedTensor(GatheredTensor):
    """A view of a storage whose values are not in row-major order: transposed, channels last, sliced."""

    def __init__(self, name: str, dtype: str, shape: Sequence[int], source: Strided) -> None:
        super().__init__(name, dtype, shape)
        self.source = source
        self.serial = next(_SERIALS)
        self._lock = threading.Lock()

    @property
    def storage_order(self) -> tuple[int, ...]:
        """The dimensions from the slowest to the fastest as stored."""
        axes = range(len(self.shape))
        return tuple(sorted(axes, key=lambda axis: -self.source.strides[axis]))

    def in_storage_order(self) -> StoredTensor:
        """The same values with the dimensions permuted by `storage_order`, which is cheap to read."""
        order, source = self.storage_order, self.source
        strides = [source.strides[axis] for axis in order]
        permuted = Strided(source.file, source.base, strides, source.kind.itemsize)
        return StridedTensor(self.name, self.dtype, [self.shape[axis] for axis in order], permuted)

    def read_box(self, first: tuple[int, ...], out: NDArray[Any]) -> None:
        """Fill `out` from the storage."""
        self.source.read_box(first, out)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`, small pieces from tiles; see `StoredTensor.read_into`."""
        if len(buffer) >= TILE_BYTES or self.storage_order == tuple(range(len(self.shape))):
            super().read_into(start, buffer)
            return
        done = 0
        while done < len(buffer):
            number, skip = divmod(start + done, TILE_BYTES)
            take = min(TILE_BYTES - skip, len(buffer) - done)
            with self._lock:
                tile = self._tile(number)
                buffer[done : done + take] = tile[skip : skip + take]
                if skip + take == len(tile):
                    _TILES.drop((self.serial, number))
            done += take

    def _tile(self, number: int) -> memoryview:
        tile = _TILES.get((self.serial, number))
        if tile is None:
            start = number * TILE_BYTES
            tile = memoryview(bytearray(min(TILE_BYTES, self.nbytes - start)))
            super().read_into(start, tile)
            _TILES.put((self.serial, number), tile)
        return tile


class _Tiles:
    """The tiles gathered last; shared by all tensors, so that their memory is bounded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], memoryview] = OrderedDict()

    def get(self, key: tuple[int, int]) -> memoryview | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: tuple[int, int], tile: memoryview) -> None:
        with self._lock:
            self._kept[key] = tile
            while len(self._kept) > MAX_TILES:
                self._kept.popitem(last=False)

    def drop(self, key: tuple[int, int]) -> None:
        with self._lock:
            self._kept.pop(key, None)


_SERIALS = itertools.count()
_TILES = _Tiles()


_MAX_CELLS = 4_000_000


class StoredChunk(ABC):
    """A box of a tensor, from `first`, of size `shape`; where its values are is found on request."""

    def __init__(self, first: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self.first = first
        self.shape = shape

    @abstractmethod
    def source(self) -> Strided:
        """Where the values are. May read; several threads may call it at once."""


class ChunkedTensor(GatheredTensor):
    """A tensor in chunks. Raises FormatError unless every value is in exactly one of them."""

    def __init__(
        self, name: str, dtype: str, shape: Sequence[int], chunks: Sequence[StoredChunk]
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
        """The chunks one after the other, if they are slabs of whole rows stored in order."""
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
    """Whether values are one after the other; the stride of a dimension of size 1 does not matter."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def _check_tiling(shape: tuple[int, ...], chunks: Sequence[StoredChunk]) -> None:
    """On the grid of all edges, every cell must belong to exactly one chunk."""
    for chunk in chunks:
        box = zip(chunk.first, chunk.shape, shape, strict=False)
        if not len(chunk.first) == len(chunk.shape) == len(shape) or any(
            first + size > whole for first, size, whole in box
        ):
            raise FormatError(
                f"It has a chunk at {chunk.first} that exceeds its shape {list(shape)}."
            )
    edges = [sorted({0, *(chunk.first[axis] for chunk in chunks)}) for axis in range(len(shape))]
    if math.prod(map(len, edges)) > _MAX_CELLS:
        raise FormatError(f"It is cut into more than {_MAX_CELLS} cells.")
    covered = np.zeros(tuple(map(len, edges)), bool)
    for chunk in chunks:
        cells = tuple(
            slice(int(np.searchsorted(edge, first)), int(np.searchsorted(edge, first + size)))
            for edge, first, size in zip(edges, chunk.first, chunk.shape, strict=True)
        )
        if covered[cells].any():
            raise FormatError(f"It has chunks that overlap, at {chunk.first}.")
        covered[cells] = True
    stored = sum(math.prod(chunk.shape) for chunk in chunks)
    if stored != math.prod(shape):
        raise FormatError(
            f"It has {math.prod(shape)} values, and {stored} are stored: a rank's file is missing."
        )


class SwappedTensor(StoredTensor):
    """A tensor that is stored big-endian."""

    def __init__(self, stored: StoredTensor) -> None:
        super().__init__(stored.name, stored.dtype, stored.shape)
        self.stored = stored
        parts = 2 if stored.dtype in COMPLEX_PARTS else 1
        self.word = itemsize(stored.dtype) // parts

    @property
    def storage_order(self) -> tuple[int, ...]:
        """As stored."""
        return self.stored.storage_order

    def in_storage_order(self) -> StoredTensor:
        """As stored, swapped."""
        return SwappedTensor(self.stored.in_storage_order())

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `StoredTensor.read_into`."""
        before, stop = start % self.word, start + len(buffer)
        if before or stop % self.word:
            whole = bytearray(-(-stop // self.word) * self.word - (start - before))
            self.read_into(start - before, memoryview(whole))
            buffer[:] = memoryview(whole)[before : before + len(buffer)]
            return
        self.stored.read_into(start, buffer)
        np.frombuffer(buffer, np.uint8).view(f"u{self.word}").byteswap(inplace=True)
