"""Which weights are lent without a copy of their average, though they are narrower than it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set

import torch
from torch import Tensor

from polyak.tensors.memory import address, copy_on_write
from polyak.tensors.packed import Packed, Scratch, can_be_packed, nan_free, span

# Copies are faster, so the smallest weights are copied: with the scratch, in 64 MB in all.
_COPIED_BYTES = {"cpu": 56 << 20}
_COPIED_BYTES_ELSEWHERE = 3 << 19  # the scratch is larger there


def to_pack(
    weights: Sequence[Tensor], averages: Sequence[Tensor], stay: Set[int], refused: Set[int]
) -> dict[int, Packed]:
    """Those that are packed with their average, by index: all but the smallest, if they can be.

    stay: the ids of weights that are lent in place. The others are shared copy-on-write, so that what is
    written to them in the block is not written to the average. refused: ids to leave out.
    """
    found = [
        i
        for i, (weight, average) in enumerate(zip(weights, averages, strict=True))
        if id(weight) not in refused
        and can_be_packed(weight, average)
        and (id(weight) in stay or copy_on_write(weight) is not None)
    ]
    left_out = _small(found, weights) | _overlapping(found, weights)
    found = [i for i in found if i not in left_out]
    free = nan_free([averages[i] for i in found])  # no rounding that can be undone keeps every NaN
    found = [i for i, is_free in zip(found, free, strict=True) if is_free]
    scratch = {
        device: Scratch.for_([weights[i] for i in found if weights[i].device == device])
        for device in {weights[i].device for i in found}
    }
    return {i: _pair(weights[i], averages[i], scratch[weights[i].device], stay) for i in found}


def _pair(weight: Tensor, average: Tensor, scratch: Scratch, stay: Set[int]) -> Packed:
    if id(weight) in stay:
        return Packed(weight.detach(), average, scratch, in_place=True)
    # Autograd does not see what is written to `data`: what it has saved is right again after the loan.
    return Packed(weight.data, average, scratch, in_place=False)


def _small(indices: Iterable[int], weights: Sequence[Tensor]) -> set[int]:
    """The smallest on each device, as many as may be copied."""
    so_far, found = Counter[torch.device](), set()
    for index in sorted(indices, key=lambda i: weights[i].numel()):
        device = weights[index].device
        so_far[device] += weights[index].numel() * weights[index].element_size()
        if so_far[device] <= _COPIED_BYTES.get(device.type, _COPIED_BYTES_ELSEWHERE):
            found.add(index)
    return found


def _overlapping(indices: Iterable[int], weights: Sequence[Tensor]) -> set[int]:
    """Those that share memory with another one, as views of one storage may."""
    starts = {i: _start(weights[i]) for i in indices}
    found, last_end, last = set(), 0, -1
    for index in sorted(starts, key=starts.__getitem__):
        if starts[index] < last_end:
            found |= {index, last}
        if (end := starts[index] + span(weights[index])) > last_end:
            last_end, last = end, index
    return found


def _start(tensor: Tensor) -> int:
    return address(tensor) + int(tensor.storage_offset()) * tensor.element_size()
