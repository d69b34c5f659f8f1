"""Weights from a record or a file into a model, tensor by tensor, and the model's own back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import Module

from polyak.checkpoints.intervals import Interval
from polyak.checkpoints.merging.average import iter_averaged_tensors
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.errors import ArgumentError, MismatchError, check_match
from polyak.study.evaluations import digest_of
from polyak.tensors.names import named_tensors
from polyak.tensors.policy import RUNNING_STATISTICS
from polyak.tensors.swap import recompute_derived

Weights = str | Path | Mapping[str, Tensor]


def check_fits(model: Module, newest: Interval) -> None:
    """Raise MismatchError, naming every difference, unless the record is one of this model."""
    with newest.open() as opened:
        have = {name: list(tensor.shape) for name, tensor in opened.tensors.items()}
    check_shapes(model, have, f"{newest.path.parent} is not the record of this model")


def check_shapes(model: Module, have: Mapping[str, list[int]], what: str) -> None:
    """Raise MismatchError that says `what` and every difference, unless these tensors are the model's."""
    slots, ties = _places(model)
    check_match(
        {ties.get(name, name): shape for name, shape in have.items()},
        {name: list(tensor.shape) for name, tensor in slots.items()},
        f"{what} ({type(model).__name__}).",
        "Build the model in the way in which it was trained.",
    )


def parameters_of(model: Module) -> frozenset[str]:
    """The names of the model's parameters; a tied one has several."""
    named = named_tensors(model)
    first = {name for name, slot in named.slots.items() if slot.is_parameter}
    return frozenset(first | {alias for alias, name in named.ties.items() if name in first})


def first_names_in(model: object, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are one in the model under its first name, whichever names the file has; others as they are.

    Raises MismatchError where such tensors are of different values.
    """
    ties = named_tensors(model).ties if isinstance(model, Module) else {}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        first = ties.get(name, name)
        kept = found.setdefault(first, tensor)
        if kept is not tensor and not torch.equal(kept, tensor):
            raise MismatchError(
                f"{first} is one tensor in the model, also called {name}, and two of other values in the file. Build "
                "the model in the way in which it was trained."
            )
    return found


def has_statistics(names: Iterable[str]) -> bool:
    """Whether there are running statistics among the tensors, which an average does not have of its own."""
    return any(name.rpartition(".")[2] in RUNNING_STATISTICS for name in names)


Source = Callable[[Mapping[str, Tensor]], Iterable[tuple[str, Tensor]]]
"""Gives (name, tensor); it may make the tensors in the memory of those that it is given by name."""


@torch.no_grad()
def fill(model: Module, source: Source) -> None:
    """Copy the tensors into the model's own, one at a time, unless they were made there."""
    slots, ties = _places(model)
    own = slots | {alias: slots[name] for alias, name in ties.items() if name in slots}
    for name, tensor in source(own):
        if tensor is not own[name]:
            own[name].copy_(tensor)
    recompute_derived(model)


@contextmanager
def own_weights(model: Module | None) -> Iterator[None]:
    """After the block the model has the weights that it had before."""
    if model is None:
        yield
        return
    kept = {name: tensor.detach().clone() for name, tensor in _places(model)[0].items()}
    try:
        yield
    finally:
        fill(model, lambda own: kept.items())


def tensors_of(
    weights: Weights, into: Mapping[str, Tensor] = MappingProxyType({})
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file or of a state dict, (name, tensor)."""
    if isinstance(weights, Mapping):
        yield from weights.items()
        return
    with open_checkpoint(weights) as opened:
        yield from iter_averaged_tensors([opened], "swa", into=into)


def weights_identity(weights: Weights) -> str:
    """A digest of their contents."""
    digest = hashlib.sha256()
    if not isinstance(weights, Mapping | str | Path):
        raise ArgumentError(
            f"last is a {type(weights).__name__}; expected the path of a file of weights, or a state dict."
        )
    for name, tensor in tensors_of(weights):
        digest.update(f"{name} {digest_of(tensor)}".encode())
    return digest.hexdigest()


def _places(model: Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    named = named_tensors(model)
    slots = {n: s.tensor for n, s in named.slots.items() if s.persistent or s.is_parameter}
    return slots, dict(named.ties)
