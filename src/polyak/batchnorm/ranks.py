"""Merging the moments of every rank of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from polyak.batchnorm.recording import Recorder


def is_distributed() -> bool:
    """Whether there are other ranks to merge with."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def merge_ranks(recorders: Sequence[Recorder], n_batches: int) -> int:
    """Merge each layer's moments over all ranks, in rank order; returns the batches of all.

    Every rank must come here, with the same layers; each ends with the same bits.
    """
    if not is_distributed():
        return n_batches
    mine = _packed(recorders, n_batches)
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, mine)
    for recorder in recorders:
        recorder.calls = 0
        recorder.moments = type(recorder.moments).empty(recorder.moments.mean)
    return sum(_merge_part(recorders, part) for part in parts)


def _packed(recorders: Sequence[Recorder], n_batches: int) -> Tensor:
    """One vector: the batches, then count, calls, means and spreads layer by layer."""
    device, dtype = recorders[0].moments.mean.device, recorders[0].moments.mean.dtype
    pieces = [torch.tensor([n_batches], dtype=dtype)]
    for recorder in recorders:
        moments = recorder.moments
        pieces.append(torch.tensor([moments.count, recorder.calls], dtype=dtype))
        pieces += [moments.mean, moments.spread]
    return torch.cat([piece.to(device, dtype) for piece in pieces])


def _merge_part(recorders: Sequence[Recorder], part: Tensor) -> int:
    position = 1
    for recorder in recorders:
        moments = recorder.moments
        n_channels = moments.mean.numel()
        count, calls = part[position : position + 2].tolist()
        flat = part[position + 2 : position + 2 + 2 * n_channels].to(moments.mean)
        mean, spread = flat.view(2, n_channels)
        moments.merge(count, mean, spread)
        recorder.calls += int(calls)
        position += 2 + 2 * n_channels
    return int(part[0])
