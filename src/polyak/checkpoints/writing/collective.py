"""`write_collectively`: the tensors of a sharded model as one safetensors file, without gathering them.

All offsets follow from the names, dtypes and shapes, which every rank knows. So rank 0 writes the header,
every rank writes its own boxes at their places, and no value travels between ranks. All ranks must see the
folder of the file, as with `torch.distributed.checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyak.checkpoints.writing.deferred import Deferred
from polyak.checkpoints.writing.hf_folder import WeightsName, index_of, split
from polyak.checkpoints.writing.layouts import OutputFile, SafetensorsLayout, TensorSpec
from polyak.checkpoints.writing.ranks import Ranks
from polyak.checkpoints.writing.save import (
    SPELLINGS,
    bytes_on_host,
    check_names,
    check_target,
    file_metadata,
)
from polyak.errors import ArgumentError, MismatchError, OutputError, require
from polyak.files import as_path, refuse_existing, replacing, replacing_folder

SCRATCH = 2 * 1024**2
"""Bytes of a piece that has to be copied before it is written: one that is strided, or on a device."""

_IS_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_ADVICE = "Nothing was written. Call it on every rank with the same tensors and arguments."


class Boxes(NamedTuple):
    """What one rank holds of a tensor: its dtype and global shape, and (offsets, values) of each box.

    Equal on every rank except for `boxes`; together the ranks' boxes hold each value exactly once, so
    of replicas only one is given, and a rank that holds nothing gives no box.
    """

    dtype: torch.dtype
    shape: Sequence[int]
    boxes: Sequence[tuple[Sequence[int], Tensor | Deferred]]


def write_collectively(  # noqa: PLR0913 - keyword-only arguments do not count
    path: str | os.PathLike[str],
    entries: Mapping[str, Boxes],
    *,
    ties: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    shards: bool = False,
    shard_size: int = 5_000_000_000,
    sidecars: Mapping[str, bytes] | None = None,
    group: Any = None,
) -> None:
    """Write tensors that are spread over ranks to `path`, whole or not at all, without gathering them.

    A collective: every rank of `group` calls it with the same arguments, the boxes and `sidecars` apart,
    and returns when the file is in place. Its bytes are those that `write_checkpoint` writes for the
    whole tensors. A rank needs no more than `SCRATCH` bytes beside its boxes, and a header.

    An error on any rank is raised on every rank, and leaves what was at `path` as it was. Without an
    initialised process group this process alone writes.

    Args:
        path: The `.safetensors` file; with `shards` the folder.
        entries: Name -> `Boxes`, or a tuple of its three fields.
        ties: Alias -> name of the tensor in `entries` that it shares.
        metadata: What the file says about itself; `format` and `polyak` are added.
        overwrite: Replace what is at `path`. Of a folder, only weights are replaced: one that holds other
            files than `sidecars` is refused.
        shards: Write a folder of `model-0000x-of-0000y.safetensors` with an index, as Transformers reads
            it, or of one `model.safetensors` if that is large enough. Each tensor is whole in one file.
        shard_size: Bytes of a shard at most, unless one tensor is larger.
        sidecars: With `shards`, what else goes into the folder: file name -> contents; rank 0's count.
        group: A process group; by default all ranks.

    Raises:
        ArgumentError: a suffix, an entry or a box that cannot be written.
        MismatchError: ranks that disagree about the arguments; boxes that miss or repeat values.
        OutputError: `path` exists or cannot be written, or a rank does not see its folder.

    >>> import tempfile
    >>> from safetensors.torch import load_file
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> halves = [((0, 0), torch.ones(2, 1)), ((0, 1), torch.zeros(2, 1))]
    >>> write_collectively(file, {"w": Boxes(torch.float32, (2, 2), halves)})
    >>> load_file(file)
    {'w': tensor([[1., 0.],
            [1., 0.]])}

    """
    ranks = Ranks(group)
    size = shard_size if shards else None
    plan = ranks.together(lambda: _plan(path, entries, ties or {}, metadata or {}, size))
    plan.sidecars.update(sidecars or {})
    _refuse_disagreement(ranks, plan, overwrite=overwrite)
    _refuse_gaps(ranks, plan)
    with ExitStack() as publishing:
        made = ranks.together(lambda: publishing.enter_context(_staged(ranks, plan, overwrite)))
        part = Path(ranks.gather(str(made))[0])
        ranks.together(lambda: _begin(plan, part) if ranks.leader else None)
        ranks.together(lambda: _fill(plan, part))
        ranks.together(publishing.close)


@dataclass(frozen=True)
class _Plan:
    """One call on one rank. files: name within a folder, "" of a single file -> layout, tensors."""

    target: Path
    entries: Mapping[str, Boxes]
    ties: Mapping[str, str]
    metadata: Mapping[str, str]
    files: Mapping[str, tuple[SafetensorsLayout, Sequence[TensorSpec]]]
    sidecars: dict[str, bytes]


def _plan(
    path: str | os.PathLike[str],
    entries: Mapping[str, Any],
    ties: Mapping[str, str],
    metadata: Mapping[str, str],
    shard_size: int | None,
) -> _Plan:
    """Check what this rank was given, and lay the files out as every rank does."""
    given = {name: _checked(name, entry) for name, entry in entries.items()}
    check_names(given, ties, metadata)
    described = file_metadata(metadata, ties)
    ordered = sorted(given, key=lambda name: -given[name].dtype.itemsize)
    specs = [TensorSpec(n, SPELLINGS[given[n].dtype], tuple(given[n].shape)) for n in ordered]
    parts, sidecars = {"": specs}, {}
    if shard_size is not None:
        require(shard_size > 0, f"shard_size is {shard_size} bytes; expected a positive size.")
        name, cut = WeightsName.like(""), split(specs, shard_size)
        parts = dict(zip(name.files(len(cut)), cut, strict=True))
        sidecars = {name.index: index_of(parts)} if len(cut) > 1 else {}
    files = {
        name: (SafetensorsLayout(part, described, dict(sorted(ties.items()))), part)
        for name, part in parts.items()
    }
    return _Plan(as_path(path), given, ties, described, files, sidecars)


def _checked(name: str, entry: Any) -> Boxes:
    """The entry of a tensor with its boxes, those without values left out."""
    dtype, shape, boxes = entry
    require(dtype in SPELLINGS, f"{name} has the dtype {dtype}, which no file holds.")
    kept = []
    for offsets, box in boxes:
        dense = isinstance(box, Deferred) or (
            isinstance(box, Tensor) and box.layout == torch.strided and not box.is_meta
        )
        if not dense or hasattr(box, "to_local"):
            raise ArgumentError(
                f"A box of {name} is a {type(box).__name__}; expected a plain dense tensor: of a DTensor, "
                "what to_local() returns."
            )
        ends = [at + size for at, size in zip(offsets, box.shape, strict=False)]
        fits = len(shape) == len(offsets) == box.dim() and all(at >= 0 for at in offsets)
        if not fits or any(end > size for end, size in zip(ends, shape, strict=True)):
            raise ArgumentError(
                f"The box {list(box.shape)} at {list(offsets)} is not inside {name}, {list(shape)}."
            )
        require(box.dtype == dtype, f"A box of {name} is {box.dtype}; expected {dtype}.")
        if box.numel():
            kept.append((tuple(offsets), box))
    return Boxes(dtype, tuple(shape), kept)


def _refuse_disagreement(ranks: Ranks, plan: _Plan, *, overwrite: bool) -> None:
    """Raise MismatchError on all ranks where one was called with something else than rank 0."""
    tensors = [[name, str(one.dtype), list(one.shape)] for name, one in plan.entries.items()]
    said = {
        "path": str(plan.target),
        "tensors": tensors,
        "ties": sorted(plan.ties.items()),
        "metadata": plan.metadata,
        "files": list(plan.files),
        "overwrite": overwrite,
    }
    digests = {what: _digest(value) for what, value in said.items()}
    found = ranks.gather(digests)
    for rank, other in enumerate(found):
        differing = [what for what in digests if other[what] != found[0][what]]
        if differing:
            first, theirs = (ranks.gather(said[differing[0]])[at] for at in (0, rank))
            raise MismatchError(
                f"Rank {rank} was given other {' and '.join(differing)} than rank 0: "
                f"{_difference(first, theirs)}. {_ADVICE}"
            )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _difference(first: Any, other: Any) -> str:
    """Where two descriptions part ways."""
    if not isinstance(first, list):
        return f"{other!r} instead of {first!r}"
    pairs = zip_longest(first, other, fillvalue="nothing")
    at, (here, there) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"number {at + 1} is {there} instead of {here}"


def _refuse_gaps(ranks: Ranks, plan: _Plan) -> None:
    """Raise MismatchError on all ranks unless the boxes of all hold each value once."""
    rows = [
        (index, math.prod(box.shape), _position(offsets, entry.shape))
        for index, entry in enumerate(plan.entries.values())
        for offsets, box in entry.boxes
    ]
    found = ranks.gather_to_leader(np.array(rows, dtype=np.int64).reshape(-1, 3))
    ranks.together(lambda: _check_boxes(plan, np.concatenate(found)) if ranks.leader else None)


def _check_boxes(plan: _Plan, rows: Any) -> None:
    """rows: the index of the tensor, the number of values and the first position of every box."""
    held = np.zeros(len(plan.entries), dtype=np.int64)
    np.add.at(held, rows[:, 0], rows[:, 1])
    places, counts = np.unique(rows[:, [0, 2]], axis=0, return_counts=True)
    twice = set(places[counts > 1, 0].tolist())
    changed = {}
    for index, (name, entry) in enumerate(plan.entries.items()):
        size = math.prod(entry.shape)
        if held[index] != size or index in twice:
            repeated = ", some twice" if index in twice else ""
            changed[name] = f"the ranks' boxes hold {held[index]} values{repeated}; expected {size}"
    if changed:
        raise MismatchError.of(
            "The boxes of all ranks together do not hold every value once.",
            changed=changed,
            advice="Nothing was written. Give each part on one rank only: of replicas, on the first.",
        )


def _staged(ranks: Ranks, plan: _Plan, overwrite: bool) -> AbstractContextManager[Path | None]:
    """The place in which rank 0 lets the ranks write, moved to the target when the block succeeds."""
    if not ranks.leader:
        return nullcontext()
    if "" in plan.files:
        check_target(plan.target, overwrite=overwrite, suffixes=(".safetensors",))
        return replacing(plan.target, overwrite=overwrite)
    refuse_existing(plan.target, overwrite=overwrite)
    _refuse_foreign(plan)
    return replacing_folder(plan.target, overwrite=overwrite)


def _refuse_foreign(plan: _Plan) -> None:
    """Raise OutputError where a folder to be replaced holds more than weights."""
    target = plan.target
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file, and the output is a folder. Choose another name.")
    foreign = sorted(
        path.name
        for path in (target.iterdir() if target.exists() else ())
        if not (path.name in plan.sidecars or _IS_WEIGHTS.fullmatch(path.name))
    )
    if foreign:
        raise OutputError(
            f"{target} is a folder that holds {', '.join(foreign[:5])}; replacing it would remove that. "
            "Choose another name, or remove the folder yourself."
        )


def _begin(plan: _Plan, part: Path) -> None:
    """Make the files in their full size, with their headers; and what goes beside them."""
    for name, (layout, _) in plan.files.items():
        with closing(OutputFile(part / name, layout.size)) as file:
            layout.begin(file)
            file.sync()
    for name, content in plan.sidecars.items():
        with closing(OutputFile(part / name, len(content))) as file:
            file.write(0, content)
            file.sync()


def _fill(plan: _Plan, part: Path) -> None:
    """Write this rank's boxes at their places, and sync them."""
    for name, (layout, specs) in plan.files.items():
        pairs = zip(specs, layout.offsets, strict=True)
        mine = [(spec, at) for spec, at in pairs if plan.entries[spec.name].boxes]
        if not mine:
            continue
        with closing(_opened(part / name)) as file:
            for spec, start in mine:
                for offsets, box in plan.entries[spec.name].boxes:
                    _write_box(file, start, spec.shape, offsets, box.detach())
            file.sync()


def _opened(path: Path) -> OutputFile:
    if not path.exists():
        raise OutputError(
            f"{path}, which rank 0 has made, is not there on {socket.gethostname()}. All ranks must see "
            "the same folder: write to a file system that they share."
        )
    return OutputFile(path, None)


def _write_box(
    file: OutputFile,
    start: int,
    shape: Sequence[int],
    offsets: Sequence[int],
    box: Tensor | Deferred,
) -> None:
    """Write a box of a tensor whose values begin at `start` of the file."""
    for offset, piece in _pieces(tuple(offsets), box):
        whole = piece.dim()  # from this dimension on the piece is as wide as the tensor
        while whole and piece.shape[whole - 1] == shape[whole - 1]:
            whole -= 1
        run = math.prod(piece.shape[max(whole - 1, 0) :]) * piece.element_size()
        data = bytes_on_host(piece)
        outer = [range(size) for size in piece.shape[: max(whole - 1, 0)]]
        for at, index in zip(range(0, len(data), run), product(*outer), strict=True):
            first = [o + i for o, i in zip_longest(offset, index, fillvalue=0)]
            place = start + _position(first, shape) * piece.element_size()
            file.write(place, data[at : at + run])


def _pieces(
    offset: tuple[int, ...], box: Tensor | Deferred
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A box cut along its outer dimensions until a piece needs no copy, or only a small one."""
    in_place = isinstance(box, Tensor) and (
        box.is_contiguous() and box.device.type == "cpu" and not box.is_conj() and not box.is_neg()
    )
    if in_place or box.nbytes <= SCRATCH:
        yield offset, box.load() if isinstance(box, Deferred) else box
        return
    dim = next(d for d, size in enumerate(box.shape) if size > 1)
    step = max(1, SCRATCH * box.shape[dim] // box.nbytes)
    for at in range(0, box.shape[dim], step):
        moved = (*offset[:dim], offset[dim] + at, *offset[dim + 1 :])
        yield from _pieces(moved, box.narrow(dim, at, min(step, box.shape[dim] - at)))


def _position(offsets: Sequence[int], shape: Sequence[int]) -> int:
    """The row-major position of the value at `offsets`.

    >>> _position((2, 1), (5, 7))
    15
    """
    position = 0
    for offset, size in zip(offsets, shape, strict=True):
        position = position * size + offset
    return position
