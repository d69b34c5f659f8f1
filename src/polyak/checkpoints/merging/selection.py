"""Which checkpoints to average: files, folders and globs in, checkpoints in the order of their steps out.

Each is opened once, here; what the selection needs (its step, whether a merge wrote it) and what the merge
needs are read in that one look. Scores, to take the best of them, come from Transformers, Lightning or a
table.
"""

from __future__ import annotations

import csv
import glob
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyak.checkpoints.merging.prepare import checked_inputs, garbage_kept
from polyak.checkpoints.reading.folders import step_in_name, weights_in
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.pickled_tensors import TensorRef
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import TORCH_DTYPES, Checkpoint
from polyak.checkpoints.reading.torch_archive import TorchArchive
from polyak.checkpoints.reading.untrusted_json import parse_json
from polyak.errors import ArgumentError, FormatError
from polyak.files import as_path
from polyak.maths.arguments import at_least_one, number

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
_NOT_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "random_states")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which of the checkpoints that were found to take; filters apply in this order.

    steps: first and last step, both included, None for open. every: only steps that are a multiple.
    best: at most N with the best `metric`, such as `eval_loss`, `min:NAME` or `max:NAME`, read from the
    table `scores` if given, else from what the training loop kept. last: at most N of the latest.
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
            if value is not None:
                at_least_one(name, value)
        if self.steps is not None:
            _check_range(self.steps)
        if self.metric is not None and not isinstance(self.metric, str):
            raise ArgumentError(f"metric is {self.metric!r}; expected the name of a score.")
        if self.scores is not None:
            as_path(self.scores)
        if (self.best is None) != (self.metric is None):
            raise ArgumentError(
                "best and metric go together: how many to keep, and by which score."
            )
        if self.scores is not None and self.best is None:
            raise ArgumentError(
                "scores only serve to keep the best ones: give best and metric too."
            )


def _checked(item: Any) -> str:
    as_path(item)
    path: str = os.fspath(item)  # a Path would make one slash of the two in s3://
    return path


def _check_range(steps: object) -> None:
    if not isinstance(steps, tuple | list) or len(steps) != 2:
        raise ArgumentError(
            f"steps is {steps!r}; expected a first and a last step, or None for open."
        )
    for step in steps:
        if step is not None:
            number("A step of the range", step)


def select_checkpoints(
    inputs: Iterable[str | os.PathLike[str]],
    selection: Selection | None = None,
    *,
    key: str | None = None,
) -> list[Checkpoint]:
    """Open the checkpoints that `inputs` name; each glob and folder in the order of its steps.

    An open checkpoint holds names and shapes, not weights. `average_checkpoints` takes them as they are,
    without opening them again; close them afterwards (each is a context manager).

    Args:
        inputs: Checkpoint files and folders, globs, and folders that hold checkpoints (`run/` with
            `checkpoint-500/`, `checkpoint-1000/`, or files). Steps are numbers, so 1000 comes after
            500; where one is unknown the names decide. Files in a folder that an earlier merge wrote are
            left out.
        selection: Which of them to take, in the order of the steps throughout; by default all.
        key: Where the tensors are, as `open_checkpoint` takes it.

    Raises:
        ArgumentError: nothing is left, or a filter needs steps that are unknown.

    >>> import tempfile, pathlib, torch
    >>> from safetensors.torch import save_file
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for step in (500, 1000, 1500):
    ...     save_file({"w": torch.ones(1)}, folder / f"step-{step}.safetensors")
    >>> [checkpoint.step for checkpoint in select_checkpoints([folder], Selection(last=2))]
    [1000, 1500]

    """
    paths = [_checked(item) for item in checked_inputs(inputs)]
    wanted: object = selection or Selection()
    if not isinstance(wanted, Selection):
        raise ArgumentError(f"selection is {wanted!r}; expected a polyak.checkpoints.Selection.")
    finder, kept = _Finder(key), list[Checkpoint]()
    try:
        with garbage_kept():
            found = [one for path in paths for one in _ordered(finder.expand(path))]
        if not found:
            raise ArgumentError("There is nothing to average: no input was given.")
        kept = found if wanted == Selection() else _filtered(_ordered(found), wanted)
        if not kept:
            steps = ", ".join("?" if one.step is None else str(one.step) for one in found)
            raise ArgumentError(f"No checkpoint is left of {len(found)}, at the steps {steps}.")
    except PermissionError as error:
        raise FormatError(f"Could not open {error.filename}: {error.strerror}.") from error
    finally:
        finder.close_all_but(kept)
    return kept


class _Finder:
    """Opens what inputs name, and remembers it, so that what is not kept can be closed."""

    def __init__(self, key: str | None) -> None:
        self._key = key
        self._opened: list[Checkpoint] = []

    def close_all_but(self, kept: Iterable[Checkpoint]) -> None:
        for one in set(self._opened) - set(kept):
            one.close()

    def expand(self, item: str) -> list[Checkpoint]:
        """The checkpoints that one input means."""
        if "://" in item or not glob.has_magic(item) or Path(item).exists():
            return self._inside(item)
        matches = sorted(glob.glob(item, recursive=True))  # noqa: PTH207 - `~` and `**` as the shell has them
        if not matches:
            raise ArgumentError(f"Nothing fits {item}. Check the path.")
        return [one for match in matches for one in self._inside(match)]

    def _inside(self, path: str) -> list[Checkpoint]:
        """A checkpoint, or all those in a folder."""
        if "://" in path or not Path(path).is_dir():
            return [self._open(path, self._key)]
        folder = Path(path)
        runs = [one for one in folder.iterdir() if one.is_dir() and _is_numbered_checkpoint(one)]
        if runs:
            return _without_copies([self._open(str(one), self._key) for one in sorted(runs)])
        try:
            weights_in(Place(path))
        except FormatError as error:
            files = [str(one) for one in sorted(folder.iterdir()) if _is_weights_file(one)]
            if not files:
                raise error from None
            opened = [self._open_in_folder(file) for file in files]
            return _without_copies([one for one in opened if not _is_merged(one)])
        return [self._open(path, self._key)]

    def _open_in_folder(self, path: str) -> Checkpoint:
        """Open a file nobody named; the output of an earlier merge has no `key`, and need not."""
        try:
            return self._open(path, self._key)
        except ArgumentError:
            flat = self._open(path, None) if self._key else None
            if flat is None or not _is_merged(flat):
                raise
            return flat

    def _open(self, path: str, key: str | None) -> Checkpoint:
        self._opened.append(open_checkpoint(path, key=key, strict=False))
        return self._opened[-1]


def _is_merged(one: Checkpoint) -> bool:
    """Whether an earlier merge wrote it: an average must not enter the next one by accident."""
    return {"polyak", "inputs"} <= one.metadata.keys()


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


def _without_copies(found: list[Checkpoint]) -> list[Checkpoint]:
    """Without Lightning's `last.ckpt` where it repeats another, and without links to another."""
    kept: dict[str, Checkpoint] = {}
    for one in found:
        kept.setdefault(str(Path(one.path).resolve()), one)
    steps = {one.step for one in kept.values() if not _is_last(one)}
    return [one for one in kept.values() if not (_is_last(one) and one.step in steps)]


def _is_last(one: Checkpoint) -> bool:
    return Path(one.path).stem.split("-v")[0] == "last"


def _ordered(found: list[Checkpoint]) -> list[Checkpoint]:
    if any(one.step is None for one in found):
        return found
    return sorted(found, key=lambda one: one.step or 0)


def _filtered(found: list[Checkpoint], wanted: Selection) -> list[Checkpoint]:
    if wanted.steps is not None or wanted.every is not None:
        _need_steps(found)
    if wanted.steps is not None:
        first, last = wanted.steps
        found = [one for one in found if (first or 0) <= (one.step or 0)]
        found = [one for one in found if last is None or (one.step or 0) <= last]
    if wanted.every is not None:
        found = [one for one in found if (one.step or 0) % wanted.every == 0]
    if wanted.best is not None and wanted.metric is not None and found:
        scores = scores_for(found, wanted.metric, wanted.scores)
        best = set(sorted(scores, key=lambda path: scores[path], reverse=True)[: wanted.best])
        found = [one for one in found if one.path in best]
    if wanted.last is not None:
        _need_steps(found)
        found = found[-wanted.last :]
    return found


def _need_steps(found: Sequence[Checkpoint]) -> None:
    unknown = [one.path for one in found if one.step is None]
    if unknown:
        raise ArgumentError(
            f"The training step of {', '.join(unknown)} is unknown, so it cannot be selected by. Put "
            "it in the name (checkpoint-500, step_000500.pt)."
        )


_LESS = {
    "loss", "error", "err", "nll", "perplexity", "ppl", "wer", "cer", "mae", "mse", "rmse", "ece", "fid",
}  # fmt: skip
_MORE = {
    "accuracy", "acc", "f1", "bleu", "auc", "map", "rouge", "precision", "recall", "r2", "score", "iou",
}  # fmt: skip
_NAMES = ("path", "file", "checkpoint", "name")


def scores_for(
    checkpoints: Sequence[Checkpoint], metric: str, table: str | os.PathLike[str] | None = None
) -> dict[str, float]:
    """The score of each checkpoint, the larger the better: path -> value, negated for a loss.

    metric: a name such as `eval_loss` or `val_accuracy`, which implies whether less or more is better, or
    `min:NAME`, `max:NAME`. table: a CSV or JSONL file with a column `step` (or `path`, `file`,
    `checkpoint`, `name`) and one of the metric; without it `trainer_state.json` or Lightning's callback
    state is read. Raises ArgumentError where the direction or every score is unknown.
    """
    sign, name = _direction(metric)
    if table is not None:
        found = _from_table(Path(table), name)
    else:
        found = _from_trainer(checkpoints, name) or _from_lightning(checkpoints, name)
    scores = {one.path: _lookup(found, one.path, one.step) for one in checkpoints}
    known = {path: sign * score for path, score in scores.items() if score is not None}
    if not known:
        where = table or "trainer_state.json or Lightning's callback state"
        raise ArgumentError(
            f"No score {name!r} for any of {len(checkpoints)} checkpoints in {where}. Pass scores= with a "
            "CSV or JSONL file that has the columns step and the metric."
        )
    return known


def _direction(metric: str) -> tuple[int, str]:
    """-1 for less is better, 1 for more, and the name."""
    direction, _, name = metric.rpartition(":")
    if direction in ("min", "max"):
        return (-1 if direction == "min" else 1), name
    words = re.split(r"[^a-z0-9]+", metric.lower())
    less, more = (any(word in words for word in group) for group in (_LESS, _MORE))
    if less == more:
        raise ArgumentError(
            f"Is less or more of {metric!r} better? Write min:{metric} or max:{metric}."
        )
    return (-1 if less else 1), metric


def _lookup(found: Mapping[str | int, float], path: str, step: int | None) -> float | None:
    """By path, by file name, or by step; scores that are not finite do not count."""
    for key in (str(Path(path).resolve()), path, Path(path).name, step):
        score = found.get(key) if key is not None else None
        if score is not None and math.isfinite(score):
            return score
    return None


def _from_table(path: Path, metric: str) -> dict[str | int, float]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"Could not read scores from {path}: {error}.") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix.lower() == ".csv":
        rows: list[dict[str, Any]] = list(csv.DictReader(lines))
    else:
        rows = [parse_json(line.encode(), f"A line of {path}") for line in lines]
    found: dict[str | int, float] = {}
    for row in rows:
        key = next((str(row[name]) for name in _NAMES if row.get(name)), None)
        if row.get(metric) in (None, ""):
            continue
        try:
            found[int(float(row["step"])) if key is None else key] = float(row[metric])
        except (KeyError, TypeError, ValueError):
            shown = json.dumps(row, default=str)[:200]
            raise FormatError(
                f"{path}: expected numbers for step and {metric}, found {shown}."
            ) from None
    return found


def _from_trainer(checkpoints: Sequence[Checkpoint], metric: str) -> dict[str | int, float]:
    """From the log of the checkpoint that was written last."""
    states = [Path(one.path) / "trainer_state.json" for one in checkpoints]
    present = [state for state in states if state.is_file()]
    found: dict[str | int, float] = {}
    for state in present:
        log = parse_json(state.read_bytes(), str(state)).get("log_history", [])
        for entry in log if isinstance(log, list) else []:
            if isinstance(entry, dict) and type(entry.get("step")) is int and metric in entry:
                found[entry["step"]] = float(entry[metric])
    return found


def _from_lightning(checkpoints: Sequence[Checkpoint], metric: str) -> dict[str | int, float]:
    """From `best_k_models` of the `ModelCheckpoint` callbacks that monitor the metric."""
    found: dict[str | int, float] = {}
    for one in checkpoints:
        if one.format != "torch":
            continue
        archive = TorchArchive(one.files[0])
        callbacks = archive.root.get("callbacks") if isinstance(archive.root, dict) else None
        for state in callbacks.values() if isinstance(callbacks, dict) else ():
            if isinstance(state, dict) and state.get("monitor") == metric:
                found.update(_best_models(archive, state))
    return found


def _best_models(archive: TorchArchive, state: Mapping[str, Any]) -> dict[str | int, float]:
    models = state.get("best_k_models")
    scores: dict[str | int, float] = {}
    for path, score in (models if isinstance(models, dict) else {}).items():
        value = _number(archive, score)
        if isinstance(path, str) and value is not None:
            scores[Path(path).name] = value
    return scores


def _number(archive: TorchArchive, value: Any) -> float | None:
    """A number, or the one value of a stored tensor."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, TensorRef):
        return None
    tensor = archive.tensor("score", value)
    raw = bytearray(tensor.nbytes)
    if tensor.nbytes != TORCH_DTYPES[tensor.dtype].itemsize:
        return None
    tensor.read_into(0, memoryview(raw))
    return float(torch.frombuffer(raw, dtype=TORCH_DTYPES[tensor.dtype]).item())
