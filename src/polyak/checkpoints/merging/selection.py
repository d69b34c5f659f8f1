"""Scores of checkpoints: from Transformers, Lightning, or a table, to take the best of them.

Which checkpoints to average: files, folders and globs in, checkpoints in the order of their steps out.
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

from polyak.checkpoints.reading.folders import step_in_name, weights_in
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.pickled_tensors import TensorRef
from polyak.checkpoints.reading.storage import LocalFile, Place
from polyak.checkpoints.reading.stored import TORCH_DTYPES
from polyak.checkpoints.reading.torch_archive import TorchArchive
from polyak.checkpoints.reading.untrusted_json import parse_json
from polyak.errors import ArgumentError, FormatError

_LESS = (
    "loss",
    "error",
    "err",
    "nll",
    "perplexity",
    "ppl",
    "wer",
    "cer",
    "mae",
    "mse",
    "rmse",
    "ece",
    "fid",
)
_MORE = (
    "accuracy",
    "acc",
    "f1",
    "bleu",
    "auc",
    "map",
    "rouge",
    "precision",
    "recall",
    "r2",
    "score",
    "iou",
)
_NAMES = ("path", "file", "checkpoint", "name")

Scored = Sequence[tuple[str, int | None]]


def best(scores: Mapping[str, float], count: int) -> set[str]:
    """The `count` paths with the largest scores (all of them, if there are fewer)."""
    return set(sorted(scores, key=lambda path: scores[path], reverse=True)[:count])


def scores_for(
    checkpoints: Scored, metric: str, table: str | os.PathLike[str] | None = None
) -> dict[str, float]:
    """The score of each checkpoint, the larger the better: path -> value, negated for a loss.

    metric: a name such as `eval_loss` or `val_accuracy`; whether less or more is better follows from
    it, or is said: `min:NAME`, `max:NAME`. table: a CSV or JSONL file with a column `step` (or `path`,
    `file`, `checkpoint`, `name`) and one of the metric; without it `trainer_state.json` or Lightning's
    callback state is read. Raises ArgumentError where the direction or a score is not known.
    """
    sign, name = _direction(metric)
    if table is not None:
        found = _from_table(Path(table), name)
    else:
        found = _from_trainer(checkpoints, name) or _from_lightning(checkpoints, name)
    scores = {path: _lookup(found, path, step) for path, step in checkpoints}
    known = {path: sign * score for path, score in scores.items() if score is not None}
    if not known:
        where = table or "trainer_state.json or Lightning's callback state"
        raise ArgumentError(
            f"No score {name!r} for any of {len(checkpoints)} checkpoints in {where}. Give a CSV or "
            "JSONL file with the columns step and the metric (--scores FILE)."
        )
    return known


def _direction(metric: str) -> tuple[int, str]:
    """-1 for less is better, 1 for more, and the name."""
    said, _, name = metric.rpartition(":")
    if said in ("min", "max"):
        return (-1 if said == "min" else 1), name
    words = re.split(r"[^a-z0-9]+", metric.lower())
    less, more = (any(word in words for word in group) for group in (_LESS, _MORE))
    if less == more:
        raise ArgumentError(
            f"Is less or more of {metric!r} better? Write min:{metric} or max:{metric}."
        )
    return (-1 if less else 1), metric


def _lookup(found: Mapping[str | int, float], path: str, step: int | None) -> float | None:
    """By path, by file name, or by step; a score that is not finite is none."""
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


def _from_trainer(checkpoints: Scored, metric: str) -> dict[str | int, float]:
    """From the log of the checkpoint that was written last."""
    states = [Path(path) / "trainer_state.json" for path, _ in checkpoints]
    present = [state for state in states if state.is_file()]
    found: dict[str | int, float] = {}
    for state in present:
        log = parse_json(state.read_bytes(), str(state)).get("log_history", [])
        for entry in log if isinstance(log, list) else []:
            if isinstance(entry, dict) and type(entry.get("step")) is int and metric in entry:
                found[entry["step"]] = float(entry[metric])
    return found


def _from_lightning(checkpoints: Scored, metric: str) -> dict[str | int, float]:
    """From `best_k_models` of the `ModelCheckpoint` callbacks that monitor the metric."""
    found: dict[str | int, float] = {}
    for path, _ in checkpoints:
        if not path.endswith(".ckpt") or not Path(path).is_file():
            continue
        archive = TorchArchive(LocalFile(path))
        callbacks = archive.root.get("callbacks") if isinstance(archive.root, dict) else None
        for state in callbacks.values() if isinstance(callbacks, dict) else ():
            if isinstance(state, dict) and state.get("monitor") == metric:
                found.update(_best_models(archive, state))
        archive.file.close()
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
    best: so many with the best `metric` (see `polyak.checkpoints.merging.selection`), read from `scores` if given.
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
    with open_checkpoint(path, key=key, strict=False) as checkpoint:
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
