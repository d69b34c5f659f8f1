"""`open_checkpoint`: detect the format from the contents, and call the reader for it."""

from __future__ import annotations

import os
from contextlib import ExitStack

from polyak.checkpoints.reading.dcp import read_dcp
from polyak.checkpoints.reading.folders import join_shards, shards_of, training_step, weights_in
from polyak.checkpoints.reading.npz import read_npz
from polyak.checkpoints.reading.safetensors_reader import read_safetensors
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import ByteFile, Checkpoint
from polyak.checkpoints.reading.torch_archive import read_torch
from polyak.checkpoints.reading.zips import ZipArchive
from polyak.errors import ArgumentError, FormatError
from polyak.files import as_path

_UNSUPPORTED = {
    b"\x89HDF": "an HDF5 file (Keras)",
    b"GGUF": "a GGUF file (llama.cpp), whose weights are quantised in blocks",
    b"version https://git-lfs": "a git-lfs pointer, not the weights: run `git lfs pull`",
    b"<": "a web page or XML, perhaps a failed download",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"(\xb5/\xfd": "compressed with zstd: unpack it first",
}


def open_checkpoint(
    path: str | os.PathLike[str], *, key: str | None = None, strict: bool = True
) -> Checkpoint:
    """Open a checkpoint; its tensors are read when they are asked for, and nothing is ever unpickled.

    The format is detected from the contents, not the name. Nothing but headers is held in memory.

    Args:
        path: A safetensors file, a torch archive (`.pt`, `.pth`, `.bin`, `.ckpt`), an `.npz` file, an
            index of shards (`*.index.json`), or a folder of Transformers, diffusers, PEFT or
            `torch.distributed.checkpoint`. Local, or an address that fsspec understands (`s3://`,
            `gs://`, `https://`, `memory://`).
        key: Where the tensors are inside nested dicts, with dots (`"ema.state_dict"`). By default
            under `state_dict`, `model_state_dict`, `model` or `module`, or at the root; `""` takes
            all tensors there are.
        strict: Refuse a checkpoint with a tensor that cannot be read (sparse, quantised, expanded, of
            an unknown class). If False, such tensors are listed in `refused` instead.

    Returns:
        A `Checkpoint`: `tensors`, `ties`, `metadata`, `step`.

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
        if strict and opened.refused:
            listed = "\n".join(f"  {name}: {why}" for name, why in opened.refused.items())
            raise FormatError(
                f"{place.path}: {len(opened.refused)} of its tensors cannot be read.\n{listed}"
            )
        opened.path = place.path
        opened.step = training_step(place, opened.metadata)
        undo.pop_all()
    return opened


def _open(place: Place, key: str | None) -> Checkpoint:
    if place.is_folder:
        place = weights_in(place)
    if place.name == ".metadata":
        return read_dcp(place.parent, key)
    if place.name.endswith(".index.json"):
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
    if start[5:9] == b"\0\0\0{":  # safetensors first: the length before it can look like any format
        return _without_key(read_safetensors(file), key)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        archive = ZipArchive(file)
        if any(name.endswith("data.pkl") for name in archive.entries):
            return read_torch(file, key, archive)
        return _without_key(read_npz(file, archive), key)
    _refuse_unsupported(file, start)
    return _without_key(read_safetensors(file), key)


def _without_key(checkpoint: Checkpoint, key: str | None) -> Checkpoint:
    if key:
        raise ArgumentError(
            f"{checkpoint.path} is flat ({checkpoint.format}), so it has no key {key!r}. Leave key out."
        )
    return checkpoint


def _refuse_unsupported(file: ByteFile, start: bytes) -> None:
    """Raise FormatError, with advice, for formats that are recognised but not supported."""
    if not start:
        raise FormatError(f"{file.path} is empty. Copy it again.")
    if start[257:262] == b"ustar" or start.startswith((b"\x80\x02\x8a\nl\xfc\x9c", b"\x80\x02.")):
        raise FormatError(
            f"{file.path} looks like a file of torch before 1.6. If you trust it, convert it once: "
            f"python -c \"import torch; torch.save(torch.load('{file.path}', map_location='cpu', "
            "weights_only=True), 'converted.pt')\""
        )
    if start.startswith(b"\x80") and start[1:2] in b"\x02\x03\x04\x05":
        raise FormatError(
            f"{file.path} is a bare pickle, which cannot be read without running it. "
            "Load it where it was written, and torch.save a dict of its tensors."
        )
    for mark, name in _UNSUPPORTED.items():
        if start.startswith(mark):
            raise FormatError(f"{file.path} is {name}; expected safetensors, torch.save or npz.")
