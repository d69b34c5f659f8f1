"""Boxes of values gathered from files where they lie in another order, in bounded memory."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyak.checkpoints.reading.layout import DTYPE_BITS, ByteFile, StoredTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The first index and the size along every dimension."""

SCRATCH_BYTES = 4 << 20
"""The most that one read fetches to pick values from."""

_WASTE = 16  # rather than many small reads, fetch up to so many times what is wanted


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Values `start` to `stop` in row-major order, as boxes: at most two a dimension.

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
    """Values of one size in a file, `strides` apart: `base + sum(index * stride)` values from 0.

    file: where. base: bytes. strides: in values, one a dimension. itemsize: bytes a value.
    """

    def __init__(self, file: ByteFile, base: int, strides: Sequence[int], itemsize: int) -> None:
        self.file, self.base, self.strides = file, base, tuple(strides)
        self.kind = value_kind(itemsize)

    def read_box(self, first: Sequence[int], out: NDArray[Any]) -> None:
        """Fill `out` with the box that begins at `first` and has the shape of `out`.

        The dimensions are walked in the order of storage; the innermost that fit the scratch, without
        much in between that is not wanted, are fetched by one read.
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
        """Many runs of `length` values each, `strides` apart, read one by one and moved at once."""
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
                return split  # nothing in between: read as one, into place if it lies in order
        return len(sizes)

    def _fetch(self, start: int, strides: tuple[int, ...], out: NDArray[Any]) -> None:
        """One read; straight into `out` where nothing needs to move."""
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
    """A NumPy dtype that moves values of so many bytes."""
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
        itemsize = DTYPE_BITS[self.dtype] // 8
        before, stop = start % itemsize, start + len(buffer)
        if before or stop % itemsize:  # not whole values: gather a few bytes more
            whole = bytearray(-(-stop // itemsize) * itemsize - (start - before))
            self._read_values(start - before, memoryview(whole), itemsize)
            buffer[:] = memoryview(whole)[before : before + len(buffer)]
        else:
            self._read_values(start, buffer, itemsize)

    def _read_values(self, start: int, buffer: memoryview, itemsize: int) -> None:
        values = np.frombuffer(buffer, np.uint8).view(value_kind(itemsize))
        done, begin = 0, start // itemsize
        for first, size in boxes(self.shape, begin, begin + len(values)):
            count = math.prod(size)
            self.read_box(first, values[done : done + count].reshape(size))
            done += count

    @abstractmethod
    def read_box(self, first: tuple[int, ...], out: NDArray[Any]) -> None:
        """Fill `out` with the box of its shape that begins at `first`."""
