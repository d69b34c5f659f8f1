"""Torch files from before 1.6: pickles and raw storages, one after the other.

In order: a magic number, a version, the writer's machine (little-endian everywhere, whatever it says),
the object with its tensors as views of storages, the keys of the storages, and for each key the number
of its values and the values. A storage may itself be a part of another.
Source: `_legacy_save` and `_legacy_load` in torch/serialization.py (2.13); the writers of 0.2 to 1.5.
"""

from __future__ import annotations

from typing import Any

from polyak.checkpoints.reading.inert import Global
from polyak.checkpoints.reading.pickle_reader import read_pickle_at
from polyak.checkpoints.reading.pickled_tensors import StorageRef, call_torch, storage_dtype
from polyak.checkpoints.reading.stored import (
    DTYPE_BITS,
    MAX_SIZE,
    MAX_TENSORS,
    ByteFile,
    Span,
    itemsize,
)
from polyak.checkpoints.reading.torch_file import TorchFile
from polyak.errors import FormatError

_MAGIC = 0x1950A86A20F9469CFC6C
_MARKS = (b"l\xfc\x9cF\xf9 j\xa8P\x19.", b"L%d" % _MAGIC)
_VERSION = 1001

_QUANTISED = {"QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1}
"""Bytes of values that are passed over."""


def is_legacy(start: bytes) -> bool:
    """Whether a file that begins so is one of these: the magic number is in its first pickle."""
    return any(mark in start[:40] for mark in _MARKS)


class LegacyTorch(TorchFile):
    """The object in a torch file from before 1.6, and tensors of it as stored tensors."""

    format = "torch before 1.6"

    def __init__(self, file: ByteFile) -> None:
        super().__init__(file)
        self._storages: dict[str, StorageRef] = {}
        self._spans: dict[str, Span] = {}
        position = self._after_preamble()
        self.root, position = read_pickle_at(file, position, call_torch, self._persistent)
        keys, position = read_pickle_at(file, position, window=1 << 12)
        self._find_storages(keys, position)

    def storage(self, ref: StorageRef) -> Span:
        """Where the values of a storage are, or those of its part."""
        span = self._spans.get(ref.key)
        if span is None:
            raise FormatError(
                "It is in a storage that the file does not hold. The file is damaged."
            )
        size = itemsize(ref.dtype)
        if (ref.start + ref.count) * size > span.length:
            raise FormatError("It is in a part of a storage that ends before. The file is damaged.")
        return Span(span.file, span.offset + ref.start * size, ref.count * size)

    def _after_preamble(self) -> int:
        magic, position = read_pickle_at(self.file, 0, window=64)
        version, position = read_pickle_at(self.file, position, window=64)
        _, position = read_pickle_at(self.file, position, window=512)
        if (magic, version) != (_MAGIC, _VERSION):
            raise self._error(f"it begins with {str(magic)[:50]} and {str(version)[:50]}")
        return position

    def _persistent(self, identity: Any) -> Any:
        """A storage, part of one, or (in a whole module) a class with its source, which is not needed."""
        match identity:
            case ("module", Global() as kind, *_):
                return kind
            case ("storage", Global(name=kind), str(key), str(), int(count), view) if count >= 0:
                whole = StorageRef(key, storage_dtype(kind), count)
                if self._storages.setdefault(key, whole) != whole:
                    raise self._error(f"the storage {key[:50]!r} is described in two ways")
                return whole if view is None else self._part(whole, view)
        raise self._error("a storage is described in a way that torch does not write")

    def _part(self, whole: StorageRef, view: Any) -> StorageRef:
        match view:
            case (str(), int(start), int(count)) if 0 <= start < MAX_SIZE and 0 <= count < MAX_SIZE:
                return StorageRef(whole.key, whole.dtype, count, start)
        raise self._error("a part of a storage is described in a way that torch does not write")

    def _find_storages(self, keys: Any, position: int) -> None:
        """Step from storage to storage, which must fill the rest of the file."""
        if not isinstance(keys, list) or len(keys) > MAX_TENSORS:
            raise self._error("it has no list of storages")
        for key in keys:
            ref = self._storages.get(key) if isinstance(key, str) else None
            if ref is None or key in self._spans:
                raise self._error(f"the storage {str(key)[:50]!r} belongs to nothing")
            count = int.from_bytes(self.file.read(position, 8), "little", signed=True)
            if count != ref.count:
                raise self._error(
                    f"the storage {key[:50]!r} has {count} values, and its tensors expect {ref.count}"
                )
            length = storage_bytes(ref.dtype, count, self.file)
            self._spans[key] = Span(self.file, position + 8, length)
            position += 8 + length
            if position > self.file.size:
                raise FormatError(
                    f"{self.file.path} is cut short: its storages take {position} bytes at least, and "
                    f"it has {self.file.size}. Copy it again."
                )
        if position < self.file.size:
            raise FormatError(
                f"{self.file.path} goes on for {self.file.size - position} bytes after its last "
                "storage. If several objects were saved into one file, save each into its own."
            )

    def _error(self, problem: str) -> FormatError:
        return FormatError(
            f"{self.file.path}: {problem}. It looks like a file of torch before 1.6, but is damaged."
        )


def storage_bytes(dtype: str, count: int, file: ByteFile) -> int:
    """Bytes of the values of a storage; FormatError if its dtype is unknown or its count negative."""
    if count < 0:
        raise FormatError(f"{file.path} has a storage of {count} values. The file is damaged.")
    if dtype in _QUANTISED:
        return count * _QUANTISED[dtype]
    if dtype not in DTYPE_BITS:
        raise FormatError(f"{file.path} has a storage of {dtype[:50]}, which polyak does not know.")
    return count * itemsize(dtype)
