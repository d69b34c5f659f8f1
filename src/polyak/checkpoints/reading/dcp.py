"""Folders of `torch.distributed.checkpoint` (DCP): `.metadata` says where every chunk is.

`.metadata` is a pickle of dataclasses, read without running it; the `.distcp` files hold one small
torch archive per chunk, read in place when the chunk is asked for. Any number of ranks may have written
them, FSDP2 and tensor parallelism included, and no process group is needed.
Source: torch/distributed/checkpoint/{metadata,filesystem}.py of torch 2.13.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from polyak.checkpoints.reading.extra_state import is_extra
from polyak.checkpoints.reading.find_tensors import find_tensors, holds_tensor
from polyak.checkpoints.reading.gather import (
    Box,
    ChunkedTensor,
    StoredChunk,
    Strided,
    StridedTensor,
    SwappedTensor,
    row_major,
)
from polyak.checkpoints.reading.inert import Global, Stub
from polyak.checkpoints.reading.pickle_machine import MAX_PICKLE_BYTES
from polyak.checkpoints.reading.pickle_reader import read_pickle
from polyak.checkpoints.reading.pickled_tensors import DTYPES, StorageRef, TensorRef, call_torch
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import (
    DTYPE_BITS,
    ByteFile,
    Checkpoint,
    SpanTensor,
    StoredTensor,
    are_sizes,
    itemsize,
)
from polyak.checkpoints.reading.torch_archive import TorchArchive
from polyak.checkpoints.reading.untrusted_json import read_json
from polyak.checkpoints.reading.zips import PartFile
from polyak.errors import FormatError, PolyakError

_MAX_CHUNKS = 4_000_000
PROVENANCE = "polyak.json"
"""Beside `.metadata`, which has no room for it: what an average is made of."""
_HOME = "torch.distributed.checkpoint."


@dataclass(frozen=True, slots=True)
class _Item:
    """Where one chunk is stored."""

    file: str
    offset: int
    length: int
    transformed: bool


@dataclass(frozen=True)
class StoredEntry:
    """An entry of a DCP folder that is not read, so that it can be copied as it is stored.

    name: in the flat state dict. path: in the nested one. tensor: dtype as torch names it and shape, or
    None for an object. items: the box (None of an object) and the stored bytes of each chunk.
    """

    name: str
    path: tuple[str | int, ...]
    tensor: tuple[str, tuple[int, ...]] | None
    items: tuple[tuple[Box | None, SpanTensor], ...]


@dataclass(eq=False)
class DcpCheckpoint(Checkpoint):
    """A DCP folder. paths: name of a tensor -> where it is in the saved containers."""

    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    described: _Folder | None = None

    @property
    def prefix(self) -> str:
        """What all names of the folder's flat state dict begin with, with a dot; often empty."""
        name, path = next(iter(self.paths.items()))
        return ".".join(map(str, path)).removesuffix(name)

    def other_entries(self) -> list[StoredEntry]:
        """All that is not among the tensors; files that only these are in are opened, and closed with it."""
        if self.described is None:
            return []
        mine = {".".join(map(str, path)) for path in self.paths.values()}
        found = [self.described.stored(name) for name in self.described.entries if name not in mine]
        self.files = (self.described.file, *self.described.files.values())
        return found


class _ArchivedChunk(StoredChunk):
    """A chunk that is a small torch archive inside a `.distcp` file."""

    def __init__(self, name: str, dtype: str, box: Box, part: PartFile) -> None:
        super().__init__(*box)
        self.name, self.dtype, self.part = name, dtype, part
        self._source: Strided | None = None

    def source(self) -> Strided:
        """Where the values are; the archive is read, and checked, the first time."""
        if self._source is None:
            archive = TorchArchive(self.part)
            ref = archive.root
            if not isinstance(ref, TensorRef) or (ref.dtype, ref.shape) != (self.dtype, self.shape):
                raise FormatError(
                    f"{self.part.path} should hold {self.dtype} {list(self.shape)} of {self.name!r}, "
                    "but holds something else. The files are of different saves, or damaged."
                )
            self._source = _strided(archive.tensor(self.name, ref), self.part)
        return self._source


def read_dcp(folder: Place, key: str | None = None) -> Checkpoint:
    """Open a DCP folder. key: where its tensors are; by default in the usual places."""
    described = _Folder(folder)
    try:
        found = find_tensors(described.tree, key, folder.path)
        tensors: dict[str, StoredTensor] = {}
        for name, ref in found.tensors.items():
            chunks = described.chunks(name, ref)
            try:
                tensors[name] = ChunkedTensor(name, ref.dtype, ref.shape, chunks)
            except FormatError as error:
                found.refused[name] = str(error)
        metadata = _provenance(folder)
    except BaseException:
        described.close()
        raise
    files = (described.file, *described.files.values())
    checkpoint = DcpCheckpoint(
        folder.path, "dcp", tensors, files, {}, metadata, refused=found.refused, extra=found.extra
    )
    checkpoint.paths = {
        name: described.path_of(found.tensors[name].storage.key) for name in tensors
    }
    checkpoint.described = described
    return checkpoint


def _provenance(folder: Place) -> dict[str, str]:
    """What polyak wrote beside the files of an average."""
    try:
        names = folder.names
    except PolyakError:  # many web servers cannot list a folder
        return {}
    if PROVENANCE not in names:
        return {}
    with closing(folder.inside(PROVENANCE).file()) as file:
        found = read_json(file)
    return {key: text for key, text in found.items() if isinstance(text, str)}


class _Folder:
    """What `.metadata` describes, and the `.distcp` files opened so far, each once."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.file = place.inside(".metadata").file()
        self.files: dict[str, ByteFile] = {}
        self.where = self.file.path
        data = self.file.read(0, min(self.file.size, MAX_PICKLE_BYTES + 1))
        root = read_pickle(data, self.where, call_torch)
        described = _fields(root, "metadata.Metadata", self.where)
        entries, paths = described.get("state_dict_metadata"), described.get("planner_data")
        if not isinstance(entries, dict):
            raise _damaged(self.where, "it describes no state_dict")
        self.entries = entries
        self.paths = paths if isinstance(paths, dict) else {}
        self.items = _items(described.get("storage_data"), self.where)
        self.count = 0
        try:
            self.tree = self._tree()
        except BaseException:
            self.close()
            raise

    def chunks(self, name: str, ref: TensorRef) -> list[StoredChunk]:
        """The chunks of a tensor; their files are opened, and checked to be long enough."""
        entry = _fields(self.entries[ref.storage.key], "metadata.TensorStorageMetadata", self.where)
        boxes = _boxes(entry.get("chunks"), self.where)
        self.count += len(boxes)
        if self.count > _MAX_CHUNKS:
            raise _damaged(self.where, f"more than {_MAX_CHUNKS} chunks")
        return [self._chunk(name, ref, box) for box in boxes]

    def _chunk(self, name: str, ref: TensorRef, box: Box) -> StoredChunk:
        first, shape = box
        part = self._part(ref.storage.key, first)
        if math.prod(shape) * itemsize(ref.dtype) > part.size:
            raise _damaged(
                self.where, f"the chunk of {name!r} at {first} does not fit into its item"
            )
        return _ArchivedChunk(name, ref.dtype, box, part)

    def path_of(self, name: str) -> tuple[str | int, ...]:
        """Where an entry is in the saved containers."""
        path = self.paths.get(name, (name,))
        if not isinstance(path, tuple) or not path or len(path) > 50:
            raise _damaged(self.where, f"{name!r} has no path")
        return path

    def stored(self, name: str) -> StoredEntry:
        """An entry with its bytes as they are stored."""
        entry, boxes, tensor = self.entries[name], list[Box | None]([None]), None
        if not _is_object(entry):
            fields = _fields(entry, "metadata.TensorStorageMetadata", self.where)
            _ref(name, fields, self.where)
            kind = fields["properties"].state[0].name
            boxes, tensor = [*_boxes(fields.get("chunks"), self.where)], (kind, fields["size"])
        parts = [(box, self._part(name, box[0] if box else None)) for box in boxes]
        items = tuple(
            (box, SpanTensor(name, "U8", [part.size], part.whole, part.offset))
            for box, part in parts
        )
        return StoredEntry(name, self.path_of(name), tensor, items)

    def _tree(self) -> dict[Any, Any]:
        """The saved containers, with a `TensorRef` (whose storage key is the flat name) for every tensor.

        Of all that is no tensor, only what `get_extra_state` returned is read.
        """
        root: dict[Any, Any] = {}
        for fqn, entry in self.entries.items():
            path = self.path_of(fqn)
            in_extra = any(isinstance(part, str) and is_extra(part) for part in path)
            if not _is_object(entry):
                fields = _fields(entry, "metadata.TensorStorageMetadata", self.where)
                leaf: Any = _ref(fqn, fields, self.where)
            elif in_extra:
                leaf = self._object(fqn)
            else:
                continue
            inner: Any = root
            for part in path[:-1]:
                inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
            if not isinstance(inner, dict) or path[-1] in inner:
                raise _damaged(self.where, f"two entries at the path of {fqn!r}")
            inner[path[-1]] = leaf
        return {key: _with_lists(value, str(key)) for key, value in root.items()}

    def _object(self, fqn: Any) -> Any:
        """A value that is no tensor; one that holds tensors stays an object that is not built."""
        value = TorchArchive(self._part(fqn, None)).root
        return Stub("an object with tensors") if holds_tensor(value, self.where) else value

    def close(self) -> None:
        """Close what was opened."""
        for file in (self.file, *self.files.values()):
            file.close()

    def _part(self, fqn: str, first: tuple[int, ...] | None) -> PartFile:
        """The part of a file that holds the chunk at `first`, or an object."""
        item = self.items.get((fqn, first)) or self.items.get((fqn, None))
        if item is None:
            raise _damaged(self.where, f"it does not say where the chunk of {fqn!r} at {first} is")
        if item.transformed:
            raise FormatError(
                f"{self.where}: {fqn!r} was saved with a compressing extension. Save it without one."
            )
        if "/" in item.file or "\\" in item.file or item.file in ("", ".", ".."):
            raise _damaged(self.where, f"{item.file[:100]!r} is not a file name")
        if item.file not in self.files:
            self.files[item.file] = self.place.inside(item.file).file()
        return PartFile(self.files[item.file], item.offset, item.length)


def _is_object(entry: Any) -> bool:
    return isinstance(entry, Stub) and entry.name.endswith(".BytesStorageMetadata")


def _fields(value: Any, kind: str, where: str) -> dict[Any, Any]:
    """The attributes of a dataclass of DCP."""
    if isinstance(value, Stub) and value.name == _HOME + kind and isinstance(value.state, dict):
        return value.state
    found = value.name if isinstance(value, Stub) else type(value).__name__
    raise _damaged(where, f"expected a {kind}, found a {found}")


def _damaged(where: str, problem: str) -> FormatError:
    return FormatError(
        f"{where}: {problem}. It is damaged, or not the .metadata of a DCP checkpoint."
    )


def _items(storage_data: Any, where: str) -> dict[tuple[str, Any], _Item]:
    """(name, offset of the chunk) -> where it is stored."""
    if not isinstance(storage_data, dict):
        raise _damaged(where, "it does not say where the chunks are")
    items = {}
    for index, info in storage_data.items():
        at = _fields(index, "metadata.MetadataIndex", where)
        match _fields(info, "filesystem._StorageInfo", where):
            case {"relative_path": str(path), "offset": int(offset), "length": int(length), **rest}:
                transformed = bool(rest.get("transform_descriptors"))
            case _:
                raise _damaged(where, "a chunk without file, offset and length")
        fqn, first = at.get("fqn"), at.get("offset")
        if not isinstance(fqn, str) or not (first is None or are_sizes(first, tuple)):
            raise _damaged(where, "a chunk without a name")
        items[fqn, first] = _Item(path, offset, length, transformed)
    return items


def _with_lists(value: Any, name: str, *, within: bool = False) -> Any:
    """Extra state with its lists, which are saved as their items, and here are dicts of the positions."""
    within = within or is_extra(name)
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(item, str(key), within=within) for key, item in value.items()}
    is_list = within and bool(inner) and inner.keys() == set(range(len(inner)))
    return [inner[at] for at in range(len(inner))] if is_list else inner


def _ref(fqn: Any, fields: dict[Any, Any], where: str) -> TensorRef:
    properties, shape = fields.get("properties"), fields.get("size")
    state = properties.state if isinstance(properties, Stub) else None
    match state:
        case (Global(name=kind), *_) if isinstance(fqn, str) and are_sizes(shape, tuple):
            dtype = DTYPES.get(kind.removeprefix("torch."), "")
            if DTYPE_BITS.get(dtype, 1) % 8:
                raise _damaged(where, f"{fqn!r} has the dtype {kind}, which polyak does not know")
            return TensorRef(StorageRef(fqn, dtype, 0), dtype, 0, shape or (), ())
    raise _damaged(where, f"{str(fqn)[:200]!r} has no dtype and shape")


def _boxes(chunks: Any, where: str) -> list[Box]:
    if not isinstance(chunks, list):
        raise _damaged(where, "a tensor without chunks")
    found = []
    for chunk in chunks:
        fields = _fields(chunk, "metadata.ChunkStorageMetadata", where)
        first, size = fields.get("offsets"), fields.get("sizes")
        if (
            first is None
            or size is None
            or not (are_sizes(first, tuple) and are_sizes(size, tuple))
        ):
            raise _damaged(where, "a chunk without offsets and sizes")
        found.append((first, size))
    return found


def _strided(stored: StoredTensor, part: PartFile) -> Strided:
    if isinstance(stored, StridedTensor):
        return stored.source
    if isinstance(stored, SwappedTensor) or not stored.spans:
        raise FormatError(
            f"{part.path} is big-endian; DCP checkpoints are read little-endian only."
        )
    span = stored.spans[0]
    return Strided(span.file, span.offset, row_major(stored.shape), itemsize(stored.dtype))
