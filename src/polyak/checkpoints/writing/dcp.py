"""Folders of `torch.distributed.checkpoint` (DCP): the inverse of `reading/dcp.py`.

Every tensor is cut into slabs of rows, as FSDP2 shards it over as many ranks as there are files, each slab a
small torch archive; any number of ranks on any mesh loads it. `.metadata` says where the slabs are. What is
copied from another DCP folder (extra state, an optimizer) keeps the boxes and bytes that it has there.
Source: torch/distributed/checkpoint/{metadata,filesystem,default_planner}.py of torch 2.13.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from polyak.checkpoints.reading.stored import TORCH_DTYPES, itemsize
from polyak.checkpoints.writing.layouts import ALIGNMENT, OutputFile, TensorSpec, tensor_archive
from polyak.errors import FormatError

_VERSION = "1.0.0"
_LEAST_BYTES = 64 * 1024  # smaller slabs are not worth an archive of their own

Path = tuple[str | int, ...]
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The first index and the size along every dimension."""


@dataclass(frozen=True)
class CopiedEntry:
    """What is copied from another DCP folder, bytes and all.

    path: in the nested state dict. tensor: its dtype (`torch.float32`) and shape, or None for an object.
    items: the box (None of an object) of each chunk, and how many bytes it has as stored.
    """

    path: Path
    tensor: tuple[str, tuple[int, ...]] | None
    items: Sequence[tuple[Box | None, int]]


@dataclass
class DcpFile:
    """One `.distcp` file: archives end to end. It is a `Layout`; its places are in `DcpFolder.places`."""

    size: int = 0
    offsets: list[int] = field(default_factory=list)
    _around: list[tuple[int, bytes]] = field(default_factory=list)

    def add(self, head: bytes, nbytes: int, tail: bytes) -> tuple[int, int]:
        """Append an item; where it begins, and where its values do."""
        begin = -(-self.size // ALIGNMENT) * ALIGNMENT
        values = begin + len(head)
        self._around += [(begin, head), (values + nbytes, tail)]
        self.size = values + nbytes + len(tail)
        return begin, values

    def begin(self, file: OutputFile) -> None:
        """Write what is around the values."""
        for offset, data in self._around:
            file.write(offset, data)

    def finish(self, file: OutputFile, metadata: Mapping[str, str]) -> None:
        """Nothing: all is known from the beginning."""


class DcpFolder:
    """Where everything is in a folder of `count` files.

    files: name -> `DcpFile`. places: (file, offset, bytes) of the pieces of each tensor and then of each
    copied item, in their order.
    """

    def __init__(
        self,
        tensors: Sequence[TensorSpec],
        paths: Mapping[str, Path],
        count: int,
        copied: Sequence[CopiedEntry] = (),
    ) -> None:
        self.files = {f"__{index}_0.distcp": DcpFile() for index in range(count)}
        self.places: list[list[tuple[str, int, int]]] = []
        self._paths: dict[str, Path] = {}
        self._tensors: dict[str, tuple[torch.dtype, tuple[int, ...]] | None] = {}
        self._items: dict[str, list[tuple[Box | None, str, int, int]]] = {}
        for tensor in tensors:
            self._add(tensor, paths[tensor.name])
        for entry in copied:
            self._copy(entry)

    def metadata(self, ties: Mapping[Path, Path]) -> bytes:
        """The pickle `.metadata`. ties: the path of an alias -> that of the tensor that it shares."""
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )

        entries: dict[str, BytesStorageMetadata | TensorStorageMetadata] = {}
        paths: dict[str, Path] = {}
        places = {}
        shared = {self._name(alias): _joined(path) for alias, path in ties.items()}
        for name in (*self._items, *shared):
            stored = shared.get(name, name)
            paths[name] = self._paths[name]
            boxes = [box for box, *_ in self._items[stored] if box is not None]
            entries[name] = BytesStorageMetadata()
            if (tensor := self._tensors[stored]) is not None:
                chunks = [ChunkStorageMetadata(torch.Size(a), torch.Size(b)) for a, b in boxes]
                properties = TensorProperties(dtype=tensor[0])
                entries[name] = TensorStorageMetadata(properties, torch.Size(tensor[1]), chunks)
            for index, (box, file, offset, length) in enumerate(self._items[stored]):
                at = MetadataIndex(name, box[0], index) if box else MetadataIndex(name)
                places[at] = _info(file, offset, length)
        described = Metadata(entries, paths, places, StorageMeta(), _VERSION)
        return pickle.dumps(described, protocol=4)

    def _add(self, tensor: TensorSpec, path: Path) -> None:
        if tensor.dtype not in TORCH_DTYPES:
            raise FormatError(f"torch has no dtype {tensor.dtype} ({tensor.name}).")
        name, pieces = self._name(path), []
        self._tensors[name] = (TORCH_DTYPES[tensor.dtype], tensor.shape)
        slabs = _slabs(tensor, len(self.files))
        names = [*self.files] if len(slabs) > 1 else [self._smallest()]
        for box, where in zip(slabs, names, strict=False):  # the first rows in the first file
            head, tail = tensor_archive(tensor.dtype, box[1])
            nbytes = math.prod(box[1]) * itemsize(tensor.dtype)
            pieces.append(self._append(name, box, where, (head, nbytes, tail)))
        self.places.append(pieces)

    def _copy(self, entry: CopiedEntry) -> None:
        name = self._name(entry.path)
        self._tensors[name] = None
        if entry.tensor is not None:
            kind, shape = entry.tensor
            self._tensors[name] = (getattr(torch, kind.removeprefix("torch.")), shape)
        self._items[name] = []
        for box, nbytes in entry.items:
            self.places.append([self._append(name, box, self._smallest(), (b"", nbytes, b""))])

    def _append(
        self, name: str, box: Box | None, where: str, item: tuple[bytes, int, bytes]
    ) -> tuple[str, int, int]:
        file = self.files[where]
        begin, values = file.add(*item)
        self._items.setdefault(name, []).append((box, where, begin, file.size - begin))
        return where, values, item[1]

    def _smallest(self) -> str:
        """The file with the fewest bytes so far."""
        return min(self.files, key=lambda one: self.files[one].size)

    def _name(self, path: Path) -> str:
        """The name in the flat state dict; FormatError where two entries would have one."""
        name = sys.intern(_joined(path))  # equal contents give equal pickles
        if name in self._paths:
            raise FormatError(f"Two entries of the DCP folder would be named {name!r}.")
        self._paths[name] = tuple(sys.intern(p) if isinstance(p, str) else p for p in path)
        return name


def _joined(path: Path) -> str:
    return ".".join(map(str, path))


def _info(file: str, offset: int, length: int) -> object:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(sys.intern(file), offset, length)


def _slabs(tensor: TensorSpec, count: int) -> list[Box]:
    """The rows of a tensor in at most `count` runs, as `torch.chunk` cuts them."""
    none = (0,) * len(tensor.shape)
    count = min(count, max(1, tensor.nbytes // _LEAST_BYTES))
    if not tensor.shape or not tensor.nbytes or count == 1:
        return [(none, tensor.shape)]
    rows, *rest = tensor.shape
    step = -(-rows // count)
    return [((at, *none[1:]), (min(step, rows - at), *rest)) for at in range(0, rows, step)]
