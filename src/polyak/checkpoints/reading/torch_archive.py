"""Torch archives (`torch.save`): a zip with a pickle of names and shapes, and storages beside it."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

from polyak.checkpoints.reading.gather import Strided, StridedTensor, SwappedTensor, is_row_major
from polyak.checkpoints.reading.pickle_reader import MAX_PICKLE_BYTES, StateDict, read_pickle
from polyak.checkpoints.reading.pickled_tensors import (
    TensorRef,
    call_torch,
    find_tensors,
    persistent_storage,
)
from polyak.checkpoints.reading.stored import (
    DTYPE_BITS,
    ByteFile,
    Checkpoint,
    Span,
    SpanTensor,
    StoredTensor,
    bytes_of,
)
from polyak.checkpoints.reading.zips import ZipArchive, span_of
from polyak.errors import FormatError


class TorchArchive:
    """A torch archive: its root object, and tensors of it as stored tensors."""

    def __init__(self, file: ByteFile, archive: ZipArchive | None = None) -> None:
        self.file = file
        self.zip = archive or ZipArchive(file)
        self.prefix = self._find_prefix()
        where = f"{file.path}, {self.prefix}data.pkl"
        data = self.zip.read(f"{self.prefix}data.pkl", MAX_PICKLE_BYTES)
        self.root = read_pickle(data, where, call_torch, persistent_storage)
        self.swapped = self._is_big_endian()
        self._spans: dict[str, Span] = {}

    def tensor(self, name: str, ref: TensorRef) -> StoredTensor:
        """The stored tensor that a view describes; FormatError where it lies or cannot be read."""
        if ref.problem:
            raise FormatError(ref.problem)
        if DTYPE_BITS.get(ref.dtype, 1) % 8:
            raise FormatError(f"has the dtype {ref.dtype}, which polyak does not know")
        itemsize = DTYPE_BITS[ref.dtype] // 8
        span = self._storage(ref)
        stored = _view(name, ref, span, itemsize)
        return SwappedTensor(stored) if self.swapped and itemsize > 1 else stored

    def _storage(self, ref: TensorRef) -> Span:
        storage = ref.storage
        if storage.key not in self._spans:
            self._spans[storage.key] = self.zip.span(f"{self.prefix}data/{storage.key}")
        span = self._spans[storage.key]
        if storage.dtype not in DTYPE_BITS:
            raise FormatError(f"lies in a storage of {storage.dtype}, which polyak does not know")
        if bytes_of(storage.dtype, (storage.count,)) != span.length:
            raise FormatError(
                f"lies in a storage of {storage.count} {storage.dtype}, but {span.length} bytes are "
                "stored. The file is damaged"
            )
        return span

    def _find_prefix(self) -> str:
        found = [
            name for name in self.zip.entries if name.endswith("data.pkl") and name.count("/") <= 1
        ]
        if len(found) != 1:
            raise FormatError(
                f"{self.file.path} is a zip archive, but not one of torch.save: "
                f"it has {len(found)} entries data.pkl, and one was expected."
            )
        return found[0].removesuffix("data.pkl")

    def _is_big_endian(self) -> bool:
        name = f"{self.prefix}byteorder"
        order = self.zip.read(name, 16) if name in self.zip.entries else b"little"
        if order not in (b"little", b"big"):
            raise FormatError(
                f"{self.file.path}: the byte order {order!r} is neither little nor big."
            )
        return order == b"big"


def read_torch(
    file: ByteFile, key: str | None = None, entries: ZipArchive | None = None
) -> Checkpoint:
    """Open a torch archive. key: where its tensors are, with dots; None looks in the usual places."""
    archive = TorchArchive(file, entries)
    found = find_tensors(archive.root, key, file.path)
    tensors, refused = {}, found.refused
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, ref in found.tensors.items():
        try:
            tensors[name] = archive.tensor(name, ref)
        except FormatError as error:
            refused[name] = str(error)
            continue
        if math.prod(ref.shape):
            names.setdefault((ref.storage.key, ref.offset, ref.shape, ref.strides), []).append(name)
    ties = _ties(list(names.values()))
    return Checkpoint(
        path=file.path,
        format="torch",
        tensors={name: tensor for name, tensor in tensors.items() if name not in ties},
        files=(file,),
        ties=ties,
        metadata=scalars(archive.root) | attached_metadata(archive.root),
        refused=refused,
    )


def _ties(groups: list[list[str]]) -> dict[str, str]:
    """Alias -> canonical name: the first in alphabetical order, as safetensors chooses it too."""
    return {alias: min(group) for group in groups for alias in sorted(group)[1:]}


def scalars(root: Any) -> dict[str, str]:
    """The numbers and short texts beside the weights: epoch, global_step, versions."""
    if not isinstance(root, dict):
        return {}
    return {
        str(key): str(value)
        for key, value in islice(root.items(), 1000)
        if isinstance(key, str) and isinstance(value, str | int | float) and len(str(value)) <= 200
    }


def attached_metadata(root: Any) -> dict[str, str]:
    """What polyak wrote into `_metadata["polyak"]` of a state dict about the file."""
    attributes = root.state if isinstance(root, StateDict) else None
    versions = attributes.get("_metadata") if isinstance(attributes, dict) else None
    found = versions.get("polyak") if isinstance(versions, dict) else None
    pairs = found.items() if isinstance(found, dict) else ()
    return {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, str)}


def _view(name: str, ref: TensorRef, span: Span, itemsize: int) -> StoredTensor:
    """A span where the values lie in row-major order, else a strided view."""
    count = math.prod(ref.shape)
    last = ref.offset + sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True))
    if count and (last + 1) * itemsize > span.length:
        raise FormatError("reaches beyond the end of its storage. The file is damaged")
    if not count or is_row_major(ref.shape, ref.strides):
        size = count * itemsize
        start = span.offset + (ref.offset * itemsize if count else 0)
        return SpanTensor(name, ref.dtype, ref.shape, (span_of(span.file, start, size),))
    _check_apart(ref)
    source = Strided(span.file, span.offset + ref.offset * itemsize, ref.strides, itemsize)
    return StridedTensor(name, ref.dtype, ref.shape, source)


def _check_apart(ref: TensorRef) -> None:
    """Every index must have a value of its own: expanded tensors hold fewer values than they show."""
    extent = 1
    pairs = zip(ref.strides, ref.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in pairs if size != 1):
        if stride < extent:
            raise FormatError(
                "is expanded or overlaps itself: several of its values are one in memory. "
                "Call .contiguous() and save again"
            )
        extent += (size - 1) * stride
