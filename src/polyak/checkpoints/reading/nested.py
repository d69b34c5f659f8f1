"""The tensors of a model inside nested containers, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from polyak.checkpoints.reading.inert import Stub
from polyak.checkpoints.reading.layout import MAX_TENSORS
from polyak.checkpoints.reading.torch_objects import TensorRef, is_tensor_like, why_refused
from polyak.errors import ArgumentError, FormatError

MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Where training loops keep the weights, in the order in which they are looked for."""

_MAX_VISITS = 16_000_000
_MAX_DEPTH = 100


@dataclass
class Found:
    """tensors: by name. refused: name -> why."""

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def find_tensors(root: Any, key: str | None, where: str) -> Found:
    """The tensors under `key` (or under the usual keys, or at the root), named with dots.

    Raises ArgumentError where the key leads nowhere, FormatError where nothing, or more than one
    thing, could be meant; the message lists what there is.
    """
    return _Search(root, where).run(key)


class _Search:
    """One look through what a pickle holds; all its walks share one budget of visits."""

    def __init__(self, root: Any, where: str) -> None:
        self.root, self.where, self.visits = root, where, 0

    def run(self, key: str | None) -> Found:
        chosen = self.choose(self.root) if key is None else self.follow(key)
        if isinstance(chosen, TensorRef):
            return Found({key or "tensor": chosen})
        if isinstance(chosen, Stub) and self.holds_tensor(chosen):
            raise FormatError(f"{self.where} {why_refused(chosen)}.")
        found = Found()
        for name, value in self.leaves(chosen):
            if name in found.tensors or name in found.refused:
                raise FormatError(
                    f"{self.where}: two tensors are named {name!r}. Say key= (--key)."
                )
            if isinstance(value, TensorRef):
                found.tensors[name] = value
                if len(found.tensors) > MAX_TENSORS:
                    raise FormatError(f"{self.where}: more than {MAX_TENSORS} tensors.")
            elif _is_array(value) or self.holds_tensor(value):
                found.refused[name] = why_refused(value)
        if not found.tensors and not found.refused:
            raise FormatError(f"{self.where}: no tensors here. {self.advice()}")
        return found

    def visit(self, count: int = 1) -> None:
        self.visits += count
        if self.visits > _MAX_VISITS:
            raise FormatError(
                f"{self.where}: more than {_MAX_VISITS} values lie around the tensors."
            )

    def holds_tensor(self, value: Any) -> bool:
        """Whether a tensor lies anywhere inside, objects that are not built included."""
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            current = waiting.pop()
            if is_tensor_like(current):
                return True
            if isinstance(current, dict | list | tuple | Stub) and id(current) not in seen:
                seen.add(id(current))
                inner = _children(current)
                self.visit(len(inner))
                waiting.extend(inner)
        return False

    def choose(self, root: Any) -> Any:
        """Without a key: the usual places, else a root that holds tensors and nothing else does."""
        if not isinstance(root, dict):
            return root
        for key in MODEL_KEYS:
            inner = root.get(key)
            if isinstance(inner, dict | Stub) and self.holds_tensor(inner):
                return self.choose(inner) if _is_wrapper(inner) else inner
        direct = any(isinstance(value, TensorRef) for value in root.values())
        inside = [
            value
            for value in root.values()
            if not isinstance(value, TensorRef) and self.holds_tensor(value)
        ]
        if inside and not (direct and all(isinstance(value, Stub) for value in inside)):
            raise FormatError(
                f"{self.where}: which of the tensors are the model's? {self.advice()} "
                'key="" takes all of them.'
            )
        return root

    def follow(self, key: str) -> Any:
        """Go down `key`; its parts may hold dots themselves, so the longest that fits is taken."""
        current, rest = self.root, key
        while rest:
            parts = rest.split(".")
            for count in range(len(parts), 0, -1):
                found = _item(current, ".".join(parts[:count]))
                if found is not _NOTHING:
                    current, rest = found, ".".join(parts[count:])
                    break
            else:
                raise ArgumentError(
                    f"{self.where} has no key {key!r} ({rest!r} was not found). {self.advice()}"
                )
        return current

    def leaves(self, root: Any) -> Iterator[tuple[str, Any]]:
        """Every value that is no container, in order, with its dotted name."""
        waiting: list[tuple[str, Any, int]] = [("", root, 0)]
        while waiting:
            prefix, value, depth = waiting.pop()
            if not isinstance(value, dict | list | tuple):
                yield prefix, value
                continue
            if depth == _MAX_DEPTH:
                raise FormatError(f"{self.where}: containers more than {_MAX_DEPTH} deep.")
            self.visit(len(value))
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            dot = f"{prefix}." if prefix else ""
            inner = [(key, item) for key, item in pairs if _is_name(key) and not _is_plain(item)]
            for key, item in reversed(inner):
                name = f"{dot}{key}"
                self.visit(len(name) // 8)
                waiting.append((name, item, depth + 1))

    def advice(self) -> str:
        """What there is to choose from."""
        if not isinstance(self.root, dict):
            return "The file should hold a dict of tensors, as model.state_dict() gives."
        items = self.root.items()
        keys = [str(key) for key, value in items if _is_name(key) and self.holds_tensor(value)]
        if not keys:
            return "No tensor is in it at all."
        shown = ", ".join(repr(key[:100]) for key in keys[:20]) + (", ..." if keys[20:] else "")
        return f"Say where they are with key= (--key); tensors are under {shown}."


def _children(value: Any) -> list[Any]:
    if isinstance(value, Stub):
        return [value.args, value.state, value.contents]
    return list(value.values()) if isinstance(value, dict) else list(value)


def _is_array(value: Any) -> bool:
    return isinstance(value, Stub) and value.name.endswith(".multiarray._reconstruct")


def _is_wrapper(value: Any) -> bool:
    """Whether the weights lie one level further down, under one of the usual keys."""
    return (
        isinstance(value, dict)
        and any(isinstance(value.get(key), dict) for key in MODEL_KEYS)
        and not any(isinstance(item, TensorRef) for item in value.values())
    )


_NOTHING = object()


def _item(container: Any, name: str) -> Any:
    if isinstance(container, dict):
        if name in container:
            return container[name]
        return container.get(int(name), _NOTHING) if _is_index(name) else _NOTHING
    if isinstance(container, list | tuple) and _is_index(name) and int(name) < len(container):
        return container[int(name)]
    return _NOTHING


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bytes | int | float)


def _is_name(key: Any) -> bool:
    return isinstance(key, str | int)
