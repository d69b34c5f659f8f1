"""State that is no tensor (`get_extra_state`), as it is held between reading and writing.

A tree of containers and plain values, in which a tensor is a `TensorAt` (it is among the tensors of the
checkpoint, under that name) and an object that polyak does not build is an `Opaque`. Trees can be compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

EXTRA_STATE = "_extra_state"
"""The last part of the name under which `Module.state_dict` puts what `get_extra_state` returns."""


@dataclass(frozen=True, slots=True)
class TensorAt:
    """A tensor within extra state, by its name in the checkpoint."""

    name: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """What a pickle would import (`called` false), or build by calling it with args."""

    name: str
    called: bool = False
    args: Any = ()
    state: Any = None
    contents: Any = ()


def is_extra(name: str) -> bool:
    """Whether a state dict's entry is what `get_extra_state` returned.

    >>> is_extra("layer._extra_state"), is_extra("layer.weight")
    (True, False)
    """
    return name.rpartition(".")[2] == EXTRA_STATE


def values_in(value: Any) -> Iterator[Any]:
    """Everything in a tree that is not a container."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, Mapping):
            waiting.extend(current.values())
        elif isinstance(current, (list, tuple)):
            waiting.extend(current)
        else:
            yield current


def tensors_in(extra: Mapping[str, Any]) -> set[str]:
    """The names of the tensors within extra state."""
    return {leaf.name for leaf in values_in(extra) if isinstance(leaf, TensorAt)}


def renamed(value: Any, prefix: str) -> Any:
    """The same tree, whose tensors have a prefix before their names."""
    if isinstance(value, TensorAt):
        return TensorAt(prefix + value.name)
    if isinstance(value, Mapping):
        pairs = [(key, renamed(item, prefix)) for key, item in value.items()]
        return OrderedDict(pairs) if isinstance(value, OrderedDict) else dict(pairs)
    if isinstance(value, (list, tuple)):
        return type(value)([renamed(item, prefix) for item in value])
    return value


def kind_of(value: Any) -> str:
    """What a tree is, for a message: the class of an object, or the type of a plain value."""
    return value.name if isinstance(value, Opaque) else type(value).__name__
