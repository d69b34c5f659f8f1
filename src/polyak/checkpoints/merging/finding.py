"""What inputs name: files, folders and globs, opened. Each file is opened once."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from polyak.checkpoints.merging.counted import LeftOut, average_rank
from polyak.checkpoints.merging.passed_over import (
    has_step,
    has_weights,
    is_numbered_checkpoint,
    is_run,
    is_state,
    is_weights_file,
    models_in,
    nothing_in,
    passed_over,
    why_beside,
    why_none,
)
from polyak.checkpoints.reading.components import components_in, part_folders
from polyak.checkpoints.reading.folders import is_model_file, is_record, step_in_name
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.errors import ArgumentError, FormatError

_MODEL_OF_SEVERAL = re.compile(r"(pytorch_)?model_\d+\.(safetensors|bin)")  # Accelerate


class Finder:
    """Opens what inputs name, and remembers it, so that what is not kept can be closed.

    left_out: path -> why, of what was not even opened.
    """

    def __init__(self, key: str | None) -> None:
        self.left_out: LeftOut = {}
        self._key = key
        self._opened: dict[str, Checkpoint] = {}

    def close_all_but(self, kept: Iterable[Checkpoint]) -> None:
        """Close the checkpoints that were opened, but for these."""
        for one in set(self._opened.values()) - set(kept):
            one.close()

    def expand(self, item: str) -> tuple[list[Checkpoint], bool]:
        """The checkpoints that one input means, and whether it names one."""
        if "://" in item or not glob.has_magic(item) or Path(item).exists():
            found = self._inside(item)
            return found, [one.path for one in found] == [item]
        matches = sorted(glob.glob(item, recursive=True))  # noqa: PTH207 - `~` and `**` as the shell has them
        if not matches:
            raise ArgumentError(f"Nothing fits {item}. Check the path.")
        weights = [match for match in matches if not is_state(match)] or matches
        passed = {match: why for match in weights if (why := why_none(Path(match)))}
        taken = [match for match in weights if match not in passed]
        if not taken:
            raise nothing_in(item, passed)
        self.left_out |= passed
        return [one for match in taken for one in self._inside(match)], False

    def _inside(self, path: str) -> list[Checkpoint]:
        """A checkpoint, or all those in a folder."""
        if "://" in path or not Path(path).is_dir():
            return [self._open(path)]
        folder, parts = Path(path), part_folders(Place(path))
        entries = [one for one in sorted(folder.iterdir()) if one.name not in parts]
        self.left_out |= passed_over(entries)
        files = [str(one) for one in entries if is_weights_file(one)]
        runs = [str(one) for one in entries if is_numbered_checkpoint(one)]
        opened = [self._open(one) for one in runs]
        if files and all(map(average_rank, opened)):
            self.left_out |= dict.fromkeys(runs, "it is an average that polyak wrote")
        elif opened:
            self._leave_out_beside(entries, opened)
            return opened
        opened = self._one_or_files(folder, files) or self._parts(folder, entries)
        self._leave_out_beside([one for one in entries if str(one) not in runs], opened)
        return opened

    def _one_or_files(self, folder: Path, files: list[str]) -> list[Checkpoint]:
        """The model that a folder is, or the files in it."""
        try:
            models = components_in(Place(folder))
        except FormatError:
            return [self._open_in_folder(file) for file in files]
        is_composed = "" not in models or len(models) > 1
        if is_composed or len(files) < 2 or self._is_one(folder, models[""], files):
            return [self._open(str(folder))]
        return [self._open_in_folder(file) for file in files]

    def _is_one(self, folder: Path, weights: Place, files: list[str]) -> bool:
        """Whether `weights` are all that the folder means, and not an average of its other files."""
        if not is_model_file(weights.name):
            return False
        others = [name for name in (Path(file).name for file in files) if name != weights.name]
        numbered = [name for name in others if step_in_name(name) is not None]
        if not numbered or step_in_name(folder.name) is not None:
            return True
        if average_rank(self._open(weights.path)):
            return False
        return len(numbered) < 2 or all(map(_MODEL_OF_SEVERAL.fullmatch, numbered))

    def _leave_out_beside(self, entries: list[Path], taken: list[Checkpoint]) -> None:
        """Say which files and folders of weights are not among those that the folder means."""
        paths = {Path(one.path) for one in taken}
        if paths.isdisjoint(entries):  # the folder itself is the checkpoint, or one further down
            above = {one.parent for one in paths}
            entries = [one for one in entries if one.is_dir() and one not in above]
        beside = {str(one): why for one in entries if one not in paths and (why := why_beside(one))}
        if beside and all(map(average_rank, taken)):
            self._refuse_averages(taken, [path for path in beside if Path(path).is_dir()])
        self.left_out |= beside

    def _refuse_averages(self, taken: list[Checkpoint], folders: list[str]) -> None:
        """Averages are meant where there is nothing else; here there are folders of checkpoints."""
        others = [one for one in folders if not is_record(one) and not self._is_average(one)]
        if others:
            raise ArgumentError(
                f"All that is left here are averages that polyak wrote ({', '.join(one.path for one in taken)}), beside "
                f"folders of checkpoints: {', '.join(others)}. Name the folder that is meant; or name the "
                "averages, to average those."
            )

    def _is_average(self, folder: str) -> bool:
        return not is_run(Path(folder)) and average_rank(self._open(folder)) > 0

    def _parts(self, folder: Path, entries: list[Path]) -> list[Checkpoint]:
        """`checkpoint-*/unet`: numbered folders whose weights are one folder further down."""
        held = {one: models for one in entries if has_step(one) and (models := models_in(one))}
        names = sorted(set.intersection(*held.values())) if held else []
        if not names:
            raise self._none_in(folder, entries)
        if len(names) > 1:
            pattern = folder / re.sub(r"\d+", "*", next(iter(held)).name)
            named = ", ".join(f"'{pattern / name}'" for name in names)
            raise FormatError(
                f"The checkpoints in {folder} hold several models each. Name one of them: {named}."
            )
        for one in held:
            self.left_out.pop(str(one), None)
        return [self._open(str(one / names[0])) for one in held]

    def _none_in(self, folder: Path, entries: list[Path]) -> FormatError:
        runs = [str(one) for one in entries if one.is_dir() and why_beside(one)]
        if runs:
            return FormatError(
                f"{folder} holds no checkpoints itself, but its folders do: {', '.join(runs)}. Name "
                "the one that is meant."
            )
        passed = {path: why for path, why in self.left_out.items() if Path(path) in entries}
        if has_weights(folder):  # there are some, and which is unclear
            passed = {}
        return nothing_in(str(folder), passed)

    def _open_in_folder(self, path: str) -> Checkpoint:
        """Open a file nobody named; an average has no `key`, and need not."""
        try:
            return self._open(path)
        except ArgumentError:
            flat = open_checkpoint(path, strict=False) if self._key else None
            if flat is None or not average_rank(flat):
                raise
            return self._opened.setdefault(path, flat)

    def _open(self, path: str) -> Checkpoint:
        if path not in self._opened:
            self._opened[path] = open_checkpoint(path, key=self._key, strict=False)
        return self._opened[path]


def take_steps_from_folders(found: list[Checkpoint]) -> None:
    """`step-*/weights.pt`: files of one name have the steps of their folders."""
    if len(found) < 2 or len({Path(one.path).name for one in found}) > 1:
        return
    for one in found:
        if one.step is None:
            one.step = step_in_name(Path(one.path).parent.name)
