"""All in-place arithmetic of the project: moving averages toward weights, group by group.

A list of tensors is split into *groups*. Where nothing has to be converted and one average is
updated, a group is as many whole tensors as possible: one foreach call for all. Where several
averages track the same weights, or the weights have another dtype than the averages, groups are
bounded, so that what is read or converted once is still in the cache for the last average. On a GPU
all this is one launch (`fused.py`), and only tensors that its kernel does not take go by groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.tensors import fused
from polyak.tensors.fused import FusedRows
from polyak.tensors.memory import is_dense
from polyak.tensors.updates import Targets, Update, Weight

# Values per bounded group. On a CPU the group must stay in the (last) cache and be worth a second
# thread: 2^20 was best of 2^16 to 2^21 (LOG.md); on an accelerator launches must stay few, and the
# scratch memory for conversion small beside the weights.
_GROUP_VALUES = {"cpu": 1 << 20}
_GROUP_VALUES_ELSEWHERE = 1 << 24
_GROUP_VALUES_READ = (
    1 << 22
)  # in the background: few calls, for which the training thread gives way


Read = Callable[[list[list[Tensor]]], Iterable[list[Tensor]]]


@dataclass(frozen=True)
class _Piece:
    index: int
    start: int | None = None  # None: the whole tensor in its own shape
    stop: int = 0
    as_pairs: bool = False  # complex values as pairs of real ones

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        tensor = tensors[self.index]
        if self.as_pairs:
            tensor = torch.view_as_real(tensor.detach())
        return tensor if self.start is None else _span(tensor, self.start, self.stop)


@dataclass(frozen=True)
class _Group:
    pieces: tuple[_Piece, ...]
    scratch: list[Tensor] | None


class GroupedTensors:
    """Moves any number of averages toward the same live weights, and copies statistics beside them.

    read: how groups of weights are read, one after the other, where that is not from their own memory.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        like: Sequence[Tensor],
        *,
        n_averages: int = 1,
        statistics: Sequence[Tensor] = (),
        read: Read | None = None,
    ) -> None:
        self._live, self._like, self._statistics = live, like, statistics
        self._read = read
        self._bounded = n_averages > 1 or read is not None
        self._groups: list[_Group] = []
        self.live: list[list[Tensor]] = []  # of what goes by groups
        self._rows = _fused_rows(live, like, statistics) if read is None else []
        fused_weights = {index for rows in self._rows for index in rows.weights}
        fused_statistics = {index for rows in self._rows for index in rows.statistics}
        self._group([i for i in range(len(live)) if i not in fused_weights])
        self._copied = [i for i in range(len(statistics)) if i not in fused_statistics]

    def group(self, tensors: Sequence[Tensor]) -> Targets:
        """The tensors, to be changed by updates: no copies."""
        return Targets(list(tensors))

    def blend(self, updates: Sequence[Update], copies: Sequence[Sequence[Tensor]] = ()) -> None:
        """Apply every average's update, reading the live weights once.

        copies: lists of tensors that become what the statistics are now.
        """
        launches = []
        for rows in list(self._rows):
            if (prepared := rows.prepare(updates, copies)) is None:
                self._do_without(rows)
            else:
                launches += [(rows, launch) for launch in prepared]
        for rows, launch in launches:
            rows.run(launch)
        self._blend_groups(updates)
        if copies and self._copied:
            self._copy_statistics(copies)

    def notes(self) -> list[str]:
        """How the updates are carried out, where that is not by torch."""
        return [
            f"an update on {rows.device} is one launch of a kernel, which took "
            f"{fused.seconds_compiling(rows.device):.1f} s to compile in this process"
            for rows in self._rows
        ]

    @property
    def copies_statistics(self) -> bool:
        """Whether a kernel copies statistics; it takes all of a device or none."""
        return len(self._copied) < len(self._statistics)

    def fold(self, averages: Targets, sums: Targets, growth: Weight) -> None:
        """`average = (average + sum) / growth`; what that rounds off stays in the sum (Fast2Sum)."""
        for rows in list(self._rows):
            if not rows.fold(averages, sums, growth):
                self._do_without(rows)
        done = {index for rows in self._rows for index in rows.weights}
        for index, pair in enumerate(zip(averages.tensors, sums.tensors, strict=True)):
            if index not in done:
                for average, part in paired_parts(*pair):
                    _fold(average, part, growth)

    @torch.no_grad()
    def _copy_statistics(self, copies: Sequence[Sequence[Tensor]]) -> None:
        sources = [self._statistics[i] for i in self._copied]
        for targets in copies:
            torch._foreach_copy_([targets[i] for i in self._copied], sources)

    @torch.inference_mode()  # no_grad still asks each of a thousand tensors whether it takes gradients
    def _blend_groups(self, updates: Sequence[Update]) -> None:
        if not updates:
            return
        sources = self.live if self._read is None else self._read(self.live)
        for index, (group, source) in enumerate(zip(self._groups, sources, strict=True)):
            values = source if group.scratch is None else group.scratch
            if group.scratch is not None:
                torch._foreach_copy_(values, source)
            for update in updates:
                apply = add_ if update.adds else lerp_
                apply(self._views(update.targets)[index], values, update.weight)

    def _group(self, indices: Sequence[int]) -> None:
        buckets: dict[tuple[object, ...], list[int]] = {}
        for index in indices:
            source, target = self._live[index], self._like[index]
            key = (source.device, source.dtype, target.device, target.dtype, source.is_conj())
            buckets.setdefault(key, []).append(index)
        for bucket in buckets.values():
            target, limit = self._like[bucket[0]], _GROUP_VALUES_READ
            if self._read is None:
                limit = _GROUP_VALUES.get(target.device.type, _GROUP_VALUES_ELSEWHERE)
            converts = _converts(self._live[bucket[0]], target, self._read)
            whole = not (self._bounded or converts)
            self._groups += _groups(
                self._live, self._like, bucket, limit=None if whole else limit, converts=converts
            )
        self.live = self._views(Targets(list(self._live)))

    def _views(self, targets: Targets) -> list[list[Tensor]]:
        for group in self._groups[len(targets.groups) :]:
            targets.groups.append([piece.of(targets.tensors) for piece in group.pieces])
        return targets.groups

    def _do_without(self, rows: FusedRows) -> None:
        """The kernel cannot be compiled: what it would have moved goes by groups from now on."""
        self._rows.remove(rows)
        self._group(rows.weights)
        self._copied += rows.statistics
        fused.warn_of_failure(rows.device)


def lerp_(averages: list[Tensor], sources: list[Tensor], weight: Weight) -> None:
    """`average += weight * (source - average)`, in place.

    With weight 1 the averages become the sources, whatever they held. A weight that lives on a
    device is never read: a finite average moves by exactly 0 where it is 0, and one that holds
    zeros becomes the source where it is 1.
    """
    if isinstance(weight, Tensor):
        difference = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(difference, _beside(weight, averages[0]))
        torch._foreach_add_(averages, difference)
    elif weight == 1:
        torch._foreach_copy_(averages, sources)
    else:
        torch._foreach_lerp_(averages, sources, weight)


def add_(sums: list[Tensor], sources: list[Tensor], weight: Weight) -> None:
    """`sum += weight * source`, in place."""
    if isinstance(weight, Tensor):
        torch._foreach_add_(sums, list(torch._foreach_mul(sources, _beside(weight, sums[0]))))
    else:
        torch._foreach_add_(sums, sources, alpha=weight)


def correction(average: Tensor, part: Tensor, growth: Weight) -> Tensor:
    """`(average + part) / growth - average`, without cancelling the digits of the average."""
    excess: Any = growth - 1  # before rounding to the dtype of the average: it is small
    if isinstance(growth, Tensor):
        kind = (average.device, average.real.dtype)
        growth, excess = growth.to(*kind), excess.to(*kind)
    result: Tensor = (part - average * excess) / growth
    return result


def _fold(average: Tensor, part: Tensor, growth: Weight) -> None:
    rest = correction(average, part, growth)
    folded = average + rest
    torch.sub(rest, folded - average, out=part)  # what that addition rounded off
    average.copy_(folded)


def _beside(weight: Tensor, tensor: Tensor) -> Tensor:
    return weight.to(tensor.device, tensor.dtype)


def accumulator_dtype(weights: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """Float32 at least, float64 where asked for or where the weights are; complex stays complex."""
    wide = torch.promote_types(asked or torch.float32, torch.float32)
    if weights.is_complex:
        return (
            torch.complex128
            if wide is torch.float64
            else torch.promote_types(weights, torch.complex64)
        )
    # promote_types knows no pair of float8 and others; all narrow types are below float32 anyway.
    return torch.float64 if torch.float64 in (weights, wide) else torch.float32


def blank_like(
    tensors: Sequence[Tensor], dtype: torch.dtype | None, device: torch.device | None
) -> list[Tensor]:
    """Zeros to accumulate in, laid out in memory as the tensors are."""
    with torch.inference_mode(False):  # an inference tensor could not be written to later
        return [
            torch.zeros_like(t, dtype=accumulator_dtype(t.dtype, dtype), device=device or t.device)
            for t in map(Tensor.detach, tensors)
        ]


def ranges(n_values: int, length: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most `length` that cover `n_values`."""
    for start in range(0, n_values, length):
        yield start, min(start + length, n_values)


def paired_parts(
    a: Tensor, b: Tensor, *, at_most: int = _GROUP_VALUES_ELSEWHERE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of two tensors of one shape, part by part, small enough for the cache of a CPU."""
    limit = min(at_most, _GROUP_VALUES.get(a.device.type, at_most))
    if a.numel() <= limit:
        yield a, b
    elif a.stride() == b.stride() and is_dense(a):
        for start, stop in ranges(a.numel(), limit):
            yield _span(a, start, stop), _span(b, start, stop)
    else:
        longest = max(range(a.dim()), key=a.size)
        halves = zip(a.tensor_split(2, longest), b.tensor_split(2, longest), strict=True)
        for x, y in halves:
            yield from paired_parts(x, y, at_most=at_most)


def _fused_rows(
    live: Sequence[Tensor], like: Sequence[Tensor], statistics: Sequence[Tensor]
) -> list[FusedRows]:
    """What the kernel takes on each device where it runs."""
    found = []
    for device in dict.fromkeys(tensor.device for tensor in (*live, *statistics)):
        if not fused.is_available(device):
            fused.warn_of_failure(device)
            continue
        here = [i for i, tensor in enumerate(live) if tensor.device == device]
        weights = [i for i in here if fused.fits(live[i], like[i])]
        there = [i for i, tensor in enumerate(statistics) if tensor.device == device]
        copied = [i for i in there if fused.can_be_copied(statistics[i])]
        if weights or copied:
            found.append(FusedRows(live, weights, statistics, copied))
    return found


def _converts(source: Tensor, target: Tensor, read: Read | None) -> bool:
    """Whether values must be copied once more before an average can be moved toward them."""
    return source.dtype != target.dtype or (read is None and source.device != target.device)


def _groups(
    live: Sequence[Tensor],
    like: Sequence[Tensor],
    indices: list[int],
    *,
    limit: int | None,
    converts: bool,
) -> Iterator[_Group]:
    if limit is None:
        pairs = _as_pairs(live[indices[0]])
        yield _Group(tuple(_Piece(index, as_pairs=pairs) for index in indices), None)
        return
    shared: list[Tensor] = []  # one scratch for all groups of this kind: they take turns
    for pieces in _packed(live, like, indices, limit):
        scratch = _scratch(pieces, like, shared) if converts else None
        yield _Group(tuple(pieces), scratch)


def _packed(
    live: Sequence[Tensor], like: Sequence[Tensor], indices: list[int], limit: int
) -> Iterator[list[_Piece]]:
    pieces: list[_Piece] = []
    room = limit
    for index in indices:
        for piece, size in _pieces(live[index], like[index], index, limit):
            if size > room and pieces:
                yield pieces
                pieces, room = [], limit
            pieces.append(piece)
            room -= size
    if pieces:
        yield pieces


def _pieces(source: Tensor, target: Tensor, index: int, limit: int) -> Iterator[tuple[_Piece, int]]:
    # A span addresses values by their place in memory, so a tensor is only split where source and
    # target place their values alike; any other one stays whole, however large.
    n_values = source.numel() * (2 if source.is_complex() else 1)
    same_layout = source.stride() == target.stride() and is_dense(source) and not source.is_conj()
    pairs = _as_pairs(source)
    if n_values <= limit or not same_layout:
        yield _Piece(index, as_pairs=pairs), n_values
        return
    for start, stop in ranges(n_values, limit):
        yield _Piece(index, start, stop, pairs), stop - start


def _scratch(
    pieces: Sequence[_Piece], like: Sequence[Tensor], shared: list[Tensor]
) -> list[Tensor]:
    # Views into one buffer that grows to the largest group: the views made before it grew keep the
    # old buffer alive, which costs less than a second pass over the groups.
    shapes = [piece.of(like).shape for piece in pieces]
    needed = sum(shape.numel() for shape in shapes)
    if not shared or shared[0].numel() < needed:
        kind = pieces[0].of(like)
        with torch.inference_mode(False):
            shared[:] = [torch.empty(needed, dtype=kind.dtype, device=kind.device)]
    sizes = [shape.numel() for shape in shapes]
    parts = torch.split(shared[0][:needed], sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _as_pairs(tensor: Tensor) -> bool:
    """Whether complex values are handled as pairs of real ones: the same arithmetic serves both.

    Conjugate tensors have no such pairs in memory; foreach functions conjugate them as they read.
    """
    return tensor.is_complex() and not tensor.is_conj()


def _span(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Values of a dense tensor in the order of memory, whatever the order of its dimensions."""
    offset = tensor.storage_offset() + start
    return tensor.detach().as_strided((stop - start,), (1,), offset)
