"""Copies of many small tensors, taken by one call for each kind of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Gathered:
    """Small tensors, of which `take` makes copies by one call for all of a kind.

    A copy costs a microsecond, however small: a model with 150 BatchNorms has 450 statistics. So they
    are laid end to end, and told apart again by `spread` only where somebody reads them.
    """

    def __init__(self, live: Sequence[Tensor]) -> None:
        kinds: dict[object, list[int]] = {}
        for index, tensor in enumerate(live):
            kinds.setdefault((tensor.dtype, tensor.device, _kind(tensor, index)), []).append(index)
        self.kinds = list(kinds.values())
        self.groups = [[live[index] for index in kind] for kind in self.kinds]

    @torch.no_grad()
    def take(self) -> Taken:
        """Copies of the values of now."""
        return Taken(self, [_joined(group) for group in self.groups])


@dataclass(frozen=True)
class Taken:
    """The values at one moment, laid end to end."""

    of: Gathered
    values: list[Tensor]

    @torch.no_grad()
    def spread(self, targets: Sequence[Tensor]) -> None:
        """Write them into one tensor for each of those they were taken of."""
        for indices, group, joined in zip(self.of.kinds, self.of.groups, self.values, strict=True):
            parts = torch.split(joined, [tensor.numel() for tensor in group])
            shaped = [part.view(t.shape) for part, t in zip(parts, group, strict=True)]
            torch._foreach_copy_([targets[index] for index in indices], shaped)


def _kind(tensor: Tensor, index: int) -> object:
    """Scalars are joined by one call and vectors by another; all others stay alone."""
    return tensor.dim() if tensor.dim() < 2 else ("alone", index)


def _joined(group: list[Tensor]) -> Tensor:
    match group[0].dim():
        case 0:
            return torch.stack(group)
        case 1:
            return torch.cat(group)
        case _:
            return group[0].flatten().clone()
