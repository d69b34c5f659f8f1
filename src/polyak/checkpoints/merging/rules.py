"""How the inputs of a chunk become the values of one output: a sum, a sum per tensor, or elected deltas.

A rule is shared by all threads and keeps nothing; a thread lends it `buffers` rows of a chunk, the first of
which holds the result. Inputs come one after the other, in order, the base (if any) before all others.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SUM_TOLERANCE = 1e-6
"""How far from 1 the sum of weights may be that are meant to sum to 1."""

Piece = tuple[str, int, slice]
"""A tensor's name, the first of its values in the chunk, and where in the chunk these are."""


class Part(NamedTuple):
    """What input `number` has in a chunk. first: whether it is the first of its sum; pieces: of which tensors."""

    values: Tensor
    number: int
    first: bool
    pieces: Iterable[Piece] = ()


class Rule(ABC):
    """What one output is.

    coefficients: 0 for an input that need not be read. per_tensor: whether it is told which tensors are
    in a chunk.
    """

    coefficients: Sequence[float]
    buffers: int
    per_tensor: bool

    @abstractmethod
    def add(self, rows: Sequence[Tensor], part: Part) -> None:
        """Take one input's values; those of the first may have any dtype."""

    def finish(self, rows: Sequence[Tensor]) -> None:  # noqa: B027 - most have no more to do
        """Leave the result in the first row, where it is not there already."""


class WeightedSum(Rule):
    """The coefficients of one output, and how an input is added to its sum.

    Coefficients that sum to 1 without a negative one make a running mean, `y += share (x - y)`, for the
    price of a plain sum: what is equal in all inputs (a frozen layer) comes out bitwise as it was.
    """

    buffers = 1
    per_tensor = False

    def __init__(self, coefficients: Sequence[float]) -> None:
        self.coefficients = coefficients
        self._shares: list[float] | None = None
        if min(coefficients) >= 0 and abs(math.fsum(coefficients) - 1) <= SUM_TOLERANCE:
            totals = itertools.accumulate(coefficients)
            self._shares = [c / t if t else 0.0 for c, t in zip(coefficients, totals, strict=True)]

    def add(self, rows: Sequence[Tensor], part: Part) -> None:
        """Add the values, or move the running mean towards them."""
        total = rows[0]
        if part.first:
            total.copy_(part.values)
            if self._shares is None:
                total.mul_(self.coefficients[part.number])
        elif self._shares is None:
            total.add_(part.values, alpha=self.coefficients[part.number])
        else:
            total.lerp_(part.values, self._shares[part.number])


class SumPerTensor(Rule):
    """A weighted sum whose coefficients are a tensor's own, by name."""

    buffers = 1
    per_tensor = True

    def __init__(self, coefficients: Mapping[str, Sequence[float]], inputs: int) -> None:
        self.coefficients = [1.0] * inputs  # each counts in some tensor
        self._sums = {name: WeightedSum(found) for name, found in coefficients.items()}

    def add(self, rows: Sequence[Tensor], part: Part) -> None:
        """Add the values, tensor by tensor."""
        for name, _, where in part.pieces:
            own = Part(part.values[where], part.number, part.first)
            self._sums[name].add([rows[0][where]], own)


Thin = Callable[[Tensor, str, int, int], None]
"""Drops values of a delta in place: (values, tensor's name, input, first value in the tensor)."""


class SumOfDeltas(Rule):
    r"""$b + \lambda \sum_i w_i\, d_i$ of thinned deltas $d_i = \mathrm{thin}(x_i - b)$.

    elect: of each value only the deltas count that have the sign of their sum, and they are averaged by
    their weights in place of summed.
    """

    per_tensor = True

    def __init__(self, weights: Sequence[float], scale: float, thin: Thin, *, elect: bool) -> None:
        self.coefficients = [1.0, *weights]
        self.buffers = 7 if elect else 3
        self._scale, self._thin, self._elect = scale, thin, elect

    def add(self, rows: Sequence[Tensor], part: Part) -> None:
        """Add the thinned deltas of the values."""
        if part.first:
            rows[0].copy_(part.values)
            for row in rows[1:]:
                row.zero_()
            return
        delta, total = rows[1:3]
        torch.sub(part.values, rows[0], out=delta)
        for name, begin, where in part.pieces:
            self._thin(delta[where], name, part.number, begin)
        weight = self.coefficients[part.number]
        if weight != 1:
            delta.mul_(weight)
        total.add_(delta)
        if self._elect:
            other, magnitude, signs, present = rows[3:]
            magnitude.add_(torch.abs(delta, out=other))
            signs.add_(torch.sign(delta, out=other), alpha=weight)
            present.addcmul_(other, other, value=weight)

    def finish(self, rows: Sequence[Tensor]) -> None:
        """Add what was summed, or elected and averaged, to the base."""
        if self._elect:
            # Of the sum s and the sum m of magnitudes, those above 0 have (m + s) / 2, those below (m - s) / 2.
            _, _, total, elected, magnitude, signs, present = rows
            torch.sign(total, out=elected).add_(0.5).sign_()  # 0 counts as positive
            present.addcmul_(signs, elected)
            total.addcmul_(magnitude, elected).div_(
                present.clamp_(min=torch.finfo(total.dtype).tiny)
            )
        rows[0].add_(rows[2], alpha=self._scale)
