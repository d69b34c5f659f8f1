"""The objects of torch in a pickle: storages by key, and tensors as views of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polyak.checkpoints.reading.inert import Global, Stub, call_stub
from polyak.checkpoints.reading.layout import MAX_DIMENSIONS, MAX_SIZE
from polyak.errors import FormatError

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
