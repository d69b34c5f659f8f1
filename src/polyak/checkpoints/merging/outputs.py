"""Outputs of a merge: staged in a hidden folder beside their place, and moved there when whole.

`averaged.safetensors` is written as `.averaged.safetensors.<hash>.part/data`; the hash is that of
the whole merge, so a staging folder can only be continued by the merge that it belongs to.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from polyak.checkpoints.merging.align import MergedTensor
from polyak.checkpoints.merging.engine import Sink
from polyak.checkpoints.merging.plan import Plan, Strip
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.checkpoints.writing.hf_folder import (
    SIDECAR_SUFFIXES,
    index_of,
    shard_names,
    sidecar_files,
    split,
)
from polyak.checkpoints.writing.layouts import (
    TORCH_SUFFIXES,
    Layout,
    OutputFile,
    SafetensorsLayout,
    layout_for,
)
from polyak.errors import ArgumentError, OutputError
from polyak.files import sync, writing_errors

_RETRY = "pass resume=True to continue this merge"


@dataclass(frozen=True)
class Blueprint:
    """One output before anything is written: its place, its files, and the tensors of each.

    layouts: file name within a folder (or "" for a single file) -> layout and number of tensors.
    """

    target: Path
    metadata: Mapping[str, str]
    layouts: Mapping[str, tuple[Layout, int]]
    carried: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of files."""
        return "" not in self.layouts

    @property
    def nbytes(self) -> int:
        """Bytes that will be written."""
        sizes = (layout.size for layout, _ in self.layouts.values())
        return sum(sizes) + sum(map(len, self.carried.values()))


@dataclass(frozen=True)
class Contents:
    """What all outputs of a merge hold: tensors in writing order, and ties."""

    tensors: Sequence[MergedTensor]
    ties: Mapping[str, str]
    newest: Checkpoint
    shard_size: int


def blueprint(target: Path, contents: Contents, metadata: Mapping[str, str]) -> Blueprint:
    """How `target` will be written: `.safetensors`, a torch archive, or a folder (no suffix)."""
    if target.name in ("", ".."):
        raise ArgumentError(f"Output {target} has no name of its own; write it out.")
    single = layout_for(target, contents.tensors, contents.ties, metadata)
    if single is not None:
        return Blueprint(target, metadata, {"": (single, len(contents.tensors))})
    suffix = target.suffix
    if suffix and not suffix[1:2].isdigit() and not target.is_dir():
        raise ArgumentError(
            f"Output {target} has the suffix {suffix!r}; expected .safetensors, a torch archive "
            f"({', '.join(TORCH_SUFFIXES)}), or a folder (no suffix)."
        )
    return _folder(target, contents, metadata)


def _folder(target: Path, contents: Contents, metadata: Mapping[str, str]) -> Blueprint:
    carried = sidecar_files(contents.newest.path)
    stem = "adapter_model" if "adapter_config.json" in carried else "model"
    shards = split(contents.tensors, contents.shard_size)
    names = shard_names(stem, len(shards))
    layouts: dict[str, tuple[Layout, int]] = {
        name: (SafetensorsLayout(shard, metadata), len(shard))
        for name, shard in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        index = index_of(dict(zip(names, shards, strict=True)))
        carried = {**carried, f"{stem}.safetensors.index.json": index}
    return Blueprint(target, metadata, layouts, carried)


def staging_errors(path: Path) -> AbstractContextManager[None]:
    """As `writing_errors`, for what a resumed merge continues."""
    return writing_errors(path, _RETRY)


class Staged:
    """One output while it is being written."""

    def __init__(self, plan: Blueprint, identity: str) -> None:
        self.blueprint = plan
        self.room = staging_room(plan.target, identity)
        self.data = self.room / "data"
        self._is_folder = plan.is_folder
        self.files: list[OutputFile] = []

    @property
    def exists(self) -> bool:
        """Whether its data was staged before."""
        return self.data.exists()

    def open(self) -> None:
        """Make the files at their full size, with what goes before the values."""
        with staging_errors(self.room):
            (self.data if self._is_folder else self.room).mkdir(parents=True, exist_ok=True)
        for name, (layout, _) in self.blueprint.layouts.items():
            path = self.data / name if self._is_folder else self.data
            self.files.append(OutputFile(path, layout.size, retry=_RETRY))
            layout.begin(self.files[-1])

    def strips(self, plan: Plan) -> list[Strip[Sink]]:
        """Where the bytes of each segment go."""
        places = iter(self._places())
        strips: list[Strip[Sink]] = []
        for segment in plan.segments:
            strip: Strip[Sink] = Strip()
            for tensor in segment.tensors:
                file, offset = next(places)
                strip.add(file, offset, tensor.nbytes)
            strips.append(strip)
        return strips

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what is known last, and sync everything."""
        for file, (layout, _) in zip(self.files, self.blueprint.layouts.values(), strict=True):
            layout.finish(file, metadata)
            file.sync()
        with staging_errors(self.data):
            for name, content in self.blueprint.carried.items():
                (self.data / name).write_bytes(content)
                sync(self.data / name)
            if self._is_folder:
                sync(self.data)

    def publish(self) -> None:
        """Move it into place; what stood there goes only then. Done by another part: nothing."""
        target = self.blueprint.target
        with staging_errors(target):
            try:
                if target.is_dir() and self.exists:
                    old = self.room / "replaced"
                    target.replace(old)
                self.data.replace(target)
            except FileNotFoundError:
                if not target.exists():
                    raise
            sync(target.parent)

    def close(self) -> None:
        """Close the files."""
        while self.files:
            self.files.pop().close()

    def discard(self) -> None:
        """Remove the staging folder."""
        shutil.rmtree(self.room, ignore_errors=True)

    def _places(self) -> Sequence[tuple[OutputFile, int]]:
        pairs = zip(self.files, self.blueprint.layouts.values(), strict=True)
        return [(file, offset) for file, (layout, _) in pairs for offset in layout.offsets]


def staging_room(target: Path, identity: str) -> Path:
    """The hidden folder beside `target` in which the merge of this identity is staged."""
    return target.with_name(f".{target.name}.{identity}.part")


def leftovers(target: Path) -> list[Path]:
    """Staging folders of any merge into `target`."""
    found = target.parent.glob(f".{_escaped(target.name)}.????????????.part")
    return sorted(path for path in found if path.is_dir())


def check_room(blueprints: Sequence[Blueprint], identity: str) -> None:
    """Raise OutputError unless the folders are there and the disks have room for what is missing."""
    needed: dict[int, tuple[Path, int]] = {}
    for plan in blueprints:
        parent = plan.target.parent
        if not parent.is_dir():
            raise OutputError(
                f"There is no folder {parent} to write {plan.target.name} to. Make it."
            )
        if not os.access(parent, os.W_OK):
            raise OutputError(f"No permission to write in {parent}. Choose another folder.")
        held = _blocks_under(staging_room(plan.target, identity))
        device = parent.stat().st_dev
        before = needed.get(device, (parent, 0))[1]
        needed[device] = (parent, before + max(0, plan.nbytes - held))
    for parent, size in needed.values():
        free = shutil.disk_usage(parent).free
        if free < size:
            raise OutputError(
                f"{parent} has {free} bytes free and {size} are needed. Make room, or write elsewhere."
            )


def refuse_foreign(plan: Blueprint) -> None:
    """Raise OutputError where the target is of another kind, or a folder with more than a merge writes.

    A folder is replaced whole: what else lies in it would be gone.
    """
    target = plan.target
    if target.exists() and target.is_dir() is not plan.is_folder:
        found, wanted = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise OutputError(
            f"{target} is a {found}, and the output is a {wanted}. Choose another name."
        )
    entries = sorted(target.iterdir()) if target.is_dir() else []
    foreign = [path.name for path in entries if not _is_ours(path)]
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise OutputError(
            f"{target} is a folder that holds {shown}; replacing it would remove that. Choose another "
            "name, or remove the folder yourself."
        )


def _is_ours(path: Path) -> bool:
    weights = path.suffix == ".safetensors" and path.stem.startswith(("model", "adapter_model"))
    return path.is_file() and (weights or path.suffix in SIDECAR_SUFFIXES)


def _blocks_under(room: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in room.rglob("*") if path.is_file())


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
