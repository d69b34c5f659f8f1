"""`Deferred`: values that are computed when they are written, a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deferred:
    """A part of a tensor that `compute` returns, given its spans: from, to in each dimension."""

    dtype: torch.dtype
    spans: Sequence[tuple[int, int]]
    compute: Callable[[Sequence[tuple[int, int]]], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size in each dimension."""
        return tuple(stop - start for start, stop in self.spans)

    @property
    def nbytes(self) -> int:
        """How large it is."""
        return self.numel() * self.dtype.itemsize

    def dim(self) -> int:
        """How many dimensions it has."""
        return len(self.spans)

    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def detach(self) -> Deferred:
        """Itself, which takes no gradients."""
        return self

    def narrow(self, dim: int, start: int, length: int) -> Deferred:
        """A part of it."""
        first = self.spans[dim][0] + start
        spans = [*self.spans[:dim], (first, first + length), *self.spans[dim + 1 :]]
        return replace(self, spans=spans)

    def load(self) -> Tensor:
        """Its values."""
        return self.compute(self.spans)
