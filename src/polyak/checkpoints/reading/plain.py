"""What of a pickle means the same without any code: numbers, text, and containers of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from polyak.checkpoints.reading.inert import PLAIN, Global, SetItems, Stub
from polyak.checkpoints.reading.pickled_tensors import TensorRef
from polyak.checkpoints.reading.stored import StoredTensor
from polyak.errors import FormatError

NOTHING = object()
"""In place of a value that has no plain copy."""

_MAX_VALUES = 1_000_000
_MAX_DEPTH = 50
_MAX_TENSOR_BYTES = 64 * 1024**2


@dataclass(frozen=True, eq=False)
class PlainTensor:
    """A small tensor among plain values, in memory. data: row-major bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class PlainCopy:
    """Copies values out of a pickle, and leaves out what only the code of some class could build.

    A pickle may refer to one list from many places, so that a few bytes stand for any number of
    values: what is copied is bounded in number, depth and bytes.

    tensor: the stored tensor that a reference means; without it tensors are left out. dropped: name of
    what was left out -> what it is.
    """

    def __init__(self, tensor: Callable[[str, TensorRef], StoredTensor] | None = None) -> None:
        self.dropped: dict[str, str] = {}
        self._tensor = tensor
        self._values, self._bytes = _MAX_VALUES, _MAX_TENSOR_BYTES

    def of(self, value: Any, name: str, depth: int = 0) -> Any:
        """The copy, or `NOTHING`; `name` with dots says where it was."""
        self._values -= 1
        if isinstance(value, PLAIN):
            return value
        if self._values < 0 or depth > _MAX_DEPTH:
            return self._drop(name, "more values than a configuration has")
        if isinstance(value, dict):
            return self._mapping(value, name, depth)
        if isinstance(value, (list, tuple)):
            items = [self.of(item, f"{name}.{i}", depth + 1) for i, item in enumerate(value)]
            kind = next(kind for kind in (SetItems, list, tuple) if isinstance(value, kind))
            return NOTHING if any(item is NOTHING for item in items) else kind(items)
        if isinstance(value, TensorRef):
            return self._loaded(name, value)
        return self._drop(name, _described(value))

    def _mapping(self, value: dict[Any, Any], name: str, depth: int) -> dict[Any, Any]:
        """A dict without the items that cannot be copied."""
        copied = {}
        for key, item in value.items():
            inner = f"{name}.{(key if isinstance(key, str) else repr(key))[:50]}"
            if self.of(key, inner, depth + 1) is not NOTHING:
                copied[key] = self.of(item, inner, depth + 1)
        return {key: item for key, item in copied.items() if item is not NOTHING}

    def _loaded(self, name: str, ref: TensorRef) -> Any:
        try:
            stored = self._tensor(name, ref) if self._tensor is not None else None
        except FormatError:
            stored = None
        self._bytes -= stored.nbytes if stored else 0
        if stored is None or self._bytes < 0:
            return self._drop(name, "a tensor")
        data = bytearray(stored.nbytes)
        stored.read_into(0, memoryview(data))
        return PlainTensor(stored.dtype, stored.shape, bytes(data))

    def _drop(self, name: str, what: str) -> Any:
        self.dropped[name] = what
        return NOTHING


def _described(value: Any) -> str:
    if isinstance(value, (Stub, Global)):
        return value.name[:200]
    return f"a {type(value).__name__}"
