"""The values of an average: lent to the model, copied into one, or given out by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor
from torch.nn import Module

from polyak.averaging.accumulators import Running
from polyak.averaging.tracker import Following, Held
from polyak.errors import EmptyAverage, MismatchError, warn
from polyak.tensors.finite import refuse_nonfinite
from polyak.tensors.names import named_tensors
from polyak.tensors.swap import lent, recomputed, refresh


def lendable(following: Following, held: Held) -> list[Tensor]:
    """The average of each weight in the weight's dtype: the accumulator itself wherever it can be."""
    return [_lendable(held, i, live) for i, live in enumerate(following.roster.live)]


@torch.no_grad()
def copies(
    following: Following, held: Held, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Everything a state dict of the averaged model holds: by name, ties under all their names."""
    roster = following.roster
    named, _ = roster.look()
    index_of = {name: index for index, name in enumerate(roster.names)}
    statistics = dict(zip(roster.statistic_names, held.statistics, strict=True))
    result: dict[str, Tensor] = {}
    for name, slot in named.slots.items():
        if name in index_of:
            value = _lendable(held, index_of[name], slot.tensor)
        else:
            value = statistics.get(name, slot.tensor).detach()
        if slot.persistent:
            result[name] = value.to(device or value.device, copy=True)
    return result | {alias: result[n] for alias, n in named.ties.items() if n in result}


@contextmanager
def loan(following: Following, held: Held, *, owner: object, in_place: bool) -> Iterator[None]:
    """Let the model hold the average, its statistics included, within the block."""
    roster = following.roster
    live = [*roster.live, *roster.statistics]
    values = [*lendable(following, held), *held.statistics]
    stay = {id(tensor) for tensor in live} if in_place else roster.shares_memory()
    with (
        lent(live, values, owner=owner, in_place=stay),
        _kept_right(held, live, values, stay),
        recomputed(roster.model),
        _statistics_watched(held, roster.statistics),
    ):
        yield


@torch.no_grad()
def copy_into(model: Module, values: dict[str, Tensor]) -> None:
    """Copy values into a model by name. Raises MismatchError, naming all that does not fit."""
    named = named_tensors(model)
    persistent = {n: s.tensor for n, s in named.slots.items() if s.persistent}
    source = {n: t for n, t in values.items() if n not in named.ties}
    changed = {
        n: f"shape {tuple(persistent[n].shape)}, the average's is {tuple(source[n].shape)}"
        for n in persistent.keys() & source.keys()
        if persistent[n].shape != source[n].shape
    }
    missing, unexpected = source.keys() - persistent.keys(), persistent.keys() - source.keys()
    if missing or unexpected or changed:
        raise MismatchError.of(
            f"The average does not fit this {type(model).__name__}.",
            missing=missing,
            unexpected=unexpected,
            changed=changed,
            advice="Nothing was copied. Build the model as the averaged one was built.",
        )
    for name, tensor in persistent.items():
        tensor.detach().copy_(source[name])
    refresh(model)


def warn_empty(owner: object, consequence: str) -> None:
    """Say that nothing has been averaged, and what follows."""
    warn(
        f"{owner!r} is empty: nothing has been averaged yet, so {consequence}.",
        EmptyAverage,
    )


def refuse_nonfinite_average(following: Following, held: Held, what: str) -> None:
    """Raise NonFiniteError that names the averaged tensors and statistics with NaN or infinity."""
    names, store = following.roster.names, held.store
    kept = [] if store is None else [zip(names, g, strict=True) for g in store.groups()]
    statistics = zip(following.roster.statistic_names, held.statistics, strict=True)
    refuse_nonfinite(
        [*chain.from_iterable(kept), *statistics],
        what,
        "One bad update spoils an average for good: load an earlier state, and construct it with "
        "nonfinite='skip' or 'raise' to keep such weights out.",
    )


def _lendable(held: Held, index: int, live: Tensor) -> Tensor:
    store = held.store
    if isinstance(store, Running) and store.is_plain():
        kept = store.tensors[index]
        if (kept.dtype, kept.device, kept.stride()) == (live.dtype, live.device, live.stride()):
            return kept
    if store is None:
        return live.detach()
    with torch.no_grad(), torch.inference_mode(False):
        return torch.empty_like(live).copy_(store.render(index, held.clock))


@contextmanager
def _kept_right(
    held: Held, live: Sequence[Tensor], values: Sequence[Tensor], stay: set[int]
) -> Iterator[None]:
    """Where contents changed places the average lies in the live tensor: look for it there."""
    moved = {id(v): w.detach() for w, v in zip(live, values, strict=True) if id(w) in stay}
    store, statistics = held.store, held.statistics
    accumulators = store.tensors if isinstance(store, Running) else []
    held.statistics = [moved.get(id(s), s) for s in statistics]
    if isinstance(store, Running):
        store.tensors = [moved.get(id(t), t) for t in accumulators]
    held.is_lent = True
    try:
        yield
    finally:
        held.is_lent = False
        held.statistics = statistics
        if isinstance(store, Running):
            store.tensors = accumulators


@contextmanager
def _statistics_watched(held: Held, statistics: Sequence[Tensor]) -> Iterator[None]:
    """Statistics that change while the average is in the model are its own from then on."""
    before = [statistic._version for statistic in statistics]
    try:
        yield
    finally:
        if before != [statistic._version for statistic in statistics]:
            held.statistics_are_fresh = True
