"""A DCP folder as the output of a merge, so that training continues from it.

Tensors keep the places that they have in the newest input's nested state dict, from any other format they
are put under `dcp_key`. What else is in a DCP input (optimizer, schedule, position in the data) is the
newest's: it does not belong to an average, and is carried along only on request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from polyak.checkpoints.merging.align import MergedTensor
from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.outputs import Blueprint, Contents
from polyak.checkpoints.reading.dcp import PROVENANCE, DcpCheckpoint, StoredEntry
from polyak.checkpoints.reading.extra_state import is_extra
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.checkpoints.writing import dcp
from polyak.checkpoints.writing.dcp import CopiedEntry, DcpFolder
from polyak.checkpoints.writing.hf_folder import sidecar_files
from polyak.checkpoints.writing.layouts import TORCH_SUFFIXES
from polyak.errors import ArgumentError, warn

_REST = "meta.pt"  # Lightning's file for all that is not the model or the optimizer
_MAX_REST = 1 << 30


def dcp_blueprint(
    target: Path,
    contents: Contents,
    carried: Sequence[StoredEntry],
    metadata: Mapping[str, str],
    options: MergeOptions,
) -> Blueprint:
    """How a DCP folder will be written; the tensors are those of `contents` and of `as_tensors(carried)`."""
    newest = contents.newest
    if target.suffix in (".safetensors", *TORCH_SUFFIXES):
        raise ArgumentError(
            f"The output {target} is a file, and format is 'dcp', whose outputs are folders. Leave out the "
            "suffix, or leave out format."
        )
    if len(newest.components) > 1:
        raise ArgumentError(
            f"{newest.path} holds several models; a DCP folder holds one. Name the files of one model."
        )
    paths = _paths(newest, [*newest.tensors, *newest.ties], options.dcp_key)
    copied = [
        CopiedEntry(one.path, one.tensor, [(box, part.nbytes) for box, part in one.items])
        for one in carried
    ]
    model = contents.tensors[: len(contents.tensors) - sum(len(one.items) for one in carried)]
    folder = DcpFolder(model, paths, _count(newest, model, options), copied)
    ties = {paths[alias]: paths[name] for alias, name in contents.ties.items()}
    sidecars = {**sidecar_files(newest, contents.dtype), ".metadata": folder.metadata(ties)}
    if options.keep_state:
        sidecars |= _rest(newest)
    sidecars.pop(PROVENANCE, None)
    return Blueprint(target, metadata, folder.files, folder.places, sidecars, PROVENANCE)


def carried_from(newest: Checkpoint, options: MergeOptions) -> list[StoredEntry]:
    """What a DCP folder takes over from the newest as it is: extra state always, the rest on request."""
    if not isinstance(newest, DcpCheckpoint):
        return []
    others = newest.other_entries()
    return [one for one in others if options.keep_state or _is_models(one, newest)]


def as_tensors(carried: Sequence[StoredEntry], inputs: int) -> list[MergedTensor]:
    """The stored bytes of each item as a tensor that is copied from the newest of `inputs` inputs."""
    return [
        MergedTensor(
            f"{one.name} at {box[0]}" if box else one.name,
            "U8",
            part.shape,
            None,
            False,
            (*(None for _ in range(inputs - 1)), part),
        )
        for one in carried
        for box, part in one.items
    ]


def warn_of_left_out(newest: Checkpoint) -> None:
    """Warn of what a DCP input holds beside the model, which an output without `keep_state` has not."""
    if not isinstance(newest, DcpCheckpoint):
        return
    others = [one for one in newest.other_entries() if not _is_models(one, newest)]
    kinds = Counter(str(one.path[0]) for one in others)
    if _REST in Place(newest.path).names:
        kinds[_REST] = 1
    if kinds:
        listed = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in kinds.items())
        warn(
            f"The output holds the model alone, without what else is in {newest.path}: {listed}. Pass "
            "keep_state=True to carry it over from there."
        )


def _is_models(entry: StoredEntry, newest: DcpCheckpoint) -> bool:
    """Whether it is extra state of the model whose tensors are averaged."""
    within = ".".join(map(str, entry.path)).startswith(newest.prefix)
    return within and any(isinstance(part, str) and is_extra(part) for part in entry.path)


def _paths(newest: Checkpoint, names: Sequence[str], key: str | None) -> dict[str, dcp.Path]:
    """Where each tensor goes in the nested state dict."""
    if isinstance(newest, DcpCheckpoint) and key is None:
        return newest.paths
    outer = tuple(key.split(".")) if key else ()
    return {name: (*outer, name) for name in names}


def _count(newest: Checkpoint, tensors: Sequence[MergedTensor], options: MergeOptions) -> int:
    """How many files: as asked, as many as the newest has, or as few as `shard_size` allows."""
    if options.dcp_files is not None:
        return options.dcp_files
    if isinstance(newest, DcpCheckpoint):
        return max(1, sum(file.path.endswith(".distcp") for file in newest.files))
    return max(1, -(-sum(tensor.nbytes for tensor in tensors) // options.shard_bytes))


def _rest(newest: Checkpoint) -> dict[str, bytes]:
    place = Place(newest.path)
    if not isinstance(newest, DcpCheckpoint) or _REST not in place.names:
        return {}
    with closing(place.inside(_REST).file()) as file:
        if file.size > _MAX_REST:
            raise ArgumentError(
                f"{file.path} has {file.size} bytes; at most {_MAX_REST} are copied."
            )
        return {_REST: file.read(0, file.size)}
