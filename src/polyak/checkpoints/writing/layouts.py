"""Where every byte of an output file goes, known before the first value is: safetensors and torch.

The names, dtypes and shapes of the output (`TensorSpec`) determine each offset, so any number of threads
can write values in any order, and metadata of a known length (the hashes of a verified merge) last.

A torch archive is what `torch.save` makes of a state dict: a zip of stored records, `data.pkl` (names,
shapes, storages) and one record per tensor, aligned so that `torch.load(mmap=True)` works. Metadata is in
the state dict's `_metadata` under the key "polyak", where `weights_only=True` and `load_state_dict` accept
it. Equal contents give equal bytes, in any process.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from polyak.checkpoints.reading.extra_state import tensors_in
from polyak.checkpoints.reading.inert import SetItems
from polyak.checkpoints.reading.plain import PlainTensor
from polyak.checkpoints.reading.stored import TORCH_DTYPES, bytes_of, itemsize
from polyak.checkpoints.writing.extra_state import SetInOrder, built, writable
from polyak.errors import FormatError, OutputError
from polyak.files import writing_errors

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
MAX_HEADER = 100_000_000
_PAGE = 4096  # the values of a safetensors file begin on a page, for direct reads and memory maps


@dataclass(frozen=True, eq=False)
class TensorSpec:
    """A tensor to write: its name, its dtype as safetensors spells it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the values, row-major."""
        return bytes_of(self.dtype, self.shape)


class OutputFile:
    """A file that is written in pieces by any number of threads.

    size: what the file is made to have; None for a file that another process has made. retry: what to do
    after an error, as `writing_errors` says it.
    """

    def __init__(self, path: Path, size: int | None, *, retry: str = "try again") -> None:
        self.path = path
        self._retry = retry
        create = 0 if size is None else os.O_CREAT
        with writing_errors(path, retry):
            self.descriptor = os.open(path, os.O_RDWR | create | os.O_CLOEXEC, 0o666)
            if size is not None:
                os.ftruncate(self.descriptor, size)

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write all of `data` at `offset`; OutputError if the disk is full or gone."""
        view = memoryview(data)
        with writing_errors(self.path, self._retry):
            while view:
                done = os.pwrite(self.descriptor, view, offset)
                view, offset = view[done:], offset + done

    def read(self, offset: int, length: int) -> bytes:
        """Bytes that were written."""
        with writing_errors(self.path, self._retry):
            data = os.pread(self.descriptor, length, offset)
        if len(data) < length:
            raise OutputError(f"{self.path} lost bytes after {offset + len(data)}. Start again.")
        return data

    def sync(self) -> None:
        """Flush to the disk."""
        with writing_errors(self.path, self._retry):
            os.fsync(self.descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


@dataclass(frozen=True)
class Around:
    """What a torch archive holds beside the tensors.

    order: names in the order of the state dict, aliases too; names that are not among them come last.
    versions: the `_metadata` of a module's state dict. entries: those of the dict around the state dict,
    plain values, in which `state_dict` marks its place; None if the state dict is all there is.
    extra: the state dict's state that is no tensor, as a `Checkpoint` describes it.
    """

    order: Sequence[str] = ()
    versions: Mapping[Any, Any] = field(default_factory=dict)
    entries: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Layout(Protocol):
    """Where the bytes of each tensor go in one file, and what is around them.

    size: of the file. offsets: of each tensor's bytes, in the order of the tensors.
    """

    size: int
    offsets: list[int]

    def begin(self, file: OutputFile) -> None:
        """Write what can be written before the values."""

    def finish(self, file: OutputFile, metadata: Mapping[str, str]) -> None:
        """Write what is only known after them; `metadata` as long as at first."""


def layout_for(
    path: Path,
    tensors: Sequence[TensorSpec],
    ties: Mapping[str, str],
    metadata: Mapping[str, str],
    around: Around | None = None,
) -> Layout | None:
    """The layout of the file that the suffix of `path` asks for, or None for any other suffix.

    ties: alias -> name. around: what a torch archive holds beside the tensors.
    """
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return SafetensorsLayout(tensors, metadata, ties)
    if suffix in TORCH_SUFFIXES:
        return TorchLayout(tensors, ties, metadata, around)
    return None


class SafetensorsLayout:
    """One safetensors file: the header, padded so that the values begin on a page, then the values.

    ties: alias -> name; the metadata entry `ties`, if there is one, lists those of this file's tensors.
    Raises FormatError where the header would exceed the format's limit of 100 MB.
    """

    def __init__(
        self,
        tensors: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        ties: Mapping[str, str] | None = None,
    ) -> None:
        self._tensors = tensors
        names = {tensor.name for tensor in tensors}
        self._ties = {alias: name for alias, name in (ties or {}).items() if name in names}
        header = self._header(metadata)
        self._length = -(-(8 + len(header)) // _PAGE) * _PAGE - 8
        if self._length > MAX_HEADER:
            raise FormatError(
                f"The header of {len(tensors)} tensors takes {self._length} bytes; safetensors allows "
                f"{MAX_HEADER}. Write a folder of shards, or a torch archive (.pt)."
            )
        self._prologue = self._padded(header)
        self.offsets: list[int] = []
        position = 8 + self._length
        for tensor in tensors:
            self.offsets.append(position)
            position += tensor.nbytes
        self.size = position

    def begin(self, file: OutputFile) -> None:
        """Write the header."""
        file.write(0, self._prologue)

    def finish(self, file: OutputFile, metadata: Mapping[str, str]) -> None:
        """Write the header once more, now with the final metadata."""
        file.write(0, self._padded(self._header(metadata)))

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        if "ties" in metadata:
            metadata = {**metadata, "ties": json.dumps(self._ties)}
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        for tensor in self._tensors:
            end = position + tensor.nbytes
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()

    def _padded(self, header: bytes) -> bytes:
        return self._length.to_bytes(8, "little") + header.ljust(self._length, b" ")


METADATA_KEY = "polyak"
"""The entry of a state dict's `_metadata` that holds the file's metadata."""

ALIGNMENT = 64
_ROOT = "archive"
_LIMIT = 0xFFFFFFFF  # from here on sizes and offsets are in 64-bit extra fields
_READ = 4 << 20
_STORAGES = {
    "F64": torch.DoubleStorage, "F32": torch.FloatStorage, "F16": torch.HalfStorage,
    "BF16": torch.BFloat16Storage, "I64": torch.LongStorage, "I32": torch.IntStorage,
    "I16": torch.ShortStorage, "I8": torch.CharStorage, "U8": torch.ByteStorage,
    "BOOL": torch.BoolStorage, "C64": torch.ComplexFloatStorage, "C128": torch.ComplexDoubleStorage,
}  # fmt: skip


@dataclass
class _Record:
    """One entry of the zip. data: None for a tensor's, which is written while merging."""

    name: bytes
    size: int
    header_at: int = 0
    data_at: int = 0
    data: bytes | None = None
    crc: int = 0


class TorchLayout:
    """A torch archive of one flat state dict, name -> tensor; tied names share one storage.

    The state dict is all that is in it, or one of the entries that `around` has. Raises
    FormatError for a dtype that torch does not have.
    """

    def __init__(
        self,
        tensors: Sequence[TensorSpec],
        ties: Mapping[str, str],
        metadata: Mapping[str, str],
        around: Around | None = None,
    ) -> None:
        self._tensors, self._ties, self._around = tensors, ties, around or Around()
        self._extra = writable(self._around.extra)
        further: list[_Record] = []
        self._entries = self._ready(self._around.entries, further)
        small = {
            "data.pkl": self._pickled(metadata),
            ".format_version": b"1",
            ".storage_alignment": str(ALIGNMENT).encode(),
            "byteorder": b"little",
            "version": b"3\n",
        }
        self._records = [_Record(_path(k), len(v), data=v) for k, v in small.items()]
        values = [_Record(_path(f"data/{i}"), t.nbytes) for i, t in enumerate(tensors)]
        self._records[4:4] = [*values, *further]
        position = 0
        for record in self._records:
            record.header_at = position
            record.data_at = position + len(_local_header(record))
            position = record.data_at + record.size
        self.offsets = [record.data_at for record in values]
        self._directory_at = position
        self.size = position + len(self._directory())

    def begin(self, file: OutputFile) -> None:
        """Nothing: the checksums in the headers are only known at the end."""

    def finish(self, file: OutputFile, metadata: Mapping[str, str]) -> None:
        """Take the checksums of what was written, then write headers, small records, directory."""
        self._records[0].data = self._pickled(metadata)
        for record in self._records:
            record.crc = _crc_of(record, file)
            file.write(record.header_at, _local_header(record) + (record.data or b""))
        file.write(self._directory_at, self._directory())

    def _pickled(self, metadata: Mapping[str, str]) -> bytes:
        """`data.pkl`: an OrderedDict of tensors, with `_metadata` as modules give it.

        A pickle refers back to a string it has seen only if it is the same object; interning makes that
        a question of equality, so that equal contents give equal bytes.
        """
        rebuilt = {t.name: _Rebuilt(t, str(i)) for i, t in enumerate(self._tensors)}
        rebuilt |= {alias: rebuilt[n] for alias, n in self._ties.items() if n in rebuilt}
        within = tensors_in(self._extra)
        shown: dict[str, Any] = {name: one for name, one in rebuilt.items() if name not in within}
        shown |= built(self._extra, rebuilt.__getitem__, SetItems)
        order = dict.fromkeys((*(n for n in self._around.order if n in shown), *shown))
        state = OrderedDict((sys.intern(name), self._ready(shown[name], [])) for name in order)
        versions = {**self._around.versions, METADATA_KEY: dict(metadata)}
        vars(state)["_metadata"] = self._ready(versions, [])
        root = state if self._entries is None else {**self._entries, "state_dict": state}
        stream = io.BytesIO()
        _Pickler(stream, protocol=2).dump(root)
        return stream.getvalue()

    def _ready(self, value: Any, records: list[_Record]) -> Any:
        """Plain values as they are pickled, strings interned; the bytes of tensors go to `records`."""
        if isinstance(value, Mapping):
            kind = OrderedDict if type(value) is OrderedDict else dict
            return kind(
                (self._ready(k, records), self._ready(v, records)) for k, v in value.items()
            )
        if isinstance(value, (list, tuple)):
            items = [self._ready(item, records) for item in value]
            return SetInOrder(items) if isinstance(value, SetItems) else type(value)(items)
        if isinstance(value, PlainTensor):
            key = str(len(self._tensors) + len(records))
            records.append(_Record(_path(f"data/{key}"), len(value.data), data=value.data))
            return _Rebuilt(TensorSpec("a tensor", value.dtype, value.shape), key)
        return sys.intern(value) if type(value) is str else value

    def _directory(self) -> bytes:
        entries = b"".join(_central_header(record) for record in self._records)
        return entries + _end(len(self._records), len(entries), self._directory_at)


@lru_cache(maxsize=1024)
def tensor_archive(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What is before and after the values in a torch archive of one tensor, as `torch.save` makes it.

    Without checksums, as with `torch.serialization.set_crc32_options(False)`: torch reads none, and the
    values can be written in any order and by several processes.
    """
    spec = TensorSpec("a tensor", dtype, shape)
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(_Rebuilt(spec, "0"))
    values = _Record(_path("data/0"), spec.nbytes)
    before = [_Record(_path("data.pkl"), stream.tell(), data=stream.getvalue()), values]
    small = {".format_version": b"1", "byteorder": b"little", "version": b"3\n"}
    after = [_Record(_path(name), len(data), data=data) for name, data in small.items()]
    position = 0
    for record in (*before, *after):
        record.header_at = position
        position += len(_local_header(record)) + record.size
    directory = b"".join(_central_header(record) for record in (*before, *after))
    head, tail = (
        b"".join(_local_header(record) + (record.data or b"") for record in records)
        for records in (before, after)
    )
    return head, tail + directory + _end(len(before) + len(after), len(directory), position)


def _path(name: str) -> bytes:
    return f"{_ROOT}/{name}".encode()


def _crc_of(record: _Record, file: OutputFile) -> int:
    if record.data is not None:
        return zlib.crc32(record.data)
    crc = 0
    for start in range(0, record.size, _READ):
        length = min(_READ, record.size - start)
        crc = zlib.crc32(file.read(record.data_at + start, length), crc)
    return crc


def _local_header(record: _Record) -> bytes:
    """The header before a record, padded by an extra field so that the data is aligned."""
    large = record.size >= _LIMIT
    shown = _LIMIT if large else record.size
    extra = struct.pack("<HHQQ", 1, 16, record.size, record.size) if large else b""
    start = record.header_at + 30 + len(record.name) + len(extra) + 4
    padding = -start % ALIGNMENT
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    fields = (0, 0, 0, 0, record.crc, shown, shown, len(record.name), len(extra))
    return b"PK\3\4" + struct.pack("<HHHHHIIIHH", 45, *fields) + record.name + extra


def _central_header(record: _Record) -> bytes:
    large, far = record.size >= _LIMIT, record.header_at >= _LIMIT
    numbers = [record.size, record.size] * large + [record.header_at] * far
    extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
    size = _LIMIT if large else record.size
    at = _LIMIT if far else record.header_at
    fields = (45, 45, 0, 0, 0, 0, record.crc, size, size, len(record.name), len(extra))
    return (
        b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", *fields, 0, 0, 0, 0, at) + record.name + extra
    )


def _end(entries: int, length: int, at: int) -> bytes:
    """The end of the directory; its 64-bit form always goes before it, as torch writes it."""
    wide = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, entries, entries, length, at)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, at + length, 1)
    few = min(entries, 0xFFFF)
    short = (0, 0, few, few, min(length, _LIMIT), min(at, _LIMIT), 0)
    return wide + locator + b"PK\5\6" + struct.pack("<HHHHIIH", *short)


@dataclass(frozen=True)
class _Storage:
    """A storage while pickling: only its persistent id is written."""

    key: str
    kind: Any
    size: int


class _Rebuilt:
    """Pickles as the call by which torch rebuilds a tensor."""

    def __init__(self, tensor: TensorSpec, key: str) -> None:
        self._tensor, self._key = tensor, key

    def __reduce__(self) -> tuple[Any, ...]:
        tensor, dtype = self._tensor, self._tensor.dtype
        if dtype not in TORCH_DTYPES:
            raise FormatError(f"torch has no dtype {dtype} ({tensor.name}). Write safetensors.")
        strides = tuple(_strides(tensor.shape))
        if dtype in _STORAGES:
            storage = _Storage(self._key, _STORAGES[dtype], tensor.nbytes // itemsize(dtype))
            rest: tuple[Any, ...] = (storage, 0, tensor.shape, strides, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, rest
        storage = _Storage(self._key, torch.UntypedStorage, tensor.nbytes)
        wide: tuple[Any, ...] = (
            storage,
            0,
            tensor.shape,
            strides,
            False,
            OrderedDict(),
            TORCH_DTYPES[dtype],
        )
        return torch._utils._rebuild_tensor_v3, wide


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", obj.kind, obj.key, "cpu", obj.size)
        return None


def _strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]
