"""Swapping other values into the tensors of a model, and back out.

A swap points each live tensor at the other one's memory, which costs microseconds and no memory.
What must not change meanwhile is shared copy-on-write: it is copied by whoever first writes to it.
Where the memory of a live tensor must stay where it is (captured graphs), or is shared (views of
one storage, other processes), contents are exchanged through a bounded scratch instead; and where a
value is narrower than what it is rounded from, the two are packed (`packed.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from polyak.errors import UsageError
from polyak.tensors.blend import paired_parts
from polyak.tensors.interrupts import interrupts_held
from polyak.tensors.packed import Packed
from polyak.tensors.sharding import is_sharded

_SCRATCH_VALUES = 1 << 22  # exchanged at a time: 16 MiB of float32
_owners: dict[int, object] = {}  # id of a live tensor -> whose values are swapped into it


def current_owner(tensors: Iterable[Tensor]) -> object | None:
    """Whose values are swapped into any of these tensors; None if they hold their own."""
    if not _owners:
        return None
    return next((_owners[id(t)] for t in tensors if id(t) in _owners), None)


@contextmanager
def swapped(
    live: Sequence[Tensor],
    values: Sequence[Tensor | Packed],
    *,
    owner: object,
    in_place: set[int],
    stepped: Sequence[Tensor] = (),
) -> Iterator[None]:
    """Swap `values` into the live tensors for the block, then restore their own.

    `in_place` holds the ids of the live tensors whose memory must not be replaced. Writing to a
    live tensor within the block writes to its value, or to a copy of it if that came from
    `copy_on_write` or is `Packed`. An optimizer that steps one of them meanwhile is refused with
    UsageError, or one of `stepped`: the DTensors of which the live tensors are the shards.
    """
    with _marked([*live, *stepped], owner):
        undo = ExitStack()
        try:
            with interrupts_held():
                for tensor, value in zip(live, values, strict=True):
                    _swap_one(tensor, value, undo, in_place=id(tensor) in in_place)
            yield
        finally:
            with interrupts_held():
                undo.close()


def _swap_one(tensor: Tensor, value: Tensor | Packed, undo: ExitStack, *, in_place: bool) -> None:
    if isinstance(value, Packed):
        undo.callback(value.swap_out)
        value.swap_in()
    elif in_place:
        undo.callback(_exchange, tensor, value)
        _exchange(tensor, value)
    if not in_place:
        undo.callback(setattr, tensor, "data", tensor.data)
        tensor.data = value.shared() if isinstance(value, Packed) else value


@contextmanager
def parameters_kept(model: Module) -> Iterator[None]:
    """Put back the parameters for which the block has registered others, which no optimizer would step."""
    before = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        yield
    finally:
        for module, parameters in before:
            held = module._parameters
            for key, old in parameters.items():
                if key in held and not is_sharded(old):  # FSDP registers what it has gathered
                    held[key] = old


@contextmanager
def derived_tensors_recomputed(model: Module) -> Iterator[None]:
    """Recompute what modules derive from their tensors, for the block; restore the old values after it.

    Old-style weight norm, spectral norm and pruning keep a derived `weight` beside the parameters
    it is computed from, and refresh it in the next forward only; `parametrize.cached` keeps
    results by module. Both would show one set of weights while the other is in the model.
    """
    derived = list(_derived(model))
    before = [(module, name, module.__dict__.get(name)) for module, name, _ in derived]
    try:
        recompute_derived(model)
        yield
    finally:
        for module, name, value in before:
            if value is not None:
                module.__dict__[name] = value
        _clear_cached()


def recompute_derived(model: Module) -> None:
    """Recompute what modules derive from their tensors, from the present values of these."""
    _clear_cached()
    for module, name, compute in _derived(model):
        if name in module.__dict__:
            with torch.no_grad():
                module.__dict__[name] = compute(module)


def _derived(model: Module) -> Iterator[tuple[Module, str, Any]]:
    """Modules with a tensor that a forward hook recomputes: its name, and how."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            match type(hook).__name__:
                case "WeightNorm":
                    yield module, hook.name, hook.compute_weight  # type: ignore[attr-defined]
                case "SpectralNorm":
                    yield module, hook.name, _without_iteration(hook)  # type: ignore[attr-defined]
                case _ if hasattr(hook, "apply_mask") and hasattr(hook, "_tensor_name"):
                    yield module, hook._tensor_name, hook.apply_mask


def _without_iteration(hook: Any) -> Any:
    return lambda module: hook.compute_weight(module, do_power_iteration=False)


def _clear_cached() -> None:
    # A cache is only there within `parametrize.cached()`; without an entry, values are computed.
    getattr(parametrize, "_cache", {}).clear()


@contextmanager
def _marked(live: Sequence[Tensor], owner: object) -> Iterator[None]:
    marks = {id(tensor): owner for tensor in live}
    _owners.update(marks)
    guard = register_optimizer_step_pre_hook(_refuse_step)
    try:
        yield
    finally:
        guard.remove()
        for key in marks:
            _owners.pop(key, None)


def _refuse_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    if (owner := current_owner(parameters)) is not None:
        raise UsageError(
            f"{type(optimizer).__name__}.step() inside applied(): the model holds the weights of "
            f"{owner!r}, and training them would damage it. Leave the `with` block first; to "
            "continue training from the average, call copy_to(model)."
        )


def _exchange(a: Tensor, b: Tensor) -> None:
    """Exchange the contents of two tensors of one shape and dtype."""
    with torch.no_grad():
        for x, y in paired_parts(a.detach(), b.detach(), at_most=_SCRATCH_VALUES):
            kept = x.clone()
            x.copy_(y)
            y.copy_(kept)
