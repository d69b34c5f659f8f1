"""Outputs of a merge: staged in a hidden folder beside their place, and moved there when complete.

`averaged.safetensors` is written as `.averaged.safetensors.<hash>.part/data`; the hash is that of
the whole merge, so that a staging folder is only continued by the merge that it belongs to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from polyak.checkpoints.merging.align import MergedTensor
from polyak.checkpoints.merging.engine import Sink
from polyak.checkpoints.merging.plan import ByteRuns, MergePlan
from polyak.checkpoints.reading.lightning import lightning_entries
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.checkpoints.writing.hf_folder import (
    SIDECAR_SUFFIXES,
    WeightsName,
    index_of,
    sidecar_files,
    split,
)
from polyak.checkpoints.writing.layouts import (
    TORCH_SUFFIXES,
    Around,
    Layout,
    OutputFile,
    SafetensorsLayout,
    TensorSpec,
    layout_for,
)
from polyak.errors import ArgumentError, OutputError, PolyakError, warn
from polyak.files import check_place, sync, writing_errors

_RETRY = "pass resume=True to continue this merge"


@dataclass(frozen=True)
class Blueprint:
    """One output before anything is written: where it goes, its files, and the tensors of each.

    layouts: file name within a folder ("" for a single file) -> layout. places: (file, offset, bytes) of
    the pieces of each tensor. sidecars: file name -> contents, of what is copied along. described_in: a
    further file that holds the metadata, for a format that has no room for it.
    """

    target: Path
    metadata: Mapping[str, str]
    layouts: Mapping[str, Layout]
    places: Sequence[Sequence[tuple[str, int, int]]]
    sidecars: Mapping[str, bytes] = field(default_factory=dict)
    described_in: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of files."""
        return "" not in self.layouts

    @property
    def nbytes(self) -> int:
        """Bytes that will be written."""
        sizes = (layout.size for layout in self.layouts.values())
        return sum(sizes) + sum(map(len, self.sidecars.values()))


@dataclass(frozen=True)
class Contents:
    """What all outputs of a merge hold: tensors in writing order, and ties (alias -> name)."""

    tensors: Sequence[MergedTensor]
    ties: Mapping[str, str]
    newest: Checkpoint
    shard_size: int
    dtype: str | None = None

    def of_component(self, prefix: str) -> list[TensorSpec]:
        """The tensors of one model, with the names that they have in its files."""
        return [
            TensorSpec(tensor.name.removeprefix(prefix), tensor.dtype, tensor.shape)
            for tensor in self.tensors
            if component_of(tensor.name, self.newest) == prefix
        ]


def component_of(name: str, newest: Checkpoint) -> str:
    """The prefix of the model that a tensor belongs to: the longest that fits."""
    fitting = [prefix for prefix in newest.components if name.startswith(prefix)]
    return max(fitting, key=len, default="")


def by_component(tensors: Sequence[MergedTensor], newest: Checkpoint) -> list[MergedTensor]:
    """The tensors, those of one model after those of another: each model has files of its own."""
    if len(newest.components) < 2:
        return list(tensors)
    place = {prefix: index for index, prefix in enumerate(newest.components)}
    return sorted(tensors, key=lambda tensor: place[component_of(tensor.name, newest)])


def blueprint(target: Path, contents: Contents, metadata: Mapping[str, str]) -> Blueprint:
    """How `target` will be written: `.safetensors`, a torch archive, or a folder (no suffix)."""
    if target.name in ("", ".."):
        raise ArgumentError(f"The output {target} names no file; write its name out.")
    if target.name.lower() in (".safetensors", *TORCH_SUFFIXES):
        raise ArgumentError(f"The output {target} is a suffix without a name; write it out.")
    around = _around(target, contents.newest)
    single = layout_for(target, contents.tensors, contents.ties, metadata, around)
    if single is not None:
        return Blueprint(target, metadata, {"": single}, [*_places("", single, contents.tensors)])
    suffix = target.suffix
    if suffix and not suffix[1:2].isdigit() and not target.is_dir():
        raise ArgumentError(
            f"The output {target} has the suffix {suffix!r}; expected .safetensors, a torch archive "
            f"({', '.join(TORCH_SUFFIXES)}), or a folder (no suffix)."
        )
    return _folder(target, contents, metadata)


def _around(target: Path, newest: Checkpoint) -> Around:
    """What the newest file holds beside its tensors, as far as the output is of the same kind."""
    entries = None
    if target.suffix.lower() == ".ckpt" and (found := lightning_entries(newest)) is not None:
        entries, dropped = found
        if dropped:
            listed = ", ".join(f"{name} ({what})" for name, what in islice(dropped.items(), 8))
            warn(
                f"{target} leaves out what only the code of its classes could rebuild: {listed}"
                f"{', ...' if len(dropped) > 8 else ''}. load_from_checkpoint takes the "
                "hyper-parameters among it as keywords."
            )
    return Around(newest.order, newest.versions, entries, newest.extra)


def _folder(target: Path, contents: Contents, metadata: Mapping[str, str]) -> Blueprint:
    """Every model of the newest's folder under the name that it has there."""
    layouts: dict[str, Layout] = {}
    places: list[list[tuple[str, int, int]]] = []
    sidecars = sidecar_files(contents.newest, contents.dtype)
    for prefix, found in (contents.newest.components or {"": ""}).items():
        name, tensors = WeightsName.like(found), contents.of_component(prefix)
        ties = {
            alias.removeprefix(prefix): stored.removeprefix(prefix)
            for alias, stored in contents.ties.items()
            if component_of(stored, contents.newest) == prefix
        }
        shards = split(tensors, contents.shard_size) if name.may_be_sharded else [tensors]
        files = dict(zip(name.files(len(shards)), shards, strict=True))
        for file, shard in files.items():
            layouts[file] = SafetensorsLayout(shard, metadata, ties)
            places += _places(file, layouts[file], shard)
        if len(files) > 1:
            sidecars[name.index] = index_of(files)
    return Blueprint(target, metadata, layouts, places, sidecars)


def _places(
    file: str, layout: Layout, tensors: Sequence[TensorSpec]
) -> Iterator[list[tuple[str, int, int]]]:
    """Each tensor in one piece."""
    for tensor, offset in zip(tensors, layout.offsets, strict=True):
        yield [(file, offset, tensor.nbytes)]


def staging_errors(path: Path) -> AbstractContextManager[None]:
    """As `writing_errors`, for what a resumed merge continues."""
    return writing_errors(path, _RETRY)


@contextmanager
def begun_anew(how: str) -> Iterator[None]:
    """For callers that cannot continue a merge: their errors say `how` to begin again, and no `resume=True`."""
    try:
        yield
    except OutputError as error:
        said = OutputError(str(error).replace(_RETRY, how))
        said.errno = error.errno
        raise said from None


class Staged:
    """One output while it is being written."""

    def __init__(self, blueprint: Blueprint, identity: str) -> None:
        self.blueprint = blueprint
        self.folder = staging_folder(blueprint.target, identity)
        self.data = self.folder / "data"
        self._is_folder = blueprint.is_folder
        self.files: list[OutputFile] = []

    @property
    def exists(self) -> bool:
        """Whether its data was staged before."""
        return self.data.exists()

    def open(self) -> None:
        """Make the files at their full size, and write what goes before the values."""
        for name, layout in self.blueprint.layouts.items():
            path = self.data / name if self._is_folder else self.data
            with staging_errors(self.folder):
                path.parent.mkdir(parents=True, exist_ok=True)
            self.files.append(OutputFile(path, layout.size, retry=_RETRY))
            layout.begin(self.files[-1])

    def byte_runs(self, plan: MergePlan) -> list[ByteRuns[Sink]]:
        """Where the bytes of each segment go."""
        files = dict(zip(self.blueprint.layouts, self.files, strict=True))
        return byte_runs(plan, self.blueprint.places, files)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what is only known at the end, and sync everything."""
        for file, layout in zip(self.files, self.blueprint.layouts.values(), strict=True):
            layout.finish(file, metadata)
            file.sync()
        with staging_errors(self.data):
            sidecars = dict(self.blueprint.sidecars)
            if self.blueprint.described_in:
                sidecars[self.blueprint.described_in] = json.dumps(metadata, indent=2).encode()
            for name, content in sidecars.items():
                (self.data / name).parent.mkdir(parents=True, exist_ok=True)
                (self.data / name).write_bytes(content)
                sync(self.data / name)
            if self._is_folder:
                for folder in (self.data, *filter(Path.is_dir, self.data.rglob("*"))):
                    sync(folder)

    def publish(self) -> None:
        """Move it into place, and what was there out of the way; nothing if another part did so.

        A file replaces a file in one step. A folder cannot: between the two renames the target is
        missing, and a process killed there leaves the old folder as `replaced` and the new one as `data`
        in the staging folder. A resumed merge finds `data`, renames it and is done: both renames are
        only ever repeated, never undone.
        """
        target = self.blueprint.target
        with staging_errors(target):
            try:
                if target.is_dir() and self.exists:
                    old = self.folder / "replaced"
                    target.replace(old)
                self.data.replace(target)
            except FileNotFoundError:
                # `data` is gone: this very output has been published, by a part that was done at the
                # same moment or before the kill. Without a target it was lost otherwise.
                if not target.exists():
                    raise
            sync(target.parent)

    def close(self) -> None:
        """Close the files."""
        while self.files:
            self.files.pop().close()

    def discard(self) -> None:
        """Remove the staging folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def byte_runs(
    plan: MergePlan,
    places: Sequence[Sequence[tuple[str, int, int]]],
    files: Mapping[str, OutputFile],
) -> list[ByteRuns[Sink]]:
    """Where the bytes of each segment go: a blueprint's `places`, in its files once they are open."""
    left = iter(places)
    found: list[ByteRuns[Sink]] = []
    for segment in plan.segments:
        runs: ByteRuns[Sink] = ByteRuns()
        for _ in segment.tensors:
            for file, offset, nbytes in next(left):
                runs.add(files[file], offset, nbytes)
        found.append(runs)
    return found


def staging_folder(target: Path, identity: str) -> Path:
    """The hidden folder beside `target` in which the merge of this identity is staged."""
    return target.with_name(f".{target.name}.{identity}.part")


def leftovers(target: Path) -> list[Path]:
    """Staging folders of any merge into `target`."""
    found = target.parent.glob(f".{_escaped(target.name)}.????????????.part")
    return sorted(path for path in found if path.is_dir())


def check_space(blueprints: Sequence[Blueprint], identity: str) -> None:
    """Raise OutputError unless the folders exist and the disks have space for what is missing."""
    needed: dict[int, tuple[Path, int]] = {}
    for one in blueprints:
        parent = one.target.parent
        check_place(one.target)
        if not os.access(parent, os.W_OK):
            raise OutputError(f"No permission to write in {parent}. Choose another folder.")
        held = _blocks_under(staging_folder(one.target, identity))
        device = parent.stat().st_dev
        before = needed.get(device, (parent, 0))[1]
        needed[device] = (parent, before + max(0, one.nbytes - held))
    for parent, size in needed.values():
        free = shutil.disk_usage(parent).free
        if free < size:
            raise OutputError(
                f"{parent} has {free} bytes free and {size} are needed. Make room, or choose another disk."
            )


def refuse_foreign(output: Blueprint) -> None:
    """Raise OutputError if the target is of another kind, or a folder with more than a merge writes.

    A folder is replaced as a whole: whatever else is in it would be lost.
    """
    target = output.target
    if target.exists() and target.is_dir() is not output.is_folder:
        found, wanted = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise OutputError(
            f"{target} is a {found}, and the output is a {wanted}. Choose another name."
        )
    entries = sorted(target.rglob("*")) if target.is_dir() else []
    foreign = [str(path.relative_to(target)) for path in entries if not _is_written_by_merges(path)]
    if entries and not foreign and not _was_merged(target):
        foreign = ["what no merge wrote"]
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise OutputError(
            f"{target} is a folder that holds {shown}; replacing it would remove that. Choose another "
            "name, or remove the folder yourself."
        )


def _is_written_by_merges(path: Path) -> bool:
    suffixes = (".safetensors", ".distcp", *SIDECAR_SUFFIXES)
    return path.is_dir() or path.suffix in suffixes or path.name in (".metadata", "meta.pt")


def _was_merged(folder: Path) -> bool:
    with suppress(PolyakError), open_checkpoint(folder, strict=False) as opened:
        return opened.is_merged
    return False


def refuse_parts_in_one_file(outputs: Sequence[Blueprint], newest: Checkpoint) -> None:
    """Raise ArgumentError if several models would be in one file, which none of their libraries reads."""
    for one in outputs:
        if len(newest.components) > 1 and not one.is_folder:
            parts = ", ".join(newest.components.values())
            raise ArgumentError(
                f"{newest.path} holds several models ({parts}), and the output {one.target} is one "
                "file. Write a folder (a name without a suffix), or name the files of one model."
            )


def _blocks_under(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
