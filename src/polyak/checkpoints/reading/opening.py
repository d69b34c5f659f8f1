"""`open_checkpoint`: detect the format from the contents, and call the reader for it."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress

from polyak.checkpoints.reading.components import components_in, join_components
from polyak.checkpoints.reading.dcp import read_dcp
from polyak.checkpoints.reading.folders import (
    is_index,
    is_part_of_folder,
    join_shards,
    shards_of,
    training_step,
)
from polyak.checkpoints.reading.foreign import refuse_archive, refuse_foreign, refuse_tar
from polyak.checkpoints.reading.legacy_tar import MEMBERS, LegacyTar
from polyak.checkpoints.reading.legacy_torch import LegacyTorch, is_legacy
from polyak.checkpoints.reading.npz import read_npz
from polyak.checkpoints.reading.rank_shards import is_rank_shard, read_rank_shards
from polyak.checkpoints.reading.safetensors_reader import is_safetensors, read_safetensors
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import FLOATS, ByteFile, Checkpoint
from polyak.checkpoints.reading.tars import is_tar, tar_members
from polyak.checkpoints.reading.torch_archive import TorchArchive
from polyak.checkpoints.reading.torch_file import read_torch
from polyak.checkpoints.reading.untrusted_json import MAX_JSON_BYTES, parse_json
from polyak.checkpoints.reading.zips import ZipArchive
from polyak.errors import ArgumentError, FormatError
from polyak.files import as_path


def open_checkpoint(
    path: str | os.PathLike[str], *, key: str | None = None, strict: bool = True
) -> Checkpoint:
    """Open a checkpoint; its tensors are read when they are asked for, and nothing is ever unpickled.

    The format is detected from the contents, not the name. Nothing but headers is held in memory.

    Args:
        path: A safetensors file, a file of `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`), an `.npz` file, an
            index of shards (`*.index.json`), or a folder of Transformers, diffusers (a model or a
            pipeline), sentence-transformers, PEFT or `torch.distributed.checkpoint`. Local, or an
            address that fsspec understands (`s3://`, `gs://`, `https://`, `memory://`).
        key: Where the tensors are inside nested dicts, with dots (`"ema.state_dict"`). By default
            under `state_dict`, `model_state_dict`, `model` or `module`, or at the root; `""` takes
            all tensors there are. A file that holds the model's tensors twice must be given one.
        strict: Refuse a checkpoint with a tensor that cannot be read (sparse, quantised, expanded,
            partitioned, of an unknown class). If False, such tensors are listed in `refused` instead.

    Returns:
        A `Checkpoint`: `tensors`, `ties`, `metadata`, `step`, `extra`.

    Raises:
        ArgumentError: There is no such file, or no such key in it.
        FormatError: The file is damaged, hostile, or not a checkpoint.
        MismatchError: Shards and their index disagree.

    >>> import tempfile, pathlib, torch
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "step-500.pt"
    >>> torch.save({"model": {"w": torch.ones(2, 3)}, "epoch": 4}, path)
    >>> checkpoint = open_checkpoint(path)
    >>> checkpoint.tensors, checkpoint.step
    ({'w': SpanTensor('w', F32, [2, 3])}, 500)

    """
    as_path(path)
    place = Place(path)
    with ExitStack() as undo:
        opened = _open(place, key)
        undo.callback(opened.close)
        _refuse_partitioned(opened)
        if strict and opened.refused:
            listed = "\n".join(f"  {name}: {why}" for name, why in opened.refused.items())
            raise FormatError(
                f"{place.path}: {len(opened.refused)} of its tensors cannot be read.\n{listed}"
            )
        opened.path = place.path
        opened.step = training_step(place, opened.metadata)
        undo.pop_all()
    return opened


def _refuse_partitioned(opened: Checkpoint) -> None:
    """Weights of shape (0,): what DeepSpeed ZeRO-3 leaves in a model whose parameters are partitioned.

    No layer has a weight of that shape; an empty one has two dimensions.
    """
    tensors = opened.tensors
    empty = [
        name
        for name, tensor in tensors.items()
        if tensor.shape == (0,) and tensor.dtype in FLOATS and name.rpartition(".")[2] == "weight"
    ]
    for name in empty:
        opened.refused[name] = _PARTITIONED
        del tensors[name]
    for alias in [alias for alias, name in opened.ties.items() if name in opened.refused]:
        opened.refused[alias] = _PARTITIONED
        del opened.ties[alias]


_PARTITIONED = (
    "It is empty, as DeepSpeed ZeRO-3 leaves the parameters of a model: its values are in the shards of "
    "the ranks. Run the zero_to_fp32.py of the DeepSpeed checkpoint, and pass its output."
)


def _open(place: Place, key: str | None) -> Checkpoint:
    if place.is_folder:
        return _open_folder(place, key)
    opened = _open_weights(place, key)
    if is_part_of_folder(place.name) and not place.remote:
        opened.components = {"": place.name}
    return opened


def _open_folder(folder: Place, key: str | None) -> Checkpoint:
    """All models of a folder as one checkpoint; mostly there is one."""
    with ExitStack() as undo:
        opened: dict[str, Checkpoint] = {}
        found = components_in(folder)
        for prefix, weights in found.items():
            opened[prefix] = _open_part(weights, key)
            undo.callback(opened[prefix].close)
        joined = opened[""] if [*opened] == [""] else join_components(folder.path, opened)
        joined.components = {prefix: folder.path_of(weights) for prefix, weights in found.items()}
        undo.pop_all()
    return joined


def _open_part(weights: Place, key: str | None) -> Checkpoint:
    if is_rank_shard(weights.name):
        return _without_key(read_rank_shards(weights.parent), key)
    return _open_weights(weights, key)


def _open_weights(place: Place, key: str | None) -> Checkpoint:
    if place.name == ".metadata":
        return read_dcp(place.parent, key)
    if is_index(place.name):
        return _open_shards(place, key)
    return _open_file(place, key)


def _open_shards(index: Place, key: str | None) -> Checkpoint:
    shards = shards_of(index)
    with ExitStack() as undo:
        opened: dict[str, Checkpoint] = {}
        for name in shards:
            opened[name] = _open_file(index.parent.inside(name), key)
            undo.callback(opened[name].close)
        joined = join_shards(index.path, shards, opened)
        undo.pop_all()
    return joined


def _open_file(place: Place, key: str | None) -> Checkpoint:
    file = place.file()
    with ExitStack() as undo:
        undo.callback(file.close)
        opened = read_file(file, key)
        undo.pop_all()
    return opened


def read_file(file: ByteFile, key: str | None = None) -> Checkpoint:
    """Open a file, whose format its first bytes tell; see `open_checkpoint`, which finds the file."""
    start = file.read(0, min(file.size, 512))
    if is_safetensors(start):  # first: the length before the header can look like any format
        return _without_key(read_safetensors(file), key)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        try:
            return _read_zip(file, key)
        except FormatError as error:
            behind = _header_behind(file)
            if behind is None:
                raise
            is_whole = _ends_with_its_tensors(file, *behind)
            raise FormatError(
                f"{error} {_PICKLES_IN_FRONT} {_WHOLE if is_whole else _CUT}"
            ) from None
    if is_legacy(start):
        return read_torch(LegacyTorch(file), key)
    if is_tar(start):
        return read_torch(_opened_tar(file), key)
    refuse_foreign(file, start)
    return _without_key(read_safetensors(file), key)


def _read_zip(file: ByteFile, key: str | None) -> Checkpoint:
    archive = ZipArchive(file)
    refuse_archive(file, archive.entries)
    if any(name.endswith("data.pkl") for name in archive.entries):
        return read_torch(TorchArchive(file, archive), key)
    return _without_key(read_npz(file, archive), key)


def _header_behind(file: ByteFile) -> tuple[int, int] | None:
    """Where a file that is called .safetensors has a header not far behind its beginning, and its length."""
    if not file.path.endswith(".safetensors"):
        return None
    start = file.read(0, min(file.size, _MAX_IN_FRONT))
    at = start.find(_HEADER)
    length = int.from_bytes(start[max(at - 8, 0) : at], "little")
    return (at, length) if at >= 8 and len(_HEADER) < length <= file.size - at else None


def _ends_with_its_tensors(file: ByteFile, at: int, length: int) -> bool:
    """Whether the file ends where the header says that the last tensor does."""
    with suppress(FormatError, TypeError, KeyError, ValueError):
        header = parse_json(file.read(at, min(length, MAX_JSON_BYTES)), file.path)
        del header["__metadata__"]
        end = max((int(one["data_offsets"][1]) for one in header.values()), default=0)
        return at + length + end == file.size
    return False


_HEADER = b'{"__metadata__"'
_MAX_IN_FRONT = 1 << 24  # bytes of pickles, each of a value that is no tensor
_PICKLES_IN_FRONT = (
    "The file is called .safetensors and begins with a file of torch.save. torch.distributed.checkpoint's "
    "HuggingFaceStorageWriter (torch 2.13) writes so if the state holds a value that is no tensor, such as a "
    "step: nothing reads that. Save the tensors alone."
)
_WHOLE = 'What is saved is whole, from 8 bytes before {"__metadata__" to the end of the file.'
_CUT = (
    "This file is also damaged: it does not end where its last tensor does. Copy or save it again."
)


def _opened_tar(file: ByteFile) -> LegacyTar:
    members = tar_members(file)
    if not members.keys() >= MEMBERS:
        refuse_tar(file, members)
    return LegacyTar(file, members)


def _without_key(checkpoint: Checkpoint, key: str | None) -> Checkpoint:
    if key:
        raise ArgumentError(
            f"{checkpoint.path} is flat ({checkpoint.format}), so it has no key {key!r}. Leave out key=."
        )
    return checkpoint
