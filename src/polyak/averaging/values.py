"""The values of an average: swapped into the model, copied into one, or returned by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor
from torch.nn import Module

from polyak.averaging.tracker import Member
from polyak.errors import check_match
from polyak.tensors.finite import refuse_nonfinite
from polyak.tensors.names import named_tensors
from polyak.tensors.swap import derived_tensors_recomputed, recompute_derived, swapped


class Loan:
    """The average in its model, until `give_back`; also a context manager."""

    def __init__(self, swap: AbstractContextManager[None] | None = None) -> None:
        self._swap = ExitStack()
        if swap is not None:
            self._swap.enter_context(swap)

    def give_back(self) -> None:
        """Restore the model's own weights. A second call does nothing."""
        self._swap.close()

    def __enter__(self) -> Loan:
        return self

    def __exit__(self, *exception: object) -> None:
        self.give_back()


def as_model_dtype(member: Member) -> list[Tensor]:
    """The average of each weight in the weight's dtype: the accumulator itself wherever it can be."""
    targets = member.accumulator.swap_targets() if member.accumulator is not None else []
    return [_value(member, targets, i, live) for i, live in enumerate(member.tracker.tensors.live)]


@torch.no_grad()
def copied_values(member: Member, device: torch.device | None = None) -> dict[str, Tensor]:
    """Everything a state dict of the averaged model holds: by name, ties under all their names."""
    tensors = member.tracker.tensors
    named, _ = tensors.inspect()
    averaged = dict(zip(tensors.names, as_model_dtype(member), strict=True))
    statistics = dict(zip(tensors.statistic_names, member.statistics, strict=True))
    result: dict[str, Tensor] = {}
    for name, slot in named.slots.items():
        value = averaged.get(name, statistics.get(name, slot.tensor)).detach()
        if slot.persistent:
            result[name] = value.to(device or value.device, copy=True)
    return result | {alias: result[n] for alias, n in named.ties.items() if n in result}


@contextmanager
def swapped_in(member: Member, *, owner: object, in_place: bool) -> Iterator[None]:
    """Swap the average, its statistics included, into the model for the block."""
    tensors = member.tracker.tensors
    live = [*tensors.live, *tensors.statistics]
    values = [*as_model_dtype(member), *member.statistics]
    stay = {id(tensor) for tensor in live} if in_place else tensors.shares_memory()
    with (
        swapped(live, values, owner=owner, in_place=stay),
        _track_swapped(member, live, values, stay),
        derived_tensors_recomputed(tensors.model),
        _statistics_watched(member, tensors.statistics),
    ):
        yield


@torch.no_grad()
def copy_into(model: Module, values: dict[str, Tensor]) -> None:
    """Copy values into a model by name. Raises MismatchError, naming all that does not fit."""
    named = named_tensors(model)
    persistent = {n: s.tensor for n, s in named.slots.items() if s.persistent}
    source = {n: t for n, t in values.items() if n not in named.ties}
    check_match(
        {n: f"shape {tuple(t.shape)}" for n, t in persistent.items()},
        {n: f"shape {tuple(t.shape)}" for n, t in source.items()},
        f"The average does not fit this {type(model).__name__}.",
        "Nothing was copied. Build the model as the averaged one was built.",
    )
    for name, tensor in persistent.items():
        tensor.detach().copy_(source[name])
    recompute_derived(model)


def refuse_nonfinite_average(member: Member, what: str) -> None:
    """Raise NonFiniteError that names the averaged tensors and statistics with NaN or infinity."""
    tensors, accumulator = member.tracker.tensors, member.accumulator
    groups = [] if accumulator is None else accumulator.tensors_held()
    held = chain.from_iterable(zip(tensors.names, group, strict=True) for group in groups)
    statistics = zip(tensors.statistic_names, member.statistics, strict=True)
    refuse_nonfinite(
        [*held, *statistics],
        what,
        "One bad update spoils an average for good: load an earlier state, and construct it with "
        "nonfinite='skip' or 'raise' to keep such weights out.",
    )


def _value(member: Member, targets: Sequence[Tensor], index: int, live: Tensor) -> Tensor:
    if targets:
        kept = targets[index]
        if (kept.dtype, kept.device, kept.stride()) == (live.dtype, live.device, live.stride()):
            return kept
    if member.accumulator is None:
        return live.detach()
    with torch.no_grad(), torch.inference_mode(False):
        return torch.empty_like(live).copy_(member.accumulator.value(index, member.clock))


@contextmanager
def _track_swapped(
    member: Member, live: Sequence[Tensor], values: Sequence[Tensor], stay: set[int]
) -> Iterator[None]:
    """After an in-place swap the averaged values are in the live tensors: look for them there."""
    moved = {id(v): w.detach() for w, v in zip(live, values, strict=True) if id(w) in stay}
    targets = member.accumulator.swap_targets() if member.accumulator is not None else []
    lists = (targets, member.statistics)
    before = [list(tensors) for tensors in lists]
    for tensors in lists:
        tensors[:] = [moved.get(id(t), t) for t in tensors]
    member.is_applied = True
    try:
        yield
    finally:
        member.is_applied = False
        for tensors, own in zip(lists, before, strict=True):
            tensors[:] = own


@contextmanager
def _statistics_watched(member: Member, statistics: Sequence[Tensor]) -> Iterator[None]:
    """Statistics that change while the average is in the model are its own from then on."""
    before = [statistic._version for statistic in statistics]
    try:
        yield
    finally:
        if before != [statistic._version for statistic in statistics]:
            member.statistics_are_fresh = True
