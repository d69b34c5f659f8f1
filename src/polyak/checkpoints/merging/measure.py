"""What a combination has to know of the inputs before it can be made: angles, and the k-th largest change.

Both read the inputs once, tensor by tensor, in pieces: nothing is held but counts and a few candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from polyak.checkpoints.merging.align import MergedTensor
from polyak.checkpoints.reading.stored import TORCH_DTYPES, StoredTensor, accumulator, itemsize

_PIECE = 1 << 16
_WHOLE = 1 << 20  # up to so many values are sorted as they are
_SAMPLE, _RUN = 1 << 18, 1 << 12

Found = TypeVar("Found")


def per_tensor(
    tensors: Sequence[MergedTensor], find: Callable[[MergedTensor], Found], threads: int
) -> Mapping[str, Found]:
    """What `find` finds for each tensor that is averaged, by name; in threads of one torch thread each."""
    wanted = [tensor for tensor in tensors if tensor.mean and _size(tensor)]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(find, wanted))
    finally:
        torch.set_num_threads(before)
    return {tensor.name: one for tensor, one in zip(wanted, found, strict=True)}


def gram_matrix(tensor: MergedTensor, *, has_base: bool) -> Any:
    """Products of every two inputs (of their differences to the first, if that is the base), in float64."""
    sources = [source for source in tensor.sources if source is not None]
    total = np.zeros((len(sources) - has_base,) * 2)
    for begin in range(0, _size(tensor), _PIECE):
        end = min(begin + _PIECE, _size(tensor))
        rows = torch.stack([_read(source, tensor, begin, end).double() for source in sources])
        if has_base:
            rows = rows[1:] - rows[0]
        total += (rows @ rows.T).numpy()
    return total


def kth_largest_changes(tensor: MergedTensor, density: float) -> list[float]:
    """Per input the magnitude that a share `density` of its changes |x - base| reaches; the base's is 0."""
    base, *others = [source for source in tensor.sources if source is not None]
    kept = max(1, int(density * _size(tensor)))
    return [0.0, *(_kth_largest(tensor, base, one, kept) for one in others)]


def _kth_largest(tensor: MergedTensor, base: StoredTensor, other: StoredTensor, kept: int) -> float:
    """Exactly: a sample brackets the value, and a pass over all counts what is outside of the bracket."""
    size = _size(tensor)
    if kept >= size:
        return 0.0
    if size <= _WHOLE:
        changes = _changes(tensor, base, other, 0, size).numpy()
        return float(np.partition(changes, size - kept)[size - kept])
    step = size // (_SAMPLE // _RUN)
    runs = [_changes(tensor, base, other, at, at + _RUN) for at in range(0, size - _RUN, step)]
    sample = torch.cat(runs).sort().values
    middle, width = round((1 - kept / size) * (len(sample) - 1)), len(sample) // 200
    while True:  # ends: with the whole sample as bracket nothing is outside of it but the two tails
        low, high = (
            float(sample[min(max(middle + by, 0), len(sample) - 1)]) for by in (-width, width)
        )
        whole = width >= len(sample)
        low, high = (-1.0, float("inf")) if whole else (low, high)
        if (found := _within(tensor, base, other, kept, low, high)) is not None:
            return found
        width *= 8


def _within(
    tensor: MergedTensor,
    base: StoredTensor,
    other: StoredTensor,
    kept: int,
    low: float,
    high: float,
) -> float | None:
    """The value, if it is from low to high. Those that equal a bound are counted and not held."""
    above = at_high = from_low = 0
    inside: list[Tensor] = []
    for begin in range(0, _size(tensor), _PIECE):
        changes = _changes(tensor, base, other, begin, min(begin + _PIECE, _size(tensor)))
        from_low += int((changes >= low).sum())
        over = changes > high
        above += int(over.sum())
        at_high += int((changes == high).sum())
        inside.append(changes[(changes > low) & (changes < high)])
    between = torch.cat(inside).numpy()
    rank = kept - above - at_high
    if rank <= 0:
        return high if kept > above else None
    if rank <= len(between):
        return float(np.partition(between, len(between) - rank)[len(between) - rank])
    return low if kept <= from_low else None


def _changes(
    tensor: MergedTensor, base: StoredTensor, other: StoredTensor, begin: int, end: int
) -> Tensor:
    """|other - base|, and infinity for what is no number, so that nothing is hidden by it."""
    dtype = accumulator(tensor.numbers[0]) if tensor.numbers else torch.float32
    first, second = (_read(one, tensor, begin, end).to(dtype) for one in (base, other))
    return second.sub_(first).abs_().nan_to_num_(nan=float("inf"), posinf=float("inf"))


def _read(source: StoredTensor, tensor: MergedTensor, begin: int, end: int) -> Tensor:
    dtype = tensor.numbers[0] if tensor.numbers else source.dtype
    size = itemsize(dtype)
    raw = bytearray((end - begin) * size)
    source.read_into(begin * size, memoryview(raw))
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[dtype])


def _size(tensor: MergedTensor) -> int:
    source = tensor.sources[-1]
    dtype = tensor.numbers[0] if tensor.numbers else tensor.dtype
    return 0 if source is None else source.nbytes // itemsize(dtype)
