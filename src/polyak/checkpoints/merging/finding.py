"""What inputs name: files, folders and globs, opened. Each file is opened once."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from polyak.checkpoints.merging.counted import LeftOut, average_rank
from polyak.checkpoints.reading.components import components_in, part_folders
from polyak.checkpoints.reading.folders import is_model_file, step_in_name
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.errors import ArgumentError, FormatError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".pth.tar", ".pt.tar")
_NOT_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "random_states")
_SHARD = re.compile(r"[-_.]\d+[-_]of[-_]\d+\.")
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
        weights = [m for m in matches if not Path(m).name.startswith(_NOT_WEIGHTS)]
        found = [one for match in weights or matches for one in self._inside(match)]
        return found, False

    def _inside(self, path: str) -> list[Checkpoint]:
        """A checkpoint, or all those in a folder."""
        if "://" in path or not Path(path).is_dir():
            return [self._open(path)]
        folder, parts = Path(path), part_folders(Place(path))
        entries = [one for one in sorted(folder.iterdir()) if one.name not in parts]
        files = [str(one) for one in entries if is_weights_file(one)]
        runs = [str(one) for one in entries if _is_numbered_checkpoint(one)]
        opened = [self._open(one) for one in runs]
        if files and all(map(average_rank, opened)):
            self.left_out |= dict.fromkeys(runs, "it is an average that polyak wrote")
        elif opened:
            self._leave_out_beside(folder, runs, files)
            return opened
        try:
            models = components_in(Place(path))
        except FormatError as error:
            if not files:
                return self._parts(folder, error)
        else:
            is_composed = "" not in models or len(models) > 1
            if is_composed or len(files) < 2 or self._is_one(folder, models[""], files):
                return [self._open(path)]
        self._leave_out_beside(folder, runs, [])
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

    def _leave_out_beside(self, folder: Path, runs: list[str], files: list[str]) -> None:
        """Say which files and folders of weights are not among those that the folder means."""
        others = [
            str(one) for one in sorted(folder.iterdir()) if one.is_dir() and _has_weights(one)
        ]
        for path in sorted({*files, *others} - {*runs}):
            self.left_out[path] = "no step is in its name, and it stands beside checkpoints"

    def _parts(self, folder: Path, error: FormatError) -> list[Checkpoint]:
        """`checkpoint-*/unet`: numbered folders whose weights are one folder further down."""
        runs = [one for one in sorted(folder.iterdir()) if _has_step(one)]
        held = [{sub.name for sub in one.iterdir() if _has_weights(sub)} for one in runs]
        names = sorted(set.intersection(*held)) if held else []
        if not names:
            raise error
        if len(names) > 1:
            pattern = folder / re.sub(r"\d+", "*", runs[0].name)
            named = ", ".join(f"'{pattern / name}'" for name in names)
            raise FormatError(
                f"The checkpoints in {folder} hold several models each. Name one of them: {named}."
            )
        return [self._open(str(one / names[0])) for one in runs]

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


def _has_step(path: Path) -> bool:
    return path.is_dir() and step_in_name(path.name) is not None


def _is_numbered_checkpoint(path: Path) -> bool:
    return _has_step(path) and _has_weights(path)


def _has_weights(folder: Path) -> bool:
    try:
        components_in(Place(folder))
    except FormatError:
        return False
    return not folder.name.startswith(".")


def is_weights_file(path: Path) -> bool:
    """Whether a file in a folder may hold weights, by its name."""
    name = path.name
    if not path.is_file() or name.startswith((".", *_NOT_WEIGHTS)) or _SHARD.search(name):
        return False
    return name.endswith(SUFFIXES) or (path.suffix == ".tar" and _is_zip(path))


def _is_zip(path: Path) -> bool:
    """Whether it is what `torch.save` writes, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
