"""State that is no tensor, as a torch file holds it; objects that a reader did not build are left out."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints.reading.extra_state import Opaque, TensorAt, kind_of, values_in
from polyak.checkpoints.reading.inert import SetItems
from polyak.checkpoints.reading.pickled_tensors import DTYPES
from polyak.errors import warn


def warn_of_lost(path: object, extra: Mapping[str, Any], *, is_torch: bool) -> None:
    """Warn, once, of what a file cannot hold: safetensors no state at all, torch files no `Opaque`."""
    if is_torch:
        lost = {name: _unbuilt(value) for name, value in extra.items() if _unbuilt(value)}
        reason = "is without state that polyak does not build"
    else:
        lost = {name: kind_of(value) for name, value in extra.items()}
        reason = "holds tensors only, and is without state that is no tensor"
    if lost:
        shown = ", ".join(f"{name} ({kind})" for name, kind in sorted(lost.items())[:10])
        more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
        advice = (
            "Load it with strict=False." if is_torch else "Write a torch file (.pt) to keep it."
        )
        warn(f"{path} {reason}: {shown}{more}. {advice}")


def writable(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The part of extra state that a torch file can hold."""
    return {name: value for name, value in extra.items() if not _unbuilt(value)}


def built(
    value: Any, tensor: Callable[[str], Any], make_set: Callable[[list[Any]], Any] = set
) -> Any:
    """A tree as the objects that it stands for; tensor: gives the tensor of a name."""
    if isinstance(value, TensorAt):
        return tensor(value.name)
    if isinstance(value, Opaque):
        return _object(value)
    if isinstance(value, SetItems):
        return make_set([built(item, tensor, make_set) for item in value])
    if type(value) in (list, tuple):
        return type(value)(built(item, tensor, make_set) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, built(item, tensor, make_set)) for key, item in value.items())
    return value


class SetInOrder:
    """Pickles as a set, in a fixed order: that of a real one differs from process to process."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __reduce__(self) -> tuple[Any, ...]:
        return set, (self._items,)


def lifted(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree of a live object: its tensors, copied to the host, go into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone()
        return TensorAt(name)
    if type(value) in (list, tuple):
        return type(value)(lifted(f"{name}.{i}", item, tensors) for i, item in enumerate(value))
    if type(value) in (dict, OrderedDict):
        return type(value)((k, lifted(f"{name}.{k}", v, tensors)) for k, v in value.items())
    return value


def _object(value: Opaque) -> Any:
    """The object, of one of the harmless kinds that are known; None for any other."""
    dtype = value.name.removeprefix("torch.")
    match value:
        case Opaque(called=False) if value.name.startswith("torch.") and dtype in DTYPES:
            return getattr(torch, dtype)
        case Opaque(name="torch.device", called=True, args=(str(kind),)) if kind.isidentifier():
            return torch.device(kind)
        case Opaque(
            name="_io.BytesIO", called=True, args=(), state=(bytes(data), int(at), None)
        ) if 0 <= at <= len(data):
            stream = io.BytesIO(data)
            stream.seek(at)
            return stream
    return None


def _unbuilt(value: Any) -> str:
    """The first class in a tree that is not built, or nothing."""
    leaves = values_in(value)
    return next((v.name for v in leaves if isinstance(v, Opaque) and _object(v) is None), "")
