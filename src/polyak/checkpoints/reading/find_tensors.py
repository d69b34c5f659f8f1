"""The tensors of a model in nested containers, found by name: `find_tensors`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from polyak.checkpoints.reading.inert import Stub
from polyak.checkpoints.reading.pickled_tensors import TensorRef, is_tensor_like, why_refused
from polyak.checkpoints.reading.stored import MAX_TENSORS
from polyak.errors import ArgumentError, FormatError

MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Where training loops keep the weights, in the order in which they are looked for."""

_CONTAINERS = (dict, list, tuple, Stub)
_MAX_VISITS = 16_000_000
_MAX_DEPTH = 100


@dataclass
class FoundTensors:
    """What a pickle holds. tensors: by name. refused: name -> why it cannot be read."""

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def find_tensors(root: Any, key: str | None, where: str) -> FoundTensors:
    """The tensors under `key` (or under the usual keys, or at the root), named with dots.

    Raises ArgumentError if there is no such key, FormatError if there are no tensors, or if the model's
    cannot be told from others; the message lists the keys that hold tensors.
    """
    return _Search(root, where).run(key)


class _Search:
    """One search through what a pickle holds; all its walks share one budget of visits."""

    def __init__(self, root: Any, where: str) -> None:
        self.root, self.where, self.visits = root, where, 0

    def run(self, key: str | None) -> FoundTensors:
        chosen = self.choose(self.root) if key is None else self.follow(key)
        if isinstance(chosen, TensorRef):
            return FoundTensors({key or "tensor": chosen})
        if isinstance(chosen, Stub) and self.holds_tensor(chosen):
            raise FormatError(f"{self.where}: {why_refused(chosen)}")
        found = FoundTensors()
        for name, value in self.leaves(chosen):
            if name in found.tensors or name in found.refused:
                raise FormatError(
                    f"{self.where}: two tensors are named {name!r}. Pass key= (--key)."
                )
            if isinstance(value, TensorRef):
                found.tensors[name] = value
                if len(found.tensors) > MAX_TENSORS:
                    raise FormatError(f"{self.where}: more than {MAX_TENSORS} tensors.")
            elif _is_array(value) or self.holds_tensor(value):
                found.refused[name] = why_refused(value)
        if not found.tensors and not found.refused:
            raise FormatError(f"{self.where}: There are no tensors here. {self.advice()}")
        return found

    def visit(self, count: int = 1) -> None:
        self.visits += count
        if self.visits > _MAX_VISITS:
            raise FormatError(f"{self.where}: more than {_MAX_VISITS} values besides the tensors.")

    def holds_tensor(self, value: Any) -> bool:
        """Whether a tensor is anywhere inside, objects that are not built included."""
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            current = waiting.pop()
            if is_tensor_like(current):
                return True
            if isinstance(current, _CONTAINERS) and id(current) not in seen:
                seen.add(id(current))
                inner = _children(current)
                self.visit(len(inner))
                waiting.extend(inner)
        return False

    def choose(self, root: Any) -> Any:
        """What holds the model's tensors, if no key was given; FormatError if that is ambiguous.

        The first of the usual keys that holds tensors is taken, and again within it if it only wraps
        another (`{"model": {"state_dict": ...}}`). Without one, the root itself must be a state dict.
        """
        if not isinstance(root, dict):
            return root
        for key in MODEL_KEYS:
            inner = root.get(key)
            if isinstance(inner, (dict, Stub)) and self.holds_tensor(inner):
                return self.choose(inner) if _is_wrapper(inner) else inner
        direct = any(isinstance(value, TensorRef) for value in root.values())
        inside = [
            value
            for value in root.values()
            if not isinstance(value, TensorRef) and self.holds_tensor(value)
        ]
        # Tensors directly in the root are a state dict, in which an object that cannot be built is one
        # more tensor, refused by name. A dict or list of tensors beside or instead of them could be
        # anything: an optimizer's state, an average, a second model.
        if inside and not (direct and all(isinstance(value, Stub) for value in inside)):
            raise FormatError(
                f"{self.where}: cannot tell which tensors are the model's. {self.advice()} "
                'key="" takes all of them.'
            )
        return root

    def follow(self, key: str) -> Any:
        """Follow `key` from the root; keys may contain dots themselves, so the longest that fits is taken."""
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
        """Every value that is not a container, in order, with its dotted name."""
        waiting: list[tuple[str, Any, int]] = [("", root, 0)]
        while waiting:
            prefix, value, depth = waiting.pop()
            if not isinstance(value, (dict, list, tuple)):
                yield prefix, value
                continue
            if depth == _MAX_DEPTH:
                raise FormatError(
                    f"{self.where}: containers are nested more than {_MAX_DEPTH} deep."
                )
            self.visit(len(value))
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            dot = f"{prefix}." if prefix else ""
            inner = [(key, item) for key, item in pairs if _is_name(key) and not _is_plain(item)]
            for key, item in reversed(inner):
                name = f"{dot}{key}"
                self.visit(len(name) // 8)  # names grow with the depth: bound their length in all
                waiting.append((name, item, depth + 1))

    def advice(self) -> str:
        """The keys there are to choose from."""
        if not isinstance(self.root, dict):
            return "The file should hold a dict of tensors, as model.state_dict() gives."
        items = self.root.items()
        keys = [str(key) for key, value in items if _is_name(key) and self.holds_tensor(value)]
        if not keys:
            return "It holds no tensor anywhere."
        shown = ", ".join(repr(key[:100]) for key in keys[:20]) + (", ..." if keys[20:] else "")
        return f"Pass key= (--key) to say where they are; there are tensors under {shown}."


def _children(value: Any) -> list[Any]:
    if isinstance(value, Stub):
        return [value.args, value.state, value.contents]
    return list(value.values()) if isinstance(value, dict) else list(value)


def _is_array(value: Any) -> bool:
    return isinstance(value, Stub) and value.name.endswith(".multiarray._reconstruct")


def _is_wrapper(value: Any) -> bool:
    """Whether the weights are one level further down, under one of the usual keys."""
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
    if isinstance(container, (list, tuple)) and _is_index(name) and int(name) < len(container):
        return container[int(name)]
    return _NOTHING


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, bytes, int, float))


def _is_name(key: Any) -> bool:
    return isinstance(key, (str, int))
