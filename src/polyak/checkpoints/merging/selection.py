"""Which checkpoints to average: files, folders and globs in, checkpoints in the order of their steps out."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyak.checkpoints.merging.scores import best, scores_for
from polyak.checkpoints.reading.folders import weights_in
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.places import Place
from polyak.checkpoints.reading.steps import step_in_name
from polyak.errors import ArgumentError, FormatError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
_NOT_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "random_states")


@dataclass(frozen=True)
class Found:
    """A checkpoint and its training step, if that is known."""

    path: str
    step: int | None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which of the checkpoints that were found to take; filters apply in this order.

    steps: first and last step, both included, None for open. every: only steps that are a multiple.
    best: so many with the best `metric` (see `polyak.checkpoints.merging.scores`), read from `scores` if given.
    last: so many of the latest.
    """

    steps: tuple[int | None, int | None] | None = None
    every: int | None = None
    best: int | None = None
    metric: str | None = None
    scores: str | os.PathLike[str] | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "best", "last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} is {value}; expected at least 1.")
        if (self.best is None) != (self.metric is None):
            raise ArgumentError("best and metric go together: --best 5 --metric eval_loss.")
        if self.scores is not None and self.best is None:
            raise ArgumentError("scores are read to take the best: add --best and --metric.")


def select_checkpoints(
    inputs: Iterable[str | os.PathLike[str]],
    selection: Selection | None = None,
    *,
    key: str | None = None,
) -> list[str]:
    """The paths of the checkpoints meant by `inputs`; each glob and folder in the order of its steps.

    inputs: checkpoint files and folders, globs, and folders that hold checkpoints (`run/` with
    `checkpoint-500/`, `checkpoint-1000/`, or files). Steps are numbers, so 1000 comes after 500; where
    one is not known names decide. With a selection the order is that of the steps throughout.
    key: where the tensors lie, as `open_checkpoint` takes it. Raises ArgumentError where nothing is
    left, or where a filter needs steps that are not known.

    >>> import tempfile, pathlib, torch
    >>> from safetensors.torch import save_file
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for step in (500, 1000, 1500):
    ...     save_file({"w": torch.ones(1)}, folder / f"step-{step}.safetensors")
    >>> [pathlib.Path(p).name for p in select_checkpoints([folder], Selection(last=2))]
    ['step-1000.safetensors', 'step-1500.safetensors']
    """
    try:
        found = [one for item in inputs for one in _ordered(_expanded(os.fspath(item), key))]
    except PermissionError as error:
        raise FormatError(f"Could not open {error.filename}: {error.strerror}.") from error
    if not found:
        raise ArgumentError("There is nothing to average: no input was given.")
    wanted = selection or Selection()
    left = found if wanted == Selection() else _filtered(_ordered(found), wanted)
    if not left:
        steps = ", ".join("?" if one.step is None else str(one.step) for one in found)
        raise ArgumentError(f"No checkpoint is left of {len(found)}, at the steps {steps}.")
    return [one.path for one in left]


def _filtered(found: list[Found], wanted: Selection) -> list[Found]:
    if wanted.steps is not None or wanted.every is not None:
        _need_steps(found)
    if wanted.steps is not None:
        first, last = wanted.steps
        found = [one for one in found if (first or 0) <= (one.step or 0)]
        found = [one for one in found if last is None or (one.step or 0) <= last]
    if wanted.every is not None:
        found = [one for one in found if (one.step or 0) % wanted.every == 0]
    if wanted.best is not None and wanted.metric is not None and found:
        pairs = [(one.path, one.step) for one in found]
        scores = scores_for(pairs, wanted.metric, wanted.scores)
        chosen = best(scores, wanted.best)
        found = [one for one in found if one.path in chosen]
    if wanted.last is not None:
        _need_steps(found)
        found = found[-wanted.last :]
    return found


def _need_steps(found: Sequence[Found]) -> None:
    unknown = [one.path for one in found if one.step is None]
    if unknown:
        raise ArgumentError(
            f"The training step of {', '.join(unknown)} is not known, so it cannot be selected by. Put "
            "it in the name (checkpoint-500, step_000500.pt)."
        )


def _ordered(found: list[Found]) -> list[Found]:
    if any(one.step is None for one in found):
        return found
    return sorted(found, key=lambda one: one.step or 0)


def _expanded(item: str, key: str | None) -> list[Found]:
    """The checkpoints that one input means."""
    if "://" in item or not glob.has_magic(item) or Path(item).exists():
        return _inside(item, key)
    matches = sorted(glob.glob(item, recursive=True))  # noqa: PTH207 - `~` and `**` as the shell has them
    if not matches:
        raise ArgumentError(f"Nothing fits {item}. Check the path.")
    return [one for match in matches for one in _inside(match, key)]


def _inside(path: str, key: str | None) -> list[Found]:
    """A checkpoint, or all those in a folder."""
    if "://" in path or not Path(path).is_dir():
        return [_opened(path, key)]
    folder = Path(path)
    runs = [one for one in folder.iterdir() if one.is_dir() and _is_numbered_checkpoint(one)]
    if runs:
        return _without_copies([_opened(str(one), key) for one in sorted(runs)])
    try:
        weights_in(Place(path))
    except FormatError as error:
        files = [one for one in sorted(folder.iterdir()) if _is_weights_file(one)]
        if not files:
            raise error from None
        return _without_copies([_opened(str(one), key) for one in files if not _is_merged(one)])
    return [_opened(path, key)]


def _opened(path: str, key: str | None) -> Found:
    with open_checkpoint(path, key, strict=False) as checkpoint:
        return Found(path, checkpoint.step)


def _is_merged(path: Path) -> bool:
    """Whether an earlier merge wrote it: an average must not enter the next one unasked."""
    if path.suffix != ".safetensors":
        return False
    with open_checkpoint(path, strict=False) as checkpoint:
        return {"polyak", "inputs"} <= checkpoint.metadata.keys()


def _is_numbered_checkpoint(folder: Path) -> bool:
    if step_in_name(folder.name) is None:
        return False
    try:
        weights_in(Place(folder))
    except FormatError:
        return False
    return True


def _is_weights_file(path: Path) -> bool:
    return (
        path.is_file()
        and path.suffix in SUFFIXES
        and not path.name.startswith((".", *_NOT_WEIGHTS))
    )


def _without_copies(found: list[Found]) -> list[Found]:
    """Without Lightning's `last.ckpt` where it repeats another, and without links to another."""
    kept: dict[str, Found] = {}
    for one in found:
        kept.setdefault(str(Path(one.path).resolve()), one)
    steps = {one.step for one in kept.values() if not _is_last(one)}
    return [one for one in kept.values() if not (_is_last(one) and one.step in steps)]


def _is_last(one: Found) -> bool:
    return Path(one.path).stem.split("-v")[0] == "last"
