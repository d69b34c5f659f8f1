"""How the inputs of a chunk become the values of one output: a sum, a sum per tensor, or elected deltas.

A rule is shared by all threads and keeps nothing; a thread lends it `buffers` rows of a chunk, the first of
which holds the result. Inputs come one after the other, in order, the base (if any) before all others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SUM_TOLERANCE = 1e-6
"""How far from 1 the sum of weights may be that are meant to sum to 1."""

Piece = tuple[str, int, slice]
"""A tensor's name, the first of its values in the chunk, and where in the chunk these are."""


class Rule(ABC):
    """What one output is.

    coefficients: 0 for an input that need not be read. per_tensor: whether it is told which tensors are
    in a chunk.
    """

    coefficients: Sequence[float]
    buffers: int
    per_tensor: bool

    @abstractmethod
    def add(
        self,
        rows: Sequence[Tensor],
        values: Tensor,
        index: int,
        pieces: Iterable[Piece],
        *,
        first: bool,
    ) -> None:
        """Take the values of input `index`; those of the first may have any dtype."""

    def finish(self, rows: Sequence[Tensor]) -> None:  # noqa: B027 - most have no more to do
        """Leave the result in the first row, where it is not there already."""


_BLOCK = 8
"""Inputs of a running mean; of more, the means of blocks are merged in pairs.

A running mean of 32 is off by 8e-8 of itself, one of 64 by 12e-8; of blocks both by 4e-8, which is hardly more than
rounding the exact mean to float32 costs (2.5e-8). Pairs from the first input on gain nothing and cost a tenth.
"""


@dataclass(frozen=True)
class _Step:
    """Row `target` moves by `share` towards row `source`, the input's values if None; 1 copies them."""

    target: int
    source: int | None
    share: float


class WeightedSum(Rule):
    """The coefficients of one output, and how an input is added to its sum.

    Coefficients that sum to 1 without a negative one make a running mean, `y += share (x - y)`, for the
    price of a plain sum: what is equal in all inputs (a frozen layer) comes out bitwise as it was.
    block: of how many inputs such a mean is at most, before it is merged with those of others.
    """

    buffers = 1
    per_tensor = False

    def __init__(self, coefficients: Sequence[float], *, block: int = _BLOCK) -> None:
        self.coefficients = coefficients
        self._steps: list[list[_Step]] = []  # for each input
        self._last: list[_Step] = []
        if min(coefficients) >= 0 and abs(math.fsum(coefficients) - 1) <= SUM_TOLERANCE:
            self._plan(block)

    def add(
        self,
        rows: Sequence[Tensor],
        values: Tensor,
        index: int,
        pieces: Iterable[Piece],
        *,
        first: bool,
    ) -> None:
        """Add the values, or move the running mean towards them."""
        if self._steps:
            _follow(self._steps[index], rows, values)
        elif first:
            rows[0].copy_(values).mul_(self.coefficients[index])
        else:
            rows[0].add_(values, alpha=self.coefficients[index])

    def finish(self, rows: Sequence[Tensor]) -> None:
        """Merge the means of blocks that are left."""
        _follow(self._last, rows, None)

    def _plan(self, block: int) -> None:
        """What to do at each input: rows hold means of blocks, of fewer and fewer blocks each."""
        held: list[tuple[float, int]] = []  # of each row: its weight, and of how many inputs it is

        def merge() -> _Step:
            (below, few), (above, more) = held.pop(), held.pop()
            held.append((below + above, few + more))
            return _Step(len(held) - 1, len(held), below / (below + above))

        for c in self.coefficients:
            steps = []
            if c and (not held or held[-1][1] >= block):
                held.append((c, 1))
                steps.append(_Step(len(held) - 1, None, 1.0))
            elif c:
                weight, count = held[-1]
                held[-1] = (weight + c, count + 1)
                steps.append(_Step(len(held) - 1, None, c / (weight + c)))
            self.buffers = max(self.buffers, len(held))
            while len(held) > 1 and held[-1][1] == held[-2][1]:
                steps.append(merge())
            self._steps.append(steps)
        while len(held) > 1:
            self._last.append(merge())


def _follow(steps: Iterable[_Step], rows: Sequence[Tensor], values: Tensor | None) -> None:
    for step in steps:
        source = values if step.source is None else rows[step.source]
        assert source is not None, "the last steps merge rows"  # noqa: S101 - for the type checker
        if step.share == 1:
            rows[step.target].copy_(source)
        else:
            rows[step.target].lerp_(source, step.share)


class SumPerTensor(Rule):
    """A weighted sum whose coefficients are a tensor's own, by name."""

    buffers = 1
    per_tensor = True

    def __init__(self, coefficients: Mapping[str, Sequence[float]], inputs: int) -> None:
        self.coefficients = [1.0] * inputs  # each counts in some tensor
        self._sums = {n: WeightedSum(found, block=inputs) for n, found in coefficients.items()}

    def add(
        self,
        rows: Sequence[Tensor],
        values: Tensor,
        index: int,
        pieces: Iterable[Piece],
        *,
        first: bool,
    ) -> None:
        """Add the values, tensor by tensor."""
        for name, _, where in pieces:
            part = [rows[0][where]]
            self._sums[name].add(part, values[where], index, (), first=first)


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

    def add(
        self,
        rows: Sequence[Tensor],
        values: Tensor,
        index: int,
        pieces: Iterable[Piece],
        *,
        first: bool,
    ) -> None:
        """Add the thinned deltas of the values."""
        if first:
            rows[0].copy_(values)
            for row in rows[1:]:
                row.zero_()
            return
        delta, total = rows[1:3]
        torch.sub(values, rows[0], out=delta)
        for name, begin, where in pieces:
            self._thin(delta[where], name, index, begin)
        weight = self.coefficients[index]
        if weight != 1:
            delta.mul_(weight)
        total.add_(delta)
        if self._elect:
            part, magnitude, signs, present = rows[3:]
            magnitude.add_(torch.abs(delta, out=part))
            signs.add_(torch.sign(delta, out=part), alpha=weight)
            present.addcmul_(part, part, value=weight)

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
