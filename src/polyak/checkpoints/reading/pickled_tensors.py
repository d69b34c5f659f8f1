"""The tensors in a pickle of torch, as views of storages; and those that cannot be read, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polyak.checkpoints.reading.inert import Global, Stub, call_stub
from polyak.checkpoints.reading.stored import are_sizes
from polyak.errors import FormatError

DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16",
    "half": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex32": "C32", "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""`torch.<name>` -> the name in safetensors."""

_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
    "ComplexDouble": "C128", "Untyped": "U8",
}  # fmt: skip

_PLAIN_TENSORS = {
    "torch.Tensor",
    "torch.tensor.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
}

_SPARSE = "It is sparse. Make it dense (tensor.to_dense()) and save again."
_NESTED = "It is a nested tensor. Pad it and save again."
_UNINITIALISED = (
    "It is a lazy parameter without values. Run a batch through the model, and save again."
)
_LAYOUTS = {
    "torch._utils._rebuild_qtensor": "It is quantised: its integers mean nothing without their scales. "
    "Dequantise it (tensor.dequantize()) and save again.",
    "torch._utils._rebuild_sparse_tensor": _SPARSE,
    "torch._utils._rebuild_sparse_csr_tensor": _SPARSE,
    "torch._utils._rebuild_nested_tensor": _NESTED,
    "torch.nested._internal.nested_tensor._rebuild_njt": _NESTED,
    "torch._utils._rebuild_meta_tensor_no_storage": "It is on the meta device and has no values.",
    "torch.nn.parameter.UninitializedParameter": _UNINITIALISED,
    "torch.nn.parameter.UninitializedBuffer": _UNINITIALISED,
}
_DAMAGED = "It is a tensor described in a way that torch does not write. The file is damaged."


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage by its key in the file, or `count` values of it from `start` on."""

    key: str
    dtype: str
    count: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A view of a storage. offset, strides: in values. problem: why it cannot be read, if it cannot."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    problem: str | None = None

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for tensors that are one: the same values of the same storage, in the same order."""
        first = self.storage.start + self.offset
        return (self.storage.key, first, self.dtype, self.shape, self.strides)


class RefusedTensor(Stub):
    """What torch would build a tensor from, and polyak does not. why: a sentence or two."""

    __slots__ = ("why",)

    def __init__(self, name: str, why: str, args: tuple[Any, ...] = ()) -> None:
        super().__init__(name, args)
        self.why = why


def persistent_storage(identity: Any) -> StorageRef:
    """The storage that a persistent id of torch names: `("storage", type, key, device, count)`."""
    match identity:
        case ("storage", Global(name=kind), str(key), str(), int(count)) if count >= 0:
            return StorageRef(key, storage_dtype(kind), count)
    raise FormatError(
        "A storage is described in a way that torch does not write. The file is damaged."
    )


def storage_dtype(kind: str) -> str:
    """The dtype of a storage class, `torch.FloatStorage` or `torch.cuda.FloatStorage`."""
    name = kind.rpartition(".")[2].removesuffix("Storage")
    return _STORAGES.get(name, name)


def call_torch(function: Any, args: tuple[Any, ...]) -> Any:
    """What torch would build: tensors as `TensorRef`, sizes as tuples, all else inert."""
    name = function.name if isinstance(function, Global) else ""
    if name == "torch.Size" and len(args) == 1 and isinstance(args[0], tuple):
        return args[0]
    if name in _BUILDERS:
        return _BUILDERS[name](name, args)
    if name in _LAYOUTS or name.startswith(_REBUILD):
        return RefusedTensor(name, _LAYOUTS.get(name, _not_built(name)), args)
    return call_stub(function, args)


_REBUILD = ("torch._utils._rebuild_", "torch._tensor._rebuild_", "torch.tensor._rebuild_")


def is_tensor_like(value: Any) -> bool:
    """Whether it is a tensor, or would be one if polyak built it."""
    return isinstance(value, (TensorRef, StorageRef, RefusedTensor))


def why_refused(stub: Stub | StorageRef) -> str:
    """What is wrong with an object in the place of a tensor."""
    if isinstance(stub, StorageRef):
        return "It is a bare storage without a shape. Save tensors."
    if isinstance(stub, RefusedTensor):
        return stub.why
    return _not_built(stub.name)


def _not_built(name: str) -> str:
    return (
        f"It is an object of {name}, which polyak does not build. Save plain tensors: the "
        "state_dict() of the module that holds it."
    )


def _tensor_v2(name: str, args: tuple[Any, ...]) -> Any:
    match args:
        case (StorageRef() as storage, int(offset), tuple(shape), tuple(strides), *more) if (
            offset >= 0 and _is_view(shape, strides)
        ):
            problem = _bits(more[2] if len(more) > 2 else None)
            return TensorRef(storage, storage.dtype, offset, shape, strides, problem)
    return RefusedTensor(name, _DAMAGED, args)


def _tensor_v3(name: str, args: tuple[Any, ...]) -> Any:
    """As v2, of an untyped storage; the dtype is the seventh argument."""
    match args:
        case (StorageRef() as storage, int(offset), tuple(shape), tuple(strides), _, _, Global() as kind, *more) if (
            offset >= 0 and _is_view(shape, strides)
        ):  # fmt: skip
            dtype = _dtype(kind.name)
            problem = _bits(more[0] if more else None)
            return TensorRef(storage, dtype, offset, shape, strides, problem)
    return RefusedTensor(name, _DAMAGED, args)


def _dtype(name: str) -> str:
    return DTYPES.get(name.removeprefix("torch."), name)


def _first(name: str, args: tuple[Any, ...]) -> Any:
    """A parameter, or a tensor of another device, as the tensor that its builder gets first."""
    if args and isinstance(args[0], (TensorRef, RefusedTensor)):
        return args[0]
    return RefusedTensor(name, _not_built(name), args)


def _from_host(name: str, args: tuple[Any, ...]) -> Any:
    """A tensor of a device without storages (XLA), written as that of the host which equals it."""
    match args:
        case (TensorRef(dtype=dtype) as ref, Global(name=kind), *_) if _dtype(kind) == dtype:
            return ref
    return RefusedTensor(name, _DAMAGED, args)


def _from_type(name: str, args: tuple[Any, ...]) -> Any:
    """A tensor with attributes; one of a subclass, whose values may mean something else, is refused."""
    match args:
        case (Global() as function, Global() as kind, tuple(inner), *more):
            if kind.name in _PLAIN_TENSORS or function.name in _LAYOUTS:
                return call_torch(function, inner)
            if kind.name.startswith("torch.distributed.") and kind.name.endswith(".DTensor"):
                return _distributed(kind.name, inner, more[0] if more else None)
            return RefusedTensor(kind.name, _subclass(kind.name), inner)
    return RefusedTensor(name, _DAMAGED, args)


def _subclass(name: str) -> str:
    return (
        f"It is an object of {name}, a subclass of Tensor that polyak does not build. Save plain "
        "tensors: dequantize() or what else the class has to give them."
    )


def _distributed(name: str, inner: tuple[Any, ...], state: Any) -> Any:
    """The local tensor of a DTensor that holds all of it (on one process, or replicated)."""
    slots = state[-1] if isinstance(state, tuple) and state else state
    found = slots if isinstance(slots, dict) else {}
    local, spec = found.get("_local_tensor"), found.get("_spec")
    attributes = spec.state if isinstance(spec, Stub) else None
    placed = attributes.get("placements") if isinstance(attributes, dict) else None
    whole = inner[2] if len(inner) > 2 else None
    if isinstance(local, TensorRef) and isinstance(placed, tuple):
        kinds = [place.name if isinstance(place, Stub) else "" for place in placed]
        if local.shape == whole and not any("Partial" in kind or not kind for kind in kinds):
            return local
    held = f"{list(local.shape)} of " if isinstance(local, TensorRef) else ""
    why = (
        f"It is a DTensor, of which this file has the part of one process ({held}{_listed(whole)}). Save "
        "tensor.full_tensor(), or the folder that torch.distributed.checkpoint writes."
    )
    return RefusedTensor(name, why, inner)


def _listed(shape: Any) -> str:
    return str(list(shape)) if are_sizes(shape, tuple) else "an unknown shape"


_BUILDERS = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_host,
    "torch.nn.parameter.Parameter": _first,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.tensor._rebuild_from_type": _from_type,
}


def _is_view(shape: tuple[Any, ...], strides: tuple[Any, ...]) -> bool:
    return len(shape) == len(strides) and are_sizes(shape, tuple) and are_sizes(strides, tuple)


def _bits(metadata: Any) -> str | None:
    """Lazily conjugated or negated tensors hold other values than their storage."""
    if isinstance(metadata, dict) and any(metadata.get(bit) for bit in ("conj", "neg")):
        return (
            "It is lazily conjugated or negated. Call resolve_conj().resolve_neg() and save again."
        )
    return None
