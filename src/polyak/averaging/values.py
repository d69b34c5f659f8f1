"""The values of an average: swapped into the model, copied into one, or returned by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor
from torch.nn import Module

from polyak.averaging.accumulators import Part
from polyak.averaging.packing import to_pack
from polyak.averaging.tracker import Member, Tracker
from polyak.batchnorm.record import StatisticsRecord
from polyak.errors import check_match, warn
from polyak.tensors.finite import refuse_nonfinite
from polyak.tensors.fsdp import reshard
from polyak.tensors.memory import address, copy_on_write, odd_form, shape_of
from polyak.tensors.modes import ActingModules
from polyak.tensors.names import named_tensors, overwrite, require_module
from polyak.tensors.packed import Packed
from polyak.tensors.rounding import copy_rounded, piece_values, rounded_for
from polyak.tensors.sharding import Span, is_sharded, layout, local, narrowed, sharded_as
from polyak.tensors.swap import (
    derived_tensors_recomputed,
    parameters_kept,
    recompute_derived,
    swapped,
)

_SMALL = 4096  # values


class Loan:
    """The average in its model, until `give_back`; also a context manager."""

    def __init__(
        self,
        swap: AbstractContextManager[None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        self._swap = ExitStack()
        self._after = after
        if swap is not None:
            self._swap.enter_context(swap)

    def give_back(self) -> None:
        """Restore the model's own weights. A second call does nothing."""
        self._swap.close()
        after, self._after = self._after, None
        if after is not None:
            after()

    def __enter__(self) -> Loan:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:
            self._after = None
        self.give_back()


def as_model_dtype(member: Member) -> list[Tensor]:
    """The average of each weight in the weight's dtype: the accumulator itself wherever it can be."""
    return [model_value(member, i) for i in range(len(member.tracker.tensors.names))]


def model_value(member: Member, index: int, *, exchanged: bool = False, part: Part = ()) -> Tensor:
    """The same of one weight; where contents are exchanged only the dtype has to be the weight's."""
    tensors, targets = member.tracker.tensors, _swap_targets(member)
    live = tensors.live[index]
    if (measured := member.measured_buffers.get(tensors.names[index])) is not None:
        return narrowed(measured, part)
    if (packed := _packed(member).get(index)) is not None:
        return narrowed(packed.weight, part)
    if targets:
        kept = targets[index]
        if _same_memory(kept, live) or (exchanged and kept.dtype == live.dtype):
            return narrowed(kept, part)
    if member.accumulator is None:
        return narrowed(live.detach(), part)
    with torch.no_grad(), torch.inference_mode(False):
        result = torch.empty_like(narrowed(live, part))
        spans = list(part) or [(0, size) for size in result.shape]
        # What is computed is so in the accumulator's precision: piece by piece, in little memory.
        for piece, where in _pieces(result, spans):
            copy_rounded(piece, member.accumulator.value(index, member.clock, where))
        return result


def _pieces(tensor: Tensor, spans: list[Span]) -> Iterator[tuple[Tensor, list[Span]]]:
    """A tensor that is these spans of a larger one, cut along its outermost dimension; and their spans."""
    outer = next((dim for dim, size in enumerate(tensor.shape) if size > 1), None)
    if outer is None or tensor.numel() == 0:
        yield tensor, spans
        return
    start, step = spans[outer][0], piece_values(tensor.device) * tensor.shape[outer]
    for piece in torch.split(tensor, max(1, step // tensor.numel()), outer):
        end = start + piece.shape[outer]
        yield piece, [*spans[:outer], (start, end), *spans[outer + 1 :]]
        start = end


@torch.no_grad()
def copied_values(
    member: Member, device: torch.device | None = None, leave: Set[int] = frozenset()
) -> dict[str, Tensor]:
    """Everything a state dict of the averaged model holds: by name, ties under all their names.

    As in the state dict of the model, what is sharded is a DTensor. `leave` are the ids of tensors of
    the model to leave out.
    """
    tensors = member.tracker.tensors
    tensors.settle()
    if member.take_measured is not None:
        member.take_measured()
    named, _ = tensors.inspect()
    averaged = dict(zip(tensors.names, as_model_dtype(member), strict=True))
    statistics = dict(zip(tensors.statistic_names, member.statistics, strict=True))
    result: dict[str, Tensor] = {}
    for name, slot in named.slots.items():
        value = averaged.get(name, statistics.get(name, local(slot.tensor))).detach()
        if slot.persistent and id(slot.tensor) not in leave:
            odd = odd_form(value)  # those can be cloned, but not all can be moved
            copy = value.clone() if odd else value.to(device or value.device, copy=True)
            result[name] = sharded_as(copy, slot.tensor) if is_sharded(slot.tensor) else copy
    return result | {alias: result[n] for alias, n in named.ties.items() if n in result}


@contextmanager
def swapped_in(member: Member, *, owner: object, in_place: bool) -> Iterator[None]:
    """Swap the average, its statistics included, into the model for the block, and nothing else.

    Whatever the block does to the weights is undone when they go back: the average is shared
    copy-on-write, and so are the tensors that it does not hold (a frozen weight into which a layer
    folds itself), unless they are large integers or in memory that is not torch's: on those only
    what the modes did is undone. Statistics that were measured in the block are the average's own
    from then on.
    """
    tensors = member.tracker.tensors
    tensors.settle()
    stay = {id(tensor) for tensor in tensors.everything()} if in_place else tensors.shares_memory()
    acting = ActingModules(tensors.model)
    acting.neutralise()
    live, values, originals = _to_swap(member, stay)
    own = [
        value if isinstance(value, Packed) or id(weight) in stay else weight.detach()
        for weight, value in zip(live[: len(tensors.live)], values, strict=False)
    ]
    writes = _Writes(live, originals, stay)
    try:
        with (
            parameters_kept(tensors.model),
            _settled_after(member),
            swapped(live, values, owner=owner, in_place=stay, stepped=tensors.whole),
            _settled_after(member),
            _track_swapped(member, live, values, stay),
            _own_weights_known(member.tracker, own),
            derived_tensors_recomputed(tensors.model),
            _statistics_taken(member),
        ):
            acting.resume()
            writes.begin()
            try:
                yield
            finally:
                writes.end()
                acting.leave()
    finally:
        acting.restore(writes.changed - _of_norms(member))
    if member in member.tracker.members:  # a draw of a SWAG is not kept
        _warn_of_writes(member, writes.exchanged)


@torch.no_grad()
def copy_into(model: Module, member: Member) -> None:
    """Copy an average into a model by name. Raises MismatchError, naming all that does not fit."""
    require_module(model, "copy_to()")
    # What its own model holds already (the frozen base of an adapter) needs no copy.
    own = model is member.tracker.tensors.model
    newest = {id(tensor) for tensor in member.tracker.tensors.others}
    values = copied_values(member, leave=newest if own else set())
    reshard(model)
    named = named_tensors(model)
    persistent = {n: s.tensor for n, s in named.slots.items() if s.persistent}
    if own:
        persistent = {n: t for n, t in persistent.items() if id(t) not in newest}
    source = {n: t for n, t in values.items() if n not in named.ties}
    check_match(
        {n: _shape_and_form(t) for n, t in persistent.items()},
        {n: _shape_and_form(t) for n, t in source.items()},
        f"The average does not fit this {type(model).__name__}.",
        "Nothing was copied. Build the model as the averaged one was built.",
    )
    for name, tensor in persistent.items():
        if id(local(tensor)) not in newest:
            overwrite(model, tensor, rounded_for(tensor, source[name]))
    recompute_derived(model)


def _shape_and_form(tensor: Tensor) -> str:
    return f"shape {shape_of(tensor)} {odd_form(tensor) or layout(tensor)}".rstrip()


@contextmanager
def _settled_after(member: Member) -> Iterator[None]:
    """Weights that were gathered in the block are not those that the model holds after it."""
    try:
        yield
    finally:
        member.tracker.tensors.settle()


def refuse_nonfinite_average(member: Member, what: str) -> None:
    """Raise NonFiniteError that names the averaged tensors and statistics with NaN or infinity."""
    tensors, accumulator = member.tracker.tensors, member.accumulator
    groups = [] if accumulator is None else accumulator.tensors_to_check()
    held = chain.from_iterable(zip(tensors.names, group, strict=True) for group in groups)
    statistics = zip(tensors.statistic_names, member.statistics, strict=True)
    refuse_nonfinite(
        [*held, *statistics],
        what,
        "One bad update spoils an average for good: load an earlier state, and construct it with "
        "nonfinite='skip' or 'raise' to keep such weights out.",
        tensors.ranks,
    )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device, a.stride()) == (b.dtype, b.device, b.stride())


class _Writes:
    """Which tensors a block has written to: shared ones have moved, exchanged ones have a new version.

    changed: the ids of those whose values are others now. Some kernels (LSTMs) move what they only read.
    """

    def __init__(self, live: Sequence[Tensor], originals: Sequence[Tensor], stay: set[int]) -> None:
        pairs = zip(live, originals, strict=True)
        self._shared = [(t, before, address(before)) for t, before in pairs if id(t) not in stay]
        self._exchanged = [tensor for tensor in live if id(tensor) in stay]
        self._versions: list[int] = []
        self.exchanged: list[Tensor] = []
        self.changed: set[int] = set()

    def begin(self) -> None:
        self._versions = [tensor._version for tensor in self._exchanged]

    def end(self) -> None:
        moved = [(t, before) for t, before, where in self._shared if address(t) != where]
        exchanged = zip(self._exchanged, self._versions, strict=True)
        self.exchanged = [tensor for tensor, before in exchanged if tensor._version != before]
        changed = [tensor for tensor, before in moved if not _equal(tensor, before)]
        self.changed = {id(tensor) for tensor in (*changed, *self.exchanged)}


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(a, b)


def _of_norms(member: Member) -> set[int]:
    """The ids of what norms keep for themselves: their statistics and counters."""
    norms = member.tracker.tensors.norms.values()
    return {id(buffer) for norm in norms for buffer in norm._buffers.values()}


def _warn_of_writes(member: Member, written: Sequence[Tensor]) -> None:
    ids, tensors = set(map(id, written)), member.tracker.tensors
    names = [n for n, t in zip(tensors.names, tensors.live, strict=True) if id(t) in ids]
    if names:
        warn(
            f"{', '.join(names)}: written to while their contents were exchanged with the average's "
            "(in_place=True, or shared memory), which leaves nothing to restore the average from: it "
            "holds what was written. Load a state of it, or evaluate a copy of the model."
        )


def _to_swap(
    member: Member, stay: set[int]
) -> tuple[list[Tensor], list[Tensor | Packed], list[Tensor]]:
    """The live tensors, what they hold in the block, and the originals that this is shared from."""
    tensors = member.tracker.tensors
    kept = {id(tensor) for tensor in (*member.statistics, *member.measured_buffers.values())}
    averages = _swap_targets(member)
    own = kept | set(map(id, averages))
    live = [*tensors.live, *tensors.statistics]
    # What is measured in the block is written to the statistics, averaged or not.
    packed = to_pack(tensors.live, averages, stay, _of_norms(member)) if averages else {}
    originals = [
        packed[i].weight if i in packed else model_value(member, i, exchanged=id(w) in stay)
        for i, w in enumerate(tensors.live)
    ]
    originals += member.statistics
    values: list[Tensor | Packed] = []
    for index, (tensor, original) in enumerate(zip(live, originals, strict=True)):
        if index in packed:
            values.append(packed[index])
        elif id(tensor) in stay:
            values.append(original.clone() if id(original) in kept else original)
        elif (shared := copy_on_write(original)) is not None:
            values.append(shared)
        else:
            values.append(original.clone() if id(original) in own else original)
    for other in tensors.others:
        if id(other) in stay or not _may_be_written(other):
            continue
        if (shared := copy_on_write(other)) is not None:
            live.append(other)
            values.append(shared)
            originals.append(other.detach())
    return live, values, originals


def _packed(member: Member) -> Mapping[int, Packed]:
    """What is packed now, by index: something only while the average is lent."""
    return {} if member.accumulator is None else member.accumulator.packed


def _may_be_written(tensor: Tensor) -> bool:
    # Kernels of quantised layers take pointers to their integers as if to write, which would copy
    # them all; nothing folds itself into integers.
    if odd_form(tensor):
        return False
    return tensor.is_floating_point() or tensor.is_complex() or tensor.numel() <= _SMALL


def _swap_targets(member: Member) -> list[Tensor]:
    return [] if member.accumulator is None else member.accumulator.swap_targets()


@contextmanager
def _track_swapped(
    member: Member, live: Sequence[Tensor], values: Sequence[Tensor | Packed], stay: set[int]
) -> Iterator[None]:
    """After an in-place swap the averaged values are in the live tensors: look for them there."""
    moved = {id(v): w.detach() for w, v in zip(live, values, strict=True) if id(w) in stay}
    packed = {index: v for index, v in enumerate(values) if isinstance(v, Packed)}
    if member.accumulator is not None:
        member.accumulator.packed = packed
    targets = _swap_targets(member)
    before = list(targets)
    targets[:] = [moved.get(id(t), t) for t in targets]
    member.is_applied = True
    try:
        yield
    finally:
        member.is_applied = False
        targets[:] = before
        if member.accumulator is not None:
            member.accumulator.packed = {}


@contextmanager
def _own_weights_known(tracker: Tracker, own: list[Tensor | Packed]) -> Iterator[None]:
    """What is to be compared with the weights that train finds them, while the model holds others."""
    tracker.own_weights = own
    try:
        yield
    finally:
        tracker.own_weights = None


@contextmanager
def _statistics_taken(member: Member) -> Iterator[None]:
    """Statistics that are measured while the average is in the model are its own from then on."""
    tensors = member.tracker.tensors
    record = StatisticsRecord(tensors.norms)

    def take() -> None:
        for name in record.measured():
            member.fresh_layers.add(name)
            _take_statistics(member, name)

    member.take_measured = take
    try:
        yield
    finally:
        member.take_measured = None
        take()


@torch.no_grad()
def _take_statistics(member: Member, layer: str) -> None:
    tensors = member.tracker.tensors
    for index, name in enumerate(tensors.statistic_names):
        if name.rpartition(".")[0] == layer:
            member.statistics[index].copy_(tensors.statistics[index])  # where graphs have found it
    for key in ("running_mean", "running_var"):  # averaged by name: the accumulator stays as it is
        name = f"{layer}.{key}" if layer else key
        if name in tensors.names:
            live = tensors.live[tensors.names.index(name)]
            member.measured_buffers[name] = live.detach().clone()
