"""Folders as Transformers keeps them: shards with an index, and the files beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from polyak.checkpoints.reading.folders import is_index
from polyak.checkpoints.writing.layouts import TensorSpec

SIDECAR_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".bpe"}
_OF_THE_RUN = {"trainer_state.json", "training_args.json", "scheduler.json"}
_MAX_SIDECAR = 64 * 1024**2


def sidecar_files(checkpoint: str) -> dict[str, bytes]:
    """Configuration, tokenizer and code in a checkpoint's folder: name -> contents.

    Weights, optimizer and the state of the run are left out. Empty unless the path is a local folder.
    """
    folder = Path(checkpoint)
    if "://" in checkpoint or not folder.is_dir():
        return {}
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in SIDECAR_SUFFIXES
        and path.name not in _OF_THE_RUN
        and not is_index(path.name)
        and not path.name.startswith(".")
        and path.stat().st_size <= _MAX_SIDECAR
    }


def split(tensors: Sequence[TensorSpec], shard_size: int) -> list[list[TensorSpec]]:
    """Tensors in order, a new shard whenever the next one would exceed `shard_size` bytes."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-00003.safetensors`, ...."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_of(shards: Mapping[str, Sequence[TensorSpec]]) -> bytes:
    """The index of which shard holds which tensor; aliases of tied tensors are not listed."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    names = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
