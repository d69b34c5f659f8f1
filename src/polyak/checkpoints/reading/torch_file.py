"""What all files of `torch.save` share: a root object, and storages that its tensors are views of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import islice
from typing import Any

from polyak.checkpoints.reading.extra_state import tensors_in
from polyak.checkpoints.reading.find_tensors import find_tensors
from polyak.checkpoints.reading.gather import Strided, StridedTensor, SwappedTensor, is_row_major
from polyak.checkpoints.reading.inert import PLAIN
from polyak.checkpoints.reading.pickled_tensors import StorageRef, TensorRef
from polyak.checkpoints.reading.stored import (
    DTYPE_BITS,
    ByteFile,
    Checkpoint,
    Span,
    SpanTensor,
    StoredTensor,
    itemsize,
)
from polyak.errors import FormatError


class TorchFile(ABC):
    """A file of torch: its root object, and tensors of it as stored tensors.

    format: as a `Checkpoint` calls it. swapped: whether the values are big-endian.
    """

    format = "torch"
    root: Any
    swapped = False

    def __init__(self, file: ByteFile) -> None:
        self.file = file

    @abstractmethod
    def storage(self, ref: StorageRef) -> Span:
        """Where the bytes of a storage are; FormatError if they are not there, or of another length."""

    def tensor(self, name: str, ref: TensorRef) -> StoredTensor:
        """The stored tensor that a view describes; FormatError if it is damaged or cannot be read."""
        if ref.problem:
            raise FormatError(ref.problem)
        if DTYPE_BITS.get(ref.dtype, 1) % 8:
            raise FormatError(f"It has the dtype {ref.dtype}, which polyak does not know.")
        if ref.storage.dtype not in DTYPE_BITS:
            raise FormatError(
                f"It is in a storage of {ref.storage.dtype}, which polyak does not know."
            )
        stored = _view(name, ref, self.storage(ref.storage))
        return SwappedTensor(stored) if self.swapped and itemsize(ref.dtype) > 1 else stored


def read_torch(source: TorchFile, key: str | None = None) -> Checkpoint:
    """The checkpoint in a torch file. key: where its tensors are, with dots; None looks in the usual places."""
    file = source.file
    found = find_tensors(source.root, key, file.path)
    tensors, refused = {}, found.refused
    names: dict[tuple[Any, ...], list[str]] = {}
    within = tensors_in(found.extra)  # no weight is stored under the name of a part of extra state
    for name, ref in found.tensors.items():
        try:
            tensors[name] = source.tensor(name, ref)
        except FormatError as error:
            refused[name] = str(error)
            continue
        if math.prod(ref.shape) and name not in within:
            names.setdefault(ref.place, []).append(name)
    ties = _ties(list(names.values()))
    return Checkpoint(
        path=file.path,
        format=source.format,
        tensors={name: tensor for name, tensor in tensors.items() if name not in ties},
        files=(file,),
        ties=ties,
        metadata=scalars(source.root) | attached_metadata(found.attributes),
        refused=refused,
        extra=found.extra,
        order=found.order,
        versions=module_versions(found.attributes),
    )


def _ties(groups: list[list[str]]) -> dict[str, str]:
    """Alias -> stored name: the first in alphabetical order, as in safetensors."""
    return {alias: min(group) for group in groups for alias in sorted(group)[1:]}


def scalars(root: Any) -> dict[str, str]:
    """The numbers and short texts beside the weights: epoch, global_step, versions."""
    if not isinstance(root, dict):
        return {}
    return _counters(root) | {
        str(key): str(value)
        for key, value in islice(root.items(), 1000)
        if isinstance(key, str) and isinstance(value, (str, int, float)) and len(str(value)) <= 200
    }


def _counters(root: dict[Any, Any]) -> dict[str, str]:
    """The training step where frameworks keep it further in: fairseq, mmengine, the Trainer's state."""
    history = root.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    inner = [root.get("meta"), root.get("trainer_state"), last, root.get("extra_state")]
    return {
        "iteration" if key == "iter" else key: str(one[key])
        for one in inner
        if isinstance(one, dict)
        for key in ("global_step", "num_updates", "iter")
        if type(one.get(key)) is int
    }


def module_versions(attributes: dict[Any, Any]) -> dict[str, dict[Any, Any]]:
    """What `Module.state_dict` says of each module, as the attribute `_metadata` of a state dict."""
    versions = attributes.get("_metadata")
    pairs = versions.items() if isinstance(versions, dict) else ()
    return {
        name: version
        for name, version in pairs
        if isinstance(name, str) and name != "polyak" and _is_plain(version)
    }


def _is_plain(version: Any) -> bool:
    return isinstance(version, dict) and all(isinstance(value, PLAIN) for value in version.values())


def attached_metadata(attributes: dict[Any, Any]) -> dict[str, str]:
    """The metadata that polyak writes into its own archives, as `_metadata["polyak"]` of a state dict."""
    versions = attributes.get("_metadata")
    found = versions.get("polyak") if isinstance(versions, dict) else None
    pairs = found.items() if isinstance(found, dict) else ()
    return {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, str)}


def _view(name: str, ref: TensorRef, span: Span) -> StoredTensor:
    """A span if the values are in row-major order, else a strided view."""
    size, count = itemsize(ref.dtype), math.prod(ref.shape)
    if not count:
        return SpanTensor(name, ref.dtype, ref.shape, span.file, span.offset)
    dense = is_row_major(ref.shape, ref.strides)
    pairs = zip(ref.shape, ref.strides, strict=True)
    extent = count if dense else 1 + sum((length - 1) * stride for length, stride in pairs)
    start = ref.offset * size
    if start + extent * size > span.length:
        raise FormatError("It reaches beyond the end of its storage. The file is damaged.")
    if dense:
        return SpanTensor(name, ref.dtype, ref.shape, span.file, span.offset + start)
    _check_apart(ref)
    source = Strided(span.file, span.offset + start, ref.strides, size)
    return StridedTensor(name, ref.dtype, ref.shape, source)


def _check_apart(ref: TensorRef) -> None:
    """Every index must have its own value: expanded tensors store fewer values than they show."""
    extent = 1
    pairs = zip(ref.strides, ref.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in pairs if size != 1):
        if stride < extent:
            raise FormatError(
                "It is expanded or overlaps itself: several of its values share memory. "
                "Call .contiguous() and save again."
            )
        extent += (size - 1) * stride
