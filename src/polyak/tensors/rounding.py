"""Rounding to bfloat16, in the one way in which every average leaves its accumulators.

To the nearest value, and what lies exactly between two of them away from zero (torch rounds that to the
even one): the way that a loan without a copy can undo (`packed.py`). So what was evaluated is what is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.tensors.blend import paired_parts

_WIDE = (torch.float32, torch.float64)
_PIECE = {"cpu": 1 << 18}  # values at a time: in the second cache on a CPU, few launches elsewhere
_PIECE_ELSEWHERE = 1 << 22


def piece_values(device: torch.device) -> int:
    """How many values are converted at a time."""
    return _PIECE.get(device.type, _PIECE_ELSEWHERE)


@torch.no_grad()
def copy_rounded(target: Tensor, source: Tensor) -> Tensor:
    """`target.copy_(source)` of an average, with ties away from zero where the target is bfloat16."""
    if target.dtype is not torch.bfloat16 or source.dtype not in _WIDE:
        return target.copy_(source)
    here = target.device == source.device and not target.is_neg()
    rounded = target if here else torch.empty_like(source, dtype=torch.bfloat16)
    limit = min(source.numel(), piece_values(source.device))
    room = torch.empty(limit, dtype=torch.int32, device=source.device)
    for x, y in paired_parts(source, rounded, at_most=limit):
        bits = room[: x.numel()].view(x.shape)
        torch.add(x.float().view(torch.int32), 0x8000, out=bits).bitwise_right_shift_(16)
        y.view(torch.int16).copy_(bits)
        if not _is_without_nan(x):
            y.masked_fill_(x.isnan(), torch.nan)
    return target if here else target.copy_(rounded)


def _is_without_nan(values: Tensor) -> bool:
    """Whether that is certain, and fast to tell: not where a device computes, or nothing does."""
    here = values.device.type == "cpu" and type(values.detach()) is Tensor
    return here and not bool(values.sum().isnan())


def rounded_for(target: Tensor, source: Tensor) -> Tensor:
    """What `target` is to become of an average: rounded as above where the target is bfloat16."""
    if target.dtype is not torch.bfloat16 or source.dtype not in _WIDE:
        return source
    return copy_rounded(torch.empty_like(source, dtype=torch.bfloat16), source)
