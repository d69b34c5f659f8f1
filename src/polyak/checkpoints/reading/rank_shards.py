"""Safetensors files that the ranks of a job wrote apart (`HuggingFaceStorageWriter`), read as one.

Each file holds chunks of tensors, and in its metadata (`DCP_SHARDING_INFO`) where they begin. The full
shape is nowhere: it is where the last chunk ends, as torch's own reader takes it. So the files of the last
ranks can only be missed if that leaves a hole; the number of ranks is in the metadata of what is read.
Source: torch/distributed/checkpoint/{hf_storage,_hf_utils}.py of torch 2.13.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import NamedTuple

from polyak.checkpoints.reading.gather import ChunkedTensor, StoredChunk, Strided, row_major
from polyak.checkpoints.reading.safetensors_reader import SHARDING, offsets_in, read_safetensors
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import Checkpoint, StoredTensor, itemsize
from polyak.errors import FormatError

_NAME = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")


def is_rank_shard(name: str) -> bool:
    """Whether a file of this name is one rank's."""
    return bool(_NAME.fullmatch(name))


class _Part(NamedTuple):
    """A tensor in one file: its chunk, and where in the whole tensor it begins."""

    tensor: StoredTensor
    first: tuple[int, ...]

    @property
    def last(self) -> tuple[int, ...]:
        """Where it ends."""
        return tuple(a + b for a, b in zip(self.first, self.tensor.shape, strict=True))


class _Chunk(StoredChunk):
    """A chunk that is a whole tensor of a file."""

    def __init__(self, part: _Part) -> None:
        stored = part.tensor
        super().__init__(part.first, stored.shape)
        (span,) = stored.spans or ()
        size = itemsize(stored.dtype)
        self._source = Strided(span.file, span.offset, row_major(stored.shape), size)

    def source(self) -> Strided:
        """Where the values are."""
        return self._source


def read_rank_shards(folder: Place) -> Checkpoint:
    """Open all files `shard-*-model-*-of-*.safetensors` of a folder as one checkpoint."""
    names = [name for name in folder.names if is_rank_shard(name)]
    ranks = _check_complete(folder.path, names)
    with ExitStack() as undo:
        opened = []
        for name in names:
            file = folder.inside(name).file()
            undo.callback(file.close)
            opened.append(read_safetensors(file, of_rank=True))
        parts: dict[str, list[_Part]] = {}
        for one in opened:
            offsets = offsets_in(one.metadata, one.tensors, one.path)
            for name, tensor in one.tensors.items():
                parts.setdefault(name, []).append(_Part(tensor, offsets[name]))
        tensors = {name: _joined(name, found, folder.path) for name, found in parts.items()}
        undo.pop_all()
    written = {k: v for k, v in opened[0].metadata.items() if k not in (SHARDING, "DCP_VERSION")}
    return Checkpoint(
        path=folder.path,
        format="safetensors rank shards",
        tensors=tensors,
        files=tuple(file for one in opened for file in one.files),
        metadata={**written, "ranks": str(ranks)},
    )


def _check_complete(path: str, names: list[str]) -> int:
    """The number of ranks; FormatError if a rank before the last, or a part of the model, is not there."""
    numbers = [tuple(map(int, match.groups())) for name in names if (match := _NAME.match(name))]
    ranks, models, totals = ({number[at] for number in numbers} for at in range(3))
    if len(totals) > 1:
        raise FormatError(
            f"{path} holds shards of different saves: of {' and of '.join(map(str, sorted(totals)))} "
            "files. Save into an empty folder."
        )
    missing = [f"shard-{rank:05}" for rank in sorted(set(range(1, max(ranks))) - ranks)]
    missing += [f"model-{one:05}" for one in sorted(set(range(1, max(totals) + 1)) - models)]
    if missing:
        raise FormatError(
            f"{path} lacks files of {', '.join(missing[:10])}; it holds {', '.join(names[:10])}. Fetch them."
        )
    return max(ranks)


def _joined(name: str, parts: list[_Part], path: str) -> StoredTensor:
    dtypes = {part.tensor.dtype for part in parts}
    sizes = {len(part.first) for part in parts}
    if len(dtypes) > 1 or len(sizes) > 1:
        raise FormatError(
            f"{path}: the parts of {name!r} have different dtypes or dimensions. The files are of "
            "different saves."
        )
    first = parts[0]
    if len(parts) == 1 and not any(first.first):
        return first.tensor
    shape = [max(ends) for ends in zip(*(part.last for part in parts), strict=True)]
    try:
        return ChunkedTensor(name, first.tensor.dtype, shape, [_Chunk(part) for part in parts])
    except FormatError as error:
        raise FormatError(f"{path}, tensor {name!r}: {error}") from None
