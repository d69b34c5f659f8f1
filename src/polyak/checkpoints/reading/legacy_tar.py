"""Torch files of the first versions (0.1): a tar of storages, tensors, and a pickle that refers to them.

`storages` holds, one after the other, a pickle (key, location, class) and the values of each storage, then
which storages are parts of others. `tensors` holds a pickle (key, storage, class) and the numbers of a
view for each tensor. `pickle` is the object, in which both are persistent ids.
Source: `legacy_load` within `_legacy_load` in torch/serialization.py (2.13).
"""

from __future__ import annotations

import re
import struct
from typing import Any

from polyak.checkpoints.reading.inert import Global
from polyak.checkpoints.reading.legacy_torch import storage_bytes
from polyak.checkpoints.reading.pickle_machine import MAX_PICKLE_BYTES
from polyak.checkpoints.reading.pickle_reader import read_pickle, read_pickle_at
from polyak.checkpoints.reading.pickled_tensors import (
    StorageRef,
    TensorRef,
    call_torch,
    storage_dtype,
)
from polyak.checkpoints.reading.stored import MAX_TENSORS, ByteFile, Span, are_sizes, itemsize
from polyak.checkpoints.reading.torch_file import TorchFile
from polyak.checkpoints.reading.zips import PartFile
from polyak.errors import FormatError

MEMBERS = {"pickle", "storages", "tensors"}
"""What such an archive holds."""

_NOWHERE = "nowhere"


class LegacyTar(TorchFile):
    """The object in a torch file of 0.1, and tensors of it as stored tensors."""

    format = "torch before 1.6"

    def __init__(self, file: ByteFile, members: dict[str, Span]) -> None:
        super().__init__(file)
        self._spans = {_NOWHERE: Span(file, 0, 0)}
        self._objects: dict[int, StorageRef | TensorRef] = {}
        parts = {name: PartFile(file, *members[name][1:]) for name in MEMBERS}
        self._read_storages(parts["storages"])
        self._read_tensors(parts["tensors"])
        pickled = parts["pickle"]
        data = pickled.read(0, min(pickled.size, MAX_PICKLE_BYTES + 1))
        self.root = read_pickle(data, f"{file.path}, pickle", call_torch, self._persistent)

    def storage(self, ref: StorageRef) -> Span:
        """Where the values of a storage are, or those of its part."""
        span, size = self._spans[ref.key], itemsize(ref.dtype)
        return Span(span.file, span.offset + ref.start * size, ref.count * size)

    def _read_storages(self, part: PartFile) -> None:
        number, position = self._number(part)
        for _ in range(number):
            described, position = read_pickle_at(part, position, window=512)
            match described:
                case (int(key), str(), Global(name=kind)) if key not in self._objects:
                    dtype = storage_dtype(kind)
                case _:
                    raise self._error("a storage is described in a way that torch does not write")
            count = int.from_bytes(part.read(position, 8), "little", signed=True)
            length = storage_bytes(dtype, count, part)
            self._objects[key] = StorageRef(str(key), dtype, count)
            self._spans[str(key)] = Span(self.file, part.offset + position + 8, length)
            position += 8 + length
        views, _ = read_pickle_at(part, position, window=1 << 12)
        for view in views if isinstance(views, list) else [None]:
            self._add_part(view)

    def _add_part(self, view: Any) -> None:
        """A storage that is a part of one that came before."""
        match view:
            case (int(key), int(root), int(start), int(count)):
                whole = self._objects.get(root)
                if isinstance(whole, StorageRef) and 0 <= start <= start + count <= whole.count:
                    part = StorageRef(whole.key, whole.dtype, count, whole.start + start)
                    self._objects[key] = part
                    return
        raise self._error("a part of a storage is not in it")

    def _read_tensors(self, part: PartFile) -> None:
        number, position = self._number(part)
        for _ in range(number):
            described, position = read_pickle_at(part, position, window=512)
            (dimensions,) = struct.unpack("<i", part.read(position, 4))
            if not 0 <= dimensions <= 64:
                raise self._error(f"a tensor of {dimensions} dimensions")
            numbers = struct.unpack(
                f"<{2 * dimensions + 1}q", part.read(position + 8, 16 * dimensions + 8)
            )
            position += 16 + 16 * dimensions
            self._add_tensor(described, numbers[:dimensions], numbers[dimensions:])

    def _add_tensor(
        self, described: Any, shape: tuple[int, ...], strides_and_offset: tuple[int, ...]
    ) -> None:
        *strides, offset = strides_and_offset
        match described:
            case (int(key), None, Global(name=kind)) if key not in self._objects:
                dtype = storage_dtype(kind.removesuffix("Tensor") + "Storage")
                storage: Any = StorageRef(_NOWHERE, dtype, 0)
            case (int(key), int(root), Global()) if key not in self._objects:
                storage = self._objects.get(root)
            case _:
                raise self._error("a tensor is described in a way that torch does not write")
        sizes = (*shape, *strides, offset)
        if not isinstance(storage, StorageRef) or not all(are_sizes((n,), tuple) for n in sizes):
            raise self._error("a tensor that is no view of a storage")
        self._objects[key] = TensorRef(storage, storage.dtype, offset, shape, tuple(strides))

    def _number(self, part: PartFile) -> tuple[int, int]:
        number, position = read_pickle_at(part, 0, window=64)
        if not isinstance(number, int) or not 0 <= number <= MAX_TENSORS:
            raise self._error("it does not say how many storages and tensors there are")
        return number, position

    def _persistent(self, identity: Any) -> Any:
        """A tensor or a storage by its number, or (in a whole module) a class with its source."""
        if isinstance(identity, tuple) and identity and isinstance(identity[0], Global):
            return identity[0]
        text = str(identity) if isinstance(identity, (str, int)) else ""
        found = self._objects.get(int(text)) if re.fullmatch(r"[0-9]{1,20}", text) else None
        if found is None:
            raise self._error("it refers to a tensor that is not there")
        return found

    def _error(self, problem: str) -> FormatError:
        return FormatError(
            f"{self.file.path}: {problem}. It looks like a file of torch 0.1 (a tar), but is damaged."
        )
