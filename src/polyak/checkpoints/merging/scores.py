"""Scores of checkpoints, to take the best of them: from Transformers, Lightning or a table."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyak.checkpoints.reading.pickled_tensors import TensorRef
from polyak.checkpoints.reading.stored import TORCH_DTYPES, Checkpoint
from polyak.checkpoints.reading.torch_archive import TorchArchive
from polyak.checkpoints.reading.untrusted_json import parse_json
from polyak.errors import ArgumentError, FormatError

_LESS = {
    "loss", "error", "err", "nll", "perplexity", "ppl", "wer", "cer", "mer", "der", "eer", "ter", "ece",
    "mae", "mse", "rmse", "msle", "rmsle", "nmse", "nrmse", "mape", "smape", "ade", "fde", "epe", "bpb",
    "bpc", "ce", "crossentropy", "logloss", "brier", "fid", "kid", "lpips",
}  # fmt: skip
_MORE = {
    "accuracy", "acc", "f1", "bleu", "sacrebleu", "chrf", "rouge", "meteor", "cider", "auc", "auroc",
    "auprc", "map", "ap", "ndcg", "mrr", "mcc", "precision", "recall", "sensitivity", "specificity", "r2",
    "score", "iou", "miou", "dice", "psnr", "ssim", "pesq", "stoi", "likelihood", "elbo", "reward",
}  # fmt: skip
_OPPOSITE = {"neg", "negative", "negated"}
# What is measured is not the score itself but made of it, in a way that the name does not tell.
_DERIVED = {
    "improvement", "reduction", "gain", "delta", "diff", "difference", "change", "drop", "gap", "ratio",
    "scale", "weight", "inverse", "inv", "minus", "increase", "decrease", "threshold",
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
    sign, name = direction(metric)
    if table is not None:
        found = read_table(Path(table), name)
    else:
        found = _from_trainer(checkpoints, name) or _from_lightning(checkpoints, name)
    scores = {one.path: look_up(found, one.path, one.step) for one in checkpoints}
    known = {path: sign * score for path, score in scores.items() if score is not None}
    if not known:
        where = table or "trainer_state.json or Lightning's callback state"
        raise ArgumentError(
            f"No score {name!r} for any of {len(checkpoints)} checkpoints in {where}. Pass scores= with a "
            "CSV or JSONL file that has the columns step and the metric."
        )
    return known


def direction(metric: str) -> tuple[int, str]:
    """-1 for less is better, 1 for more, and the name."""
    direction, _, name = metric.rpartition(":")
    if direction in ("min", "max"):
        return (-1 if direction == "min" else 1), name
    words = _words(metric)
    less, more = bool(words & _LESS), bool(words & _MORE)
    minus = metric.startswith("-")
    opposite = minus or bool(words & _OPPOSITE)
    # `neg_loss` may be the loss on negatives, and `neg_acc` the accuracy on them.
    unclear = opposite and not minus and not words & (_LESS - {"loss"} | {"log", "elbo"})
    if less == more or unclear or words & _DERIVED or metric.startswith(("1-", "1 -", "--")):
        raise ArgumentError(
            f"Is less or more of {metric!r} better? Write min:{metric} or max:{metric}."
        )
    return (-1 if less is not opposite else 1), metric


def _words(metric: str) -> set[str]:
    """The words of a metric's name in lower case: `val/mAP50` has val, mAP and map."""
    parts = re.split(r"[^A-Za-z0-9]+", metric)
    split = [
        word for part in parts for word in re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])\d*", part)
    ]
    found = {word.lower() for word in (*parts, *split) if word}
    return found | {word.rstrip("0123456789") for word in found}


def look_up(found: Mapping[str | int, float], path: str, step: int | None) -> float | None:
    """By path, by file name, or by step; scores that are not finite do not count."""
    for key in (str(Path(path).resolve()), path, Path(path).name, step):
        score = found.get(key) if key is not None else None
        if score is not None and math.isfinite(score):
            return score
    return None


def read_table(path: Path, metric: str) -> dict[str | int, float]:
    """The column of a CSV or JSONL file, by the path or the step in the same row."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(
            f"Could not read the table {path}: {reason}. Check the path, and that it is text in UTF-8."
        ) from error
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
