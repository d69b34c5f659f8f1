"""What a combination has to know of the inputs before it can be made: angles, and the k-th largest change.

Both read the inputs once, tensor by tensor, in pieces: nothing is held but counts and a few candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from polyak.checkpoints.merging.align import MergedTensor
from polyak.checkpoints.reading.stored import TORCH_DTYPES, accumulator, itemsize

_PIECE = 1 << 16
_SAMPLE, _RUN = 1 << 15, 1 << 8
_SUMMED = 1 << 9  # products that are summed in float32
_LONG = 8 * _SUMMED  # values of a row; float64 is as fast for fewer
_SMALL = 1e-25  # a sum of squares of a piece, of which the largest are far from the smallest number
_memory = threading.local()  # buffers of each thread, for the inputs and for the base

Found = TypeVar("Found")


@dataclass(frozen=True)
class Inputs:
    """The inputs of a combination: tensors whose sources begin with the base, if there is one.

    weights: one per input, without the base.
    """

    tensors: Sequence[MergedTensor]
    weights: Sequence[float]
    has_base: bool
    threads: int

    def each(self, find: Callable[[MergedTensor], Found]) -> Mapping[str, Found]:
        """What `find` finds for each tensor that is averaged, by name; in threads of one torch thread each."""
        wanted = [tensor for tensor in self.tensors if tensor.mean and values_of(tensor)]
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.threads, "", torch.set_num_threads, (1,)) as pool:
                found = list(pool.map(find, wanted))
        finally:
            torch.set_num_threads(before)
        return {tensor.name: one for tensor, one in zip(wanted, found, strict=True)}


def gram_matrix(tensor: MergedTensor, *, has_base: bool) -> Any:
    """Products of every two inputs (of their differences to the first, if that is the base), in float64.

    Those of float32 or less are summed in float32 over short runs: within 3e-7 of the product of two norms.
    """
    inputs, dtype = len(tensor.sources) - has_base, _dtype(tensor)
    total = np.zeros((inputs, inputs))
    rows = torch.empty(inputs, min(_PIECE, values_of(tensor)), dtype=dtype)
    for begin in range(0, values_of(tensor), _PIECE):
        end = min(begin + _PIECE, values_of(tensor))
        base = _read(tensor, 0, begin, end, "base").to(dtype) if has_base else None
        for row, index in zip(rows, range(has_base, len(tensor.sources)), strict=True):
            values = _read(tensor, index, begin, end, "input")
            if base is None:
                row[: end - begin] = values
            else:
                torch.sub(values, base, out=row[: end - begin])
        total += _products(rows[:, : end - begin])
    return total


def _products(rows: Tensor) -> Any:
    """Of every two rows; in float64 throughout where float32 would round squares to 0 or to infinity.

    Also where torch may multiply float32 in fewer bits, and of short rows, whose runs are too few to cancel errors.
    """
    even = rows.shape[1] // _SUMMED * _SUMMED
    if rows.dtype == torch.float32 and even >= _LONG and _multiplies_exactly():
        runs = rows[:, :even].reshape(len(rows), -1, _SUMMED).transpose(0, 1)
        rest = rows[:, even:].double()
        found = torch.bmm(runs, runs.mT).double().sum(0) + rest @ rest.T
        squares = found.diagonal()
        if bool(((squares > _SMALL) & squares.isfinite()).all()):
            return found.numpy()
    wide = rows.double()
    return (wide @ wide.T).numpy()


def _multiplies_exactly() -> bool:
    """Unless asked for less on CPUs; `torch.get_float32_matmul_precision` raises where that was done by backend."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time
    return matmul.fp32_precision in ("none", "ieee")


def kth_largest_changes(tensor: MergedTensor, density: float) -> list[float]:
    """Per input the magnitude that a share `density` of its changes |x - base| reaches; the base's is 0.

    Exactly: a sample brackets each, and one pass over all values counts what is outside of the brackets and
    keeps what is inside. Values that equal a bound are only counted, however many they are.
    """
    size, inputs = values_of(tensor), range(1, len(tensor.sources))
    kept = max(1, int(density * size))
    if kept == size:
        return [0.0] * len(tensor.sources)
    found = {}
    samples, share = _samples(tensor), 0.005
    while missing := [index for index in inputs if index not in found]:
        bounds = {index: _bracket(samples[index], kept / size, share) for index in missing}
        counts = {index: _Counts(*bounds[index]) for index in missing}
        for begin in range(0, size, _PIECE):
            for index, changes in _changes(tensor, missing, begin, min(begin + _PIECE, size)):
                counts[index].add(changes)
        for index in missing:
            value = counts[index].kth_largest(kept)
            if value is None and share > 1:
                value = 0.0  # there are NaN, which merging will find and name
            if value is not None:
                found[index] = value
        share *= 8
    return [0.0, *(found[index] for index in inputs)]


class _Counts:
    """How many of the values that are added are above, in and at the bounds of a bracket."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high
        self._above = self._at_high = self._within = 0
        self._inside: list[Any] = []

    def add(self, values: Any) -> None:
        above = values > self._high
        within = values[(values >= self._low) ^ above]  # few, unless many equal a bound
        self._above += int(np.count_nonzero(above))
        self._within += len(within)
        self._at_high += int(np.count_nonzero(within == self._high))
        self._inside.append(within[(within > self._low) & (within < self._high)])

    def kth_largest(self, kept: int) -> float | None:
        """The value, if it is from low to high."""
        rank = kept - self._above - self._at_high
        if rank <= 0:
            return self._high if kept > self._above else None
        between = np.concatenate(self._inside)
        if rank <= len(between):
            return float(np.partition(between, len(between) - rank)[len(between) - rank])
        return self._low if kept <= self._above + self._within else None


def _samples(tensor: MergedTensor) -> dict[int, Any]:
    """Per input some of its changes, in runs from everywhere, sorted."""
    size, inputs = values_of(tensor), range(1, len(tensor.sources))
    runs: dict[int, list[Any]] = {index: [] for index in inputs}
    for begin in range(0, size, max(_RUN, size // (_SAMPLE // _RUN))):
        for index, changes in _changes(tensor, inputs, begin, min(begin + _RUN, size)):
            runs[index].append(changes.copy())
    return {index: np.sort(np.concatenate(found)) for index, found in runs.items()}


def _bracket(sample: Any, density: float, share: float) -> tuple[float, float]:
    """Bounds around the quantile, by a share of the sample to each side; all there is where that is 1."""
    if share > 1:
        return -1.0, float("inf")
    middle, width, last = (1 - density) * len(sample), share * len(sample) + 8, len(sample) - 1
    low, high = (sample[int(min(max(middle + by, 0), last))] for by in (-width, width))
    return float(low), float(high)


def _changes(
    tensor: MergedTensor, inputs: Iterable[int], begin: int, end: int
) -> Iterator[tuple[int, Any]]:
    """Of each of these inputs |x - base|, until the next is taken, in the dtype that sums run in."""
    dtype = _dtype(tensor)
    base = _read(tensor, 0, begin, end, "base").to(dtype)
    for index in inputs:
        values = _read(tensor, index, begin, end, "input").to(dtype)
        yield index, values.sub_(base).abs_().numpy()


def _dtype(tensor: MergedTensor) -> torch.dtype:
    """That sums of its values run in."""
    return accumulator(tensor.numbers[0]) if tensor.numbers else torch.float32


def _read(tensor: MergedTensor, index: int, begin: int, end: int, buffer: str) -> Tensor:
    """Values of an input in one of the thread's buffers, which is as large as a piece."""
    source = tensor.sources[index]
    dtype = tensor.numbers[0] if tensor.numbers else tensor.dtype
    size = itemsize(dtype)
    if not hasattr(_memory, buffer):
        setattr(_memory, buffer, bytearray(_PIECE * 8))
    raw = memoryview(getattr(_memory, buffer))[: (end - begin) * size]
    if source is not None:  # as every input of what is averaged is
        source.read_into(begin * size, raw)
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[dtype])


def values_of(tensor: MergedTensor) -> int:
    """How many values it has."""
    source = tensor.sources[-1]
    dtype = tensor.numbers[0] if tensor.numbers else tensor.dtype
    return 0 if source is None else source.nbytes // itemsize(dtype)
