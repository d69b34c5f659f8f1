"""The tensors of a model in nested containers, found by name: `find_tensors`."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from polyak.checkpoints.reading.extra_state import Opaque, TensorAt, is_extra
from polyak.checkpoints.reading.inert import PLAIN, Global, StateDict, Stub
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
    """What a pickle holds. tensors: by name. refused: name -> why it cannot be read. extra: other state.

    attributes: those of the state dict that holds them (`_metadata`), if it has any. order: the names of
    tensors and other state as they stand there.
    """

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    attributes: dict[Any, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()


def find_tensors(root: Any, key: str | None, where: str) -> FoundTensors:
    """The tensors under `key` (or under the usual keys, or at the root), named with dots.

    Raises ArgumentError if there is no such key, FormatError if there are no tensors, or if the model's
    cannot be told from others; the message lists the keys that hold tensors.
    """
    return _Search(root, where).run(key)


def holds_tensor(value: Any, where: str) -> bool:
    """Whether a tensor is anywhere inside, objects that are not built included."""
    return _Search(value, where).holds_tensor(value)


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
        if isinstance(chosen, StateDict) and isinstance(chosen.state, dict):
            found.attributes = chosen.state
        extra = self.extra_in(chosen)
        rest = {k: v for k, v in chosen.items() if k not in extra} if extra else chosen
        for name, value in self.leaves(rest):
            self.add(found, name, value)
        found.order = tuple(found.tensors)
        if extra:
            found.order = tuple(n for n in chosen if n in extra or n in found.tensors)
        for name, value in extra.items():
            found.extra[name] = self.tree(found, name, value, 0)
        if not found.tensors and not found.refused:
            raise FormatError(f"{self.where}: There are no tensors here. {self.advice()}")
        return found

    def add(self, found: FoundTensors, name: str, value: Any) -> None:
        if name in found.tensors or name in found.refused:
            raise FormatError(f"{self.where}: two tensors are named {name!r}. Pass key=.")
        if isinstance(value, TensorRef):
            found.tensors[name] = value
            if len(found.tensors) > MAX_TENSORS:
                raise FormatError(f"{self.where}: more than {MAX_TENSORS} tensors.")
        elif _is_array(value) or self.holds_tensor(value):
            found.refused[name] = why_refused(value)

    def extra_in(self, chosen: Any) -> dict[str, Any]:
        """The state beside the tensors: what `get_extra_state` returned, and all else in a module's state.

        A state dict of torch says by its `_metadata` that it is one; in any other dict, values without
        tensors (epoch, arguments) are not the model's.
        """
        if not isinstance(chosen, dict):
            return {}
        attributes = chosen.state if isinstance(chosen, StateDict) else None
        whole = isinstance(attributes, dict) and "_metadata" in attributes
        return {
            key: value
            for key, value in chosen.items()
            if isinstance(key, str) and not is_tensor_like(value)
            if is_extra(key) or (whole and not _is_array(value) and not self.holds_tensor(value))
        }

    def tree(self, found: FoundTensors, name: str, value: Any, depth: int) -> Any:
        """Extra state as containers, plain values, `TensorAt` and `Opaque`, nothing shared within it."""
        self.visit(1 + len(name) // 8)
        if depth > _MAX_DEPTH:
            raise FormatError(f"{self.where}: {name[:100]} is nested more than {_MAX_DEPTH} deep.")

        def inner(key: Any, item: Any) -> Any:
            return self.tree(found, f"{name}.{key}", item, depth + 1)

        if is_tensor_like(value):
            self.add(found, name, value)
            return TensorAt(name)
        if isinstance(value, (Global, Stub)):
            return _opaque(value, inner)
        if isinstance(value, (list, tuple, dict)):
            return _container(value, inner)
        return value

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
                chosen = self.choose(inner) if _is_wrapper(inner) else inner
                self.refuse_copies(root, key, chosen)
                return chosen
        extra = self.extra_in(root)
        direct = any(is_tensor_like(value) for value in root.values())
        inside = {
            key: value
            for key, value in root.items()
            if not is_tensor_like(value) and key not in extra and self.holds_tensor(value)
        }
        # Tensors directly in the root are a state dict, in which an object that cannot be built is one
        # more tensor, refused by name. A dict or list of tensors beside or instead of them could be
        # anything: an optimizer's state, an average, a second model.
        # But torchtitan puts the model's tensors at the root, beside `optimizer` and `train_state`.
        if inside and direct and all(map(_is_state_of_training, inside)):
            return {k: v for k, v in root.items() if is_tensor_like(v) or k in extra}
        if inside and not (direct and all(isinstance(v, Stub) for v in inside.values())):
            raise FormatError(
                f"{self.where}: cannot tell which tensors are the model's. {self.advice()} "
                'key="" takes all of them.'
            )
        return root

    def refuse_copies(self, root: dict[Any, Any], key: str, chosen: Any) -> None:
        """FormatError if a dict holds the model's tensors a second time: an average, a teacher.

        Lightning's layout is known: its `state_dict` is the average of `current_model_state`.
        """
        ours = _shapes(chosen)
        for other, value in root.items() if ours else ():
            if other == key or not isinstance(other, str) or _NO_COPY.search(other):
                continue
            self.visit(len(value) if isinstance(value, dict) else 1)
            if _is_copy(ours, _shapes(value)):
                raise FormatError(
                    f"{self.where}: the model's tensors are there twice, under {key!r} and under "
                    f"{other!r}. Pass key= to say which are meant: {key!r} or {other!r}."
                )

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
                inner = "" if rest == key else f" ({rest!r} was not found)"
                flat = isinstance(self.root, dict) and any(map(is_tensor_like, self.root.values()))
                advice = "The tensors are at its top: leave out key=." if flat else self.advice()
                raise ArgumentError(f"{self.where} has no key {key!r}{inner}. {advice}")
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
        return f"There are tensors under {shown}. Pass key= to choose one."


def _opaque(value: Global | Stub, inner: Callable[[Any, Any], Any]) -> Opaque:
    if isinstance(value, Global):
        return Opaque(value.name)
    args, state = inner("args", value.args), inner("state", value.state)
    return Opaque(value.name, True, args, state, inner("items", value.contents))


def _container(value: Any, inner: Callable[[Any, Any], Any]) -> Any:
    """The same container of what `inner` makes of each key and item."""
    if isinstance(value, dict):
        pairs = [(key, inner(key, item)) for key, item in value.items()]
        if not all(isinstance(key, PLAIN) for key in value):
            return Opaque("a dict with keys that polyak does not build", True, pairs)
        return OrderedDict(pairs) if isinstance(value, StateDict) else dict(pairs)
    items = [inner(at, item) for at, item in enumerate(value)]
    return type(value)(items)


_NO_COPY = re.compile("current_model_state|optim|grad|moment|exp_avg|sched")
"""Keys of what may have the names and shapes of the model without being one."""


_STATE_OF_TRAINING = re.compile(
    r"optim\w*|(lr_?)?sched\w*|(train|trainer)_?state|(data)?_?loader\w*|(grad_)?scaler\w*|(\w+_)?rng\w*"
)


def _is_state_of_training(key: Any) -> bool:
    return isinstance(key, str) and bool(_STATE_OF_TRAINING.fullmatch(key))


def _shapes(value: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that a dict holds directly, or under one of the usual keys."""
    if not isinstance(value, dict):
        return {}
    found = {
        k: v.shape for k, v in value.items() if isinstance(k, str) and isinstance(v, TensorRef)
    }
    below = (value[key] for key in MODEL_KEYS if isinstance(value.get(key), dict))
    return found or next((_shapes(inner) for inner in below), {})


def _is_copy(ours: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> bool:
    """Whether at least half of our tensors are there too, under one prefix (`module.`) or without."""
    first = next(iter(ours))
    prefixes = {name.removesuffix(first) for name in theirs if name.endswith(first)}
    return any(
        2 * sum(theirs.get(prefix + name) == shape for name, shape in ours.items()) >= len(ours)
        for prefix in sorted(prefixes)[:10]
    )


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
