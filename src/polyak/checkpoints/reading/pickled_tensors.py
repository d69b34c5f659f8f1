"""The objects of torch in a pickle: storages by key, and tensors as views of them.

The tensors of a model inside nested containers, by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from polyak.checkpoints.reading.pickle_reader import Global, Stub, call_stub
from polyak.checkpoints.reading.stored import MAX_DIMENSIONS, MAX_SIZE, MAX_TENSORS
from polyak.errors import ArgumentError, FormatError

DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16",
    "half": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex32": "C32", "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""`torch.<name>` to the spelling of safetensors."""

_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
    "ComplexDouble": "C128", "Untyped": "U8",
}  # fmt: skip

_PLAIN_TENSORS = {
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
}

_LAYOUTS = {
    "torch._utils._rebuild_qtensor": "is quantised: its integers mean nothing without their scales. "
    "Dequantise it (tensor.dequantize()) and save again",
    "torch._utils._rebuild_sparse_tensor": "is sparse. Make it dense (tensor.to_dense()) and save again",
    "torch._utils._rebuild_sparse_csr_tensor": "is sparse. Make it dense (tensor.to_dense()) and save "
    "again",
    "torch._utils._rebuild_nested_tensor": "is a nested tensor. Pad it and save again",
    "torch._utils._rebuild_meta_tensor_no_storage": "is on the meta device: it has no values",
}


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage by its key in the archive. dtype: of its values; count: how many."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A view of a storage. offset and strides: in values. problem: why it cannot be read as it is."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    problem: str | None = None


def persistent_storage(identity: Any) -> StorageRef:
    """The storage that a persistent id of torch names: `("storage", type, key, device, count)`."""
    match identity:
        case ("storage", Global(name=kind), str(key), str(), int(count)) if count >= 0:
            name = kind.rpartition(".")[2].removesuffix("Storage")
            return StorageRef(key, _STORAGES.get(name, name), count)
    raise FormatError("A storage is described in a way that torch does not write.")


def call_torch(function: Any, args: tuple[Any, ...]) -> Any:
    """What torch would build: tensors as `TensorRef`, sizes as tuples, all else inert."""
    name = function.name if isinstance(function, Global) else ""
    if name == "torch.Size" and len(args) == 1 and isinstance(args[0], tuple):
        return args[0]
    if name in _BUILDERS:
        return _BUILDERS[name](name, args)
    return call_stub(function, args)


def is_tensor_like(value: Any) -> bool:
    """Whether it is a tensor, or would be one if it could be built here."""
    return isinstance(value, TensorRef | StorageRef) or (
        isinstance(value, Stub) and value.name in _LAYOUTS
    )


def why_refused(stub: Stub | StorageRef) -> str:
    """What is wrong with an object that stands where a tensor was expected."""
    if isinstance(stub, StorageRef):
        return "is a bare storage without a shape. Save tensors"
    if stub.name in _LAYOUTS:
        return _LAYOUTS[stub.name]
    if stub.name in _BUILDERS:
        return "is a tensor whose description is not one that torch writes; the file is damaged"
    return (
        f"is an object of {stub.name}, which polyak does not build. Save plain tensors: a state_dict() "
        "of the module that holds it"
    )


def _tensor_v2(name: str, args: tuple[Any, ...]) -> Any:
    match args:
        case (StorageRef() as storage, int(offset), tuple(shape), tuple(strides), *more) if (
            offset >= 0 and _are_sizes(shape, strides)
        ):
            problem = _bits(more[2] if len(more) > 2 else None)
            return TensorRef(storage, storage.dtype, offset, shape, strides, problem)
    return Stub(name, args)


def _tensor_v3(name: str, args: tuple[Any, ...]) -> Any:
    """As v2, of an untyped storage; the dtype is the seventh argument."""
    match args:
        case (StorageRef() as storage, int(offset), tuple(shape), tuple(strides), _, _, Global() as kind, *more) if (
            offset >= 0 and _are_sizes(shape, strides)
        ):  # fmt: skip
            dtype = DTYPES.get(kind.name.removeprefix("torch."), kind.name)
            problem = _bits(more[0] if more else None)
            return TensorRef(storage, dtype, offset, shape, strides, problem)
    return Stub(name, args)


def _parameter(name: str, args: tuple[Any, ...]) -> Any:
    return args[0] if args and isinstance(args[0], TensorRef) else Stub(name, args)


def _from_type(name: str, args: tuple[Any, ...]) -> Any:
    """A tensor with attributes, or of a subclass; a subclass may mean its values otherwise."""
    match args:
        case (Global() as function, Global() as kind, tuple(inner), *_):
            if kind.name in _PLAIN_TENSORS:
                return call_torch(function, inner)
            return Stub(kind.name, inner)
    return Stub(name, args)


_BUILDERS = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}


def _are_sizes(shape: tuple[Any, ...], strides: tuple[Any, ...]) -> bool:
    return len(shape) == len(strides) <= MAX_DIMENSIONS and all(
        type(size) is int and 0 <= size < MAX_SIZE for size in (*shape, *strides)
    )


def _bits(metadata: Any) -> str | None:
    """Lazily conjugated or negated tensors hold other values than their storage."""
    if isinstance(metadata, dict) and any(metadata.get(bit) for bit in ("conj", "neg")):
        return "is lazily conjugated or negated. Call resolve_conj().resolve_neg() and save again"
    return None


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
