"""The tensors of a model by name: what wrappers add is taken off, ties are recorded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from polyak.errors import require
from polyak.tensors.memory import odd_form
from polyak.tensors.sharding import local

# What wrappers insert into the names of a model's tensors. The underscored ones belong to nobody
# else; `module` is taken off only below classes that are known to put it there, because a user's
# model may well have an attribute of that name.
_PREFIXES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_WRAPPERS = {
    "DataParallel": ("module",),
    "DistributedDataParallel": ("module",),
    "AveragedModel": ("module",),
    "DeepSpeedEngine": ("module",),
    "_FabricModule": ("_forward_module", "_original_module"),
}


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of a model, and the place that holds it."""

    name: str
    module: Module
    key: str
    tensor: Tensor
    is_parameter: bool
    persistent: bool


@dataclass(frozen=True)
class Named:
    """All tensors of a model: `slots` by their first name, `ties` from other names to the first."""

    slots: dict[str, Slot]
    ties: dict[str, str]


def require_module(model: object, what: str) -> None:
    """ArgumentError unless it is a torch module, rather than its class or something else."""
    hint = f" Call it: {model.__name__}(...)." if isinstance(model, type) else ""
    found = model.__name__ if isinstance(model, type) else type(model).__name__
    require(
        isinstance(model, Module),
        f"{what} needs a torch module; found {found}.{hint}",
    )


def named_tensors(model: Module) -> Named:
    """Every parameter and buffer of a model by its name without the prefixes of wrappers.

    A tensor that is held in several places (tied weights, shared modules) appears once, under its
    first name; the other names are in `ties`.

    >>> import torch
    >>> named = named_tensors(torch.nn.DataParallel(torch.nn.Linear(1, 1)))
    >>> sorted(named.slots)
    ['bias', 'weight']
    """
    slots: dict[str, Slot] = {}
    ties: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for slot in _walk(model):
        first = first_name.setdefault(id(slot.tensor), slot.name)
        if first == slot.name:
            slots[slot.name] = slot
        else:
            ties[slot.name] = first
    return Named(slots, ties)


def named_modules(model: Module) -> Iterator[tuple[str, Module]]:
    """Every place of every module, shared ones once per place, names without wrappers' prefixes."""
    yield from _modules(model, "", frozenset())


def overwrite(model: Module, tensor: Tensor, source: Tensor) -> None:
    """Give a tensor of the model the values of another.

    One of an odd form, which cannot always be written to, is replaced by a copy wherever it is held.
    """
    if not odd_form(tensor):
        local(tensor).detach().copy_(local(source))
        return
    copy = source.detach().clone()
    new = Parameter(copy, requires_grad=False) if isinstance(tensor, Parameter) else copy
    new.requires_grad_(tensor.requires_grad)
    holders: Any = [h for m in model.modules() for h in (m._parameters, m._buffers)]
    for holder in holders:
        holder.update({key: new for key, held in holder.items() if held is tensor})


def _walk(model: Module) -> Iterator[Slot]:
    for prefix, module in _modules(model, "", frozenset()):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield Slot(prefix + key, module, key, parameter, True, True)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                persistent = key not in module._non_persistent_buffers_set
                yield Slot(prefix + key, module, key, buffer, False, persistent)


def _modules(module: Module, prefix: str, above: frozenset[int]) -> Iterator[tuple[str, Module]]:
    """The module and all below it, each with the prefix of the names of what it holds."""
    if id(module) in above:  # a module that holds itself further down: it has been named already
        return
    yield prefix, module
    for key, child in module._modules.items():
        if child is not None:
            below = prefix if _is_wrapper(module, key) else f"{prefix}{key}."
            yield from _modules(child, below, above | {id(module)})


def _is_wrapper(module: Module, key: str) -> bool:
    return key in _PREFIXES or any(
        key in _WRAPPERS.get(base.__name__, ()) for base in type(module).__mro__
    )
