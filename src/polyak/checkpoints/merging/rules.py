"""How the inputs of a chunk become the values of one output: a sum, a sum per tensor, or elected deltas.

A rule is shared by all threads and keeps nothing; a thread lends it `buffers` rows of a chunk, the first of
which holds the result. Inputs come one after the other, in order, the base (if any) before all others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
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


@dataclass(frozen=True)
class StockShare:
    """How much of the mean Model Stock took, the rest being the base: of all values, and of single tensors."""

    average: float
    least: float
    most: float

    def __str__(self) -> str:
        return (
            f"{self.average:.1%} of the mean of the inputs, the rest of the base ({self.least:.1%} to "
            f"{self.most:.1%} by tensor)"
        )


class Rule(ABC):
    """What one output is.

    coefficients: 0 for an input that need not be read. per_tensor: whether it is told which tensors are
    in a chunk. stock: of Model Stock.
    """

    coefficients: Sequence[float]
    buffers: int
    per_tensor: bool
    stock: StockShare | None = None

    @abstractmethod
    def add(self, rows: Sequence[Tensor], part: Part) -> None:
        """Take one input's values; those of the first may have any dtype."""

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

    def add(self, rows: Sequence[Tensor], part: Part) -> None:
        """Add the values, or move the running mean towards them."""
        if self._steps:
            _follow(self._steps[part.number], rows, part.values)
        elif part.first:
            rows[0].copy_(part.values).mul_(self.coefficients[part.number])
        else:
            rows[0].add_(part.values, alpha=self.coefficients[part.number])

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

    def add(self, rows: Sequence[Tensor], part: Part) -> None:
        """Add the values, tensor by tensor."""
        for name, _, where in part.pieces:
            own = Part(part.values[where], part.number, part.first)
            self._sums[name].add([rows[0][where]], own)


Thin = Callable[[Tensor, str, int, int], None]
"""Drops values of a delta in place: (values, tensor's name, input, first value in the tensor)."""


class SumOfDeltas(Rule):
    r"""$b + \lambda \sum_i w_i\, d_i$ of thinned deltas $d_i = \mathrm{thin}(x_i - b)$."""

    buffers = 3
    per_tensor = True

    def __init__(self, weights: Sequence[float], scale: float, thin: Thin) -> None:
        self.coefficients = [1.0, *weights]
        self._scale, self._thin = scale, thin

    def add(self, rows: Sequence[Tensor], part: Part) -> None:
        """Add the thinned deltas of the values."""
        base, delta, total = rows[:3]
        if part.first:
            base.copy_(part.values)
            for row in rows[2:4]:  # of sums
                row.zero_()
            return
        torch.sub(part.values, base, out=delta)
        for name, begin, where in part.pieces:
            self._thin(delta[where], name, part.number, begin)
        weight = self.coefficients[part.number]
        if weight != 1:
            delta.mul_(weight)
        total.add_(delta)

    def finish(self, rows: Sequence[Tensor]) -> None:
        """Add what was summed to the base."""
        rows[0].add_(rows[2], alpha=self._scale)


class ElectedDeltas(SumOfDeltas):
    """Of each value only the deltas count that have the sign of their sum, averaged by their weights.

    Of the sum s and the sum m of magnitudes, those above 0 have (m + s) / 2, those below (s - m) / 2. How many
    are above and how many below is counted in bytes where all weights are equal, and cancel.
    """

    buffers = 7

    def __init__(self, weights: Sequence[float], scale: float, thin: Thin) -> None:
        counted = [weight for weight in weights if weight]
        self._in_bytes = len(set(counted)) == 1 and len(counted) < 256
        # Only their ratios count: a power of 2 keeps sums of them far from what float32 cannot hold.
        exponent = math.frexp(max(weights))[1]
        scaled = [math.ldexp(weight, -exponent) for weight in weights]
        super().__init__(
            [float(w != 0) for w in weights] if self._in_bytes else scaled, scale, thin
        )

    def add(self, rows: Sequence[Tensor], part: Part) -> None:
        """Add the thinned deltas, their magnitudes, and their votes."""
        super().add(rows, part)
        is_so, *votes = self._votes(rows)
        if part.first:
            for count in votes:
                count.fill(0)
            return
        delta, magnitude, other = rows[1], rows[3], rows[4]
        magnitude.add_(torch.abs(delta, out=other))
        signed = delta.numpy()
        for compare, count in zip((np.greater, np.less), votes, strict=True):
            compare(signed, 0, out=is_so)
            vote = is_so.view(np.uint8)
            if not self._in_bytes:
                vote = np.multiply(is_so, self.coefficients[part.number], dtype=count.dtype)
            np.add(count, vote, out=count)

    def finish(self, rows: Sequence[Tensor]) -> None:
        """Add the elected mean to the base."""
        base, _, total, magnitude, share = rows[:5]
        is_negative, above, below = self._votes(rows)
        np.less(total.numpy(), 0, out=is_negative)  # 0 counts as positive
        np.subtract(below, above, out=below)
        np.multiply(below, is_negative.view(np.uint8), out=below)
        np.add(above, below, out=above)
        nobody = np.equal(above, 0, out=is_negative).view(np.uint8)  # of whom the sum is 0
        np.add(above, nobody, out=above)
        total.add_(torch.copysign(magnitude, total, out=magnitude))
        np.copyto(share.numpy(), above)
        base.add_(total.div_(share), alpha=self._scale / 2)

    def _votes(self, rows: Sequence[Tensor]) -> list[Any]:
        """Room for a comparison's result, and the votes above and below 0."""
        views: list[Any] = [row.numpy() for row in rows[4:7]]
        kinds = (np.bool_, np.uint8, np.uint8) if self._in_bytes else (np.bool_,)
        for place, kind in enumerate(kinds):
            views[place] = views[place].view(kind)[: rows[0].numel()]
        return views
