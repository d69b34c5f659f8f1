"""A float32 average in the place of its bfloat16 weight, without memory for a copy.

The two have 48 bits a value. While the average is lent, the weight's memory holds it rounded, and the
accumulator's holds the weight's 16 bits and the low 16 bits of the average. With those the rounding can be
undone, because ties go away from zero: `average = (rounded << 16) + low`, with `low` as a signed number.
Row by row: in the memory of n accumulators first n weights, then n low halves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.tensors.memory import copy_on_write, in_shared_memory, is_dense, odd_form
from polyak.tensors.rounding import piece_values

_ROW = 1 << 13  # values; on a CPU, where all that happens to a row is then one thread's work


@dataclass(frozen=True)
class Scratch:
    """Room to exchange one piece: made before the first, so that giving back needs no memory."""

    rounded: Tensor
    low: Tensor
    half: Tensor

    @classmethod
    def for_(cls, tensors: Sequence[Tensor]) -> Scratch:
        """Enough for each of these, which are on one device."""
        device = tensors[0].device
        n = min(max(tensor.numel() for tensor in tensors), piece_values(device))
        with torch.inference_mode(False):
            rounded, low = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
            return cls(rounded, low, torch.empty(n, dtype=torch.int16, device=device))


class Packed:
    """One weight and its average, of which `swap_in` gives the weight's memory to the average.

    Between that and `swap_out`, `weight` is the rounded average, and `average()` the exact one. Where it
    is lent `in_place`, whoever writes to the weight writes the average.
    """

    def __init__(
        self, weight: Tensor, average: Tensor, scratch: Scratch, *, in_place: bool = True
    ) -> None:
        self.weight = weight
        self._in_place = in_place
        self._average = average.detach()
        self._scratch = scratch
        self._limit = scratch.half.numel()
        order = sorted(range(average.dim()), key=average.stride, reverse=True)
        self._order = order
        self._narrow = weight.view(torch.int16).permute(order)
        self._wide = self._average.view(torch.int32).permute(order)
        self._row = _ROW if self._narrow.is_contiguous() and weight.device.type == "cpu" else 0
        self._swapped: list[tuple[Tensor, Tensor, Tensor | None]] = []  # with a checksum

    @torch.no_grad()
    def swap_in(self) -> None:
        """The weight's memory takes the rounded average; the accumulator's keeps both."""
        for narrow, wide in self._pieces(self._narrow, self._wide):
            rounded, _, half = self._room(wide)
            own, low = _halves(wide)
            torch.add(wide, 0x8000, out=rounded).bitwise_right_shift_(16)
            half.copy_(wide)
            own.copy_(narrow)
            low.copy_(half)
            narrow.copy_(rounded)
            self._swapped.append((narrow, wide, _checksum(rounded) if self._in_place else None))

    @torch.no_grad()
    def swap_out(self) -> None:
        """Both have what they had, bit for bit; an average that was written to has what was written."""
        while self._swapped:
            narrow, wide, checksum = self._swapped[-1]
            rounded, low = self._unpacked(narrow, wide, checksum)
            narrow.copy_(_halves(wide)[0])
            torch.add(low, rounded, alpha=1 << 16, out=wide)
            self._swapped.pop()

    @torch.no_grad()
    def average(self) -> Tensor:
        """A copy of the average, while it is lent."""
        with torch.inference_mode(False):
            result = torch.empty_like(self._average)
        targets = self._pieces(self._narrow, result.view(torch.int32).permute(self._order))
        for piece, (_, target) in zip(self._swapped, targets, strict=True):
            rounded, low = self._unpacked(*piece)
            torch.add(low, rounded, alpha=1 << 16, out=target)
        return result

    @torch.no_grad()
    def own(self) -> Tensor:
        """A copy of the weight, while its average is lent."""
        with torch.inference_mode(False):
            result = torch.empty_like(self.weight)
        targets = self._pieces(result.view(torch.int16).permute(self._order), self._wide)
        for target, wide in targets:
            target.copy_(_halves(wide)[0])
        return result

    def finite(self) -> Tensor:
        """A tensor that is finite if the average is, while it is lent: without a copy as a rule."""
        is_finite = bool(torch.isfinite(self.weight.sum(dtype=torch.float32)))
        return self.weight if is_finite else self.average()

    def shared(self) -> Tensor:
        """The rounded average, shared copy-on-write."""
        clone = copy_on_write(self.weight)
        return self.weight.clone() if clone is None else clone

    def _unpacked(
        self, narrow: Tensor, wide: Tensor, checksum: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rounded, low, _ = self._room(wide)
        low.copy_(_halves(wide)[1])
        rounded.copy_(narrow)
        if checksum is not None:  # what was written since does not go with these low halves
            low.mul_(_checksum(rounded) == checksum)
        return rounded, low

    def _room(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        held, n = self._scratch, like.numel()
        parts = (held.rounded[:n], held.low[:n], held.half[:n])
        rounded, low, half = (part.view(like.shape) for part in parts)
        return rounded, low, half

    def _pieces(self, narrow: Tensor, wide: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the two, whose first dimension is that of rows."""
        if self._row:
            narrow, wide = narrow.view(-1), wide.view(-1)
        for one, other in _parts(narrow, wide, self._limit):
            in_rows = self._row and one.numel() % self._row == 0
            shape = (-1, self._row) if in_rows else (1, *one.shape)
            yield one.view(shape), other.view(shape)


def can_be_packed(weight: Tensor, average: Tensor) -> bool:
    """Whether a loan can do without a copy, the average's values aside: a NaN cannot be packed."""
    return (
        weight.dtype is torch.bfloat16
        and average.dtype is torch.float32
        and weight.device == average.device
        and weight.shape == average.shape
        and weight.numel() > 0
        and all(map(_is_plain, (weight, average)))
        and _is_apart(weight)
        and is_dense(average)
    )


def nan_free(averages: Sequence[Tensor]) -> list[bool]:
    """Which have no NaN for certain; one read of each device."""
    found = [False] * len(averages)
    for device in {tensor.device for tensor in averages}:
        there = [i for i, tensor in enumerate(averages) if tensor.device == device]
        sums = torch.stack([averages[i].detach().sum() for i in there])
        for index, is_nan in zip(there, sums.isnan().tolist(), strict=True):
            found[index] = not is_nan
    return found


def span(tensor: Tensor) -> int:
    """How many bytes there are from the first to the last value of a tensor that has any."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _halves(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Of the memory of each row: the half for weights, and that for low halves."""
    halves = wide.view(torch.int16).view(wide.shape[0], 2, *wide.shape[1:])
    return halves[:, 0], halves[:, 1]


def _checksum(values: Tensor) -> Tensor:
    # Versions do not tell: views of one storage share theirs, and writes to `data` do not count.
    return values.sum(dtype=torch.int32)


def _is_plain(tensor: Tensor) -> bool:
    """In memory of its own that can be written, and that no other process writes."""
    if type(tensor.detach()) is not Tensor or odd_form(tensor):
        return False
    return not (tensor.is_neg() or tensor.is_inference() or in_shared_memory(tensor))


def _is_apart(tensor: Tensor) -> bool:
    """Whether no two of its values share memory."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += (size - 1) * stride
    return True


def _parts(narrow: Tensor, wide: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of at most `limit` values, along the outer dimensions: those of `wide` stay contiguous."""
    if wide.numel() <= limit:
        yield narrow, wide
        return
    dim = next(i for i, size in enumerate(wide.shape) if size > 1)
    step = max(1, limit // (wide.numel() // wide.shape[dim]))
    for pair in zip(torch.split(narrow, step, dim), torch.split(wide, step, dim), strict=True):
        yield from _parts(*pair, limit)
