"""Copies of many small tensors, taken by one call for each kind of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Gathered:
    """Small tensors, as they were when `take` was called last: one call for all of a kind.

    A copy costs a microsecond, however small: a model with 150 BatchNorms has 450 statistics. So they
    are laid end to end, and told apart again by `spread` only where somebody reads them.
    """

    def __init__(self, live: Sequence[Tensor]) -> None:
        self.live = live
        kinds: dict[object, list[int]] = {}
        for index, tensor in enumerate(live):
            kinds.setdefault((tensor.dtype, tensor.device, _kind(tensor, index)), []).append(index)
        self._kinds = list(kinds.values())
        self._groups = [[live[index] for index in kind] for kind in self._kinds]

    def take(self) -> list[Tensor]:
        """The values of now, for `spread`."""
        return [_joined(group) for group in self._groups]

    def spread(self, taken: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Write what was taken into one tensor for each of the live ones."""
        for indices, group, joined in zip(self._kinds, self._groups, taken, strict=True):
            parts = joined.split([tensor.numel() for tensor in group])
            shaped = [part.view(t.shape) for part, t in zip(parts, group, strict=True)]
            torch._foreach_copy_([targets[index] for index in indices], shaped)


def _kind(tensor: Tensor, index: int) -> object:
    """What can be joined by one call: scalars, and vectors. All others by one for each."""
    return tensor.dim() if tensor.dim() < 2 else ("alone", index)


def _joined(group: list[Tensor]) -> Tensor:
    match group[0].dim():
        case 0:
            return torch.stack(group)
        case 1:
            return torch.cat(group)
        case _:
            return group[0].flatten().clone()
