"""What predicts together: each member as a model that is lent for one pass."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor
from torch.nn import Module

from polyak.averaging.average import Average
from polyak.averaging.averages import Averages
from polyak.averaging.interop import read_foreign
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.errors import ArgumentError, MismatchError, UsageError
from polyak.maths.profiles import SWA
from polyak.study.trajectory import Trajectory
from polyak.tensors.names import named_tensors
from polyak.tensors.policy import RUNNING_STATISTICS
from polyak.uncertainty import swag_files
from polyak.uncertainty.swag import SWAG

Lender = Callable[[], AbstractContextManager[Module]]


def lenders(
    members: Any, model: Module | None, draws: int, options: Mapping[str, Any]
) -> list[tuple[Lender, float]]:
    """A lender for every model that is to be run, with its weight.

    options: `scale`, `generator`, `update_bn`, `limit` and `forward`, for the draws of a SWAG.
    """
    several = list(_flat(members))
    if not several:
        raise ArgumentError("There are no members to predict with.")
    lent: list[tuple[Lender, float]] = []
    for given in several:
        member = _saved_swag(given, model) or given
        if isinstance(member, SWAG):
            lent += [(partial(member.sample, **options), 1 / draws)] * draws
        else:
            lent.append((_lender(member, model, options), 1.0))
    return lent


def _flat(members: Any) -> Iterator[Any]:
    """Members one by one; each is one, or several of them."""
    if isinstance(members, Trajectory):
        yield from (one.open for one in members.intervals)
    elif isinstance(members, Averages):
        yield from members.values()
    elif isinstance(members, (Module, Average, Mapping, str, os.PathLike)):
        yield members
    elif isinstance(members, Iterable):
        yield from chain.from_iterable(map(_flat, members))
    else:
        raise ArgumentError(
            f"A member is a {type(members).__name__}; expected a SWAG, an Average, a model, a path, a state "
            "dict, or a Trajectory."
        )


def _lender(member: Any, model: Module | None, options: Mapping[str, Any]) -> Lender:
    if isinstance(member, Module):
        return lambda: nullcontext(member)
    if isinstance(member, Average):
        return partial(_averaged, member, options)
    return partial(_loaded, member, _needed(member, model))


@contextmanager
def _averaged(average: Average, options: Mapping[str, Any]) -> Iterator[Module]:
    if average.empty:
        raise UsageError(f"{average!r} is empty: there is nothing to predict with.")
    batches = options["update_bn"]
    if batches is not None and average._member.stale_layers():
        average.update_bn(batches, forward=options["forward"], limit=options["limit"])
    with average.applied() as model:
        yield model


@contextmanager
def _loaded(member: Any, model: Module) -> Iterator[Module]:
    """The model with the weights and buffers of a file or state dict, as if they were an average."""
    buffers = [
        glob.escape(name)
        for name, slot in named_tensors(model).slots.items()
        if slot.persistent and not slot.is_parameter and slot.key not in RUNNING_STATISTICS
        if slot.tensor.is_floating_point() or slot.tensor.is_complex()
    ]
    average = Average(model, SWA(), include="*", average_buffers=buffers or None)
    average.import_state(_tensors(member, model), updates=1)
    average._member.fresh_layers = set(average._tracker.tensors.norms)  # they came with the weights
    with average.applied():
        yield model


def _tensors(member: Any, model: Module) -> dict[str, Tensor]:
    """By the model's names, every one of them."""
    if isinstance(member, Mapping):
        found = dict(member)
    else:
        with member() if callable(member) else open_checkpoint(member) as checkpoint:
            found = {name: stored.load() for name, stored in checkpoint.tensors.items()}
            found |= {alias: found[name] for alias, name in checkpoint.ties.items()}
    tensors = read_foreign(found, model).tensors
    named = named_tensors(model)
    if unexpected := tensors.keys() - named.slots.keys() - named.ties.keys():
        raise MismatchError.of(
            f"A member does not fit this {type(model).__name__}.",
            unexpected=unexpected,
            advice="Pass the model that it was saved from as model=.",
        )
    return tensors


def _saved_swag(member: Any, model: Module | None) -> SWAG | None:
    """The SWAG in a file, if that is what the member is."""
    is_path = isinstance(member, (str, os.PathLike))
    if not is_path or (rank := swag_files.rank_of(member)) is None:
        return None
    swag = SWAG(_needed(member, model), rank)
    swag.load(member)
    return swag


def _needed(member: Any, model: Module | None) -> Module:
    if not isinstance(model, Module):
        what = f"{os.fspath(member)}" if isinstance(member, (str, os.PathLike)) else "A state dict"
        raise ArgumentError(f"{what} needs a model to be loaded into: pass model=.")
    return model
