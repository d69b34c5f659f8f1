"""Which checkpoints to average: files, folders and globs in, checkpoints in the order of their steps out.

Each is opened once, here; what the selection needs (its step, whether a merge wrote it) and what the merge
needs are read in that one look.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from polyak.checkpoints.merging.counted import LeftOut, counted, shared_numbers, without_repeats
from polyak.checkpoints.merging.finding import Finder, take_steps_from_folders
from polyak.checkpoints.merging.prepare import checked_inputs, garbage_kept
from polyak.checkpoints.merging.scores import scores_for
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.errors import ArgumentError, FormatError, warn
from polyak.files import as_path
from polyak.maths.arguments import at_least_one, number


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


@dataclass(frozen=True)
class Found:
    """kept: opened, in the order of their steps. left_out: path -> why it does not count."""

    kept: list[Checkpoint]
    left_out: LeftOut = field(default_factory=dict)


def select_checkpoints(
    inputs: Iterable[str | os.PathLike[str]],
    selection: Selection | None = None,
    *,
    key: str | None = None,
) -> list[Checkpoint]:
    """Open the checkpoints that `inputs` name; each glob and folder in the order of its steps.

    An open checkpoint holds names and shapes, not weights. `average_checkpoints` takes them as they are,
    without opening them again; close them afterwards (each is a context manager).

    Of a glob or a folder not everything counts. Files with a number do. An average that polyak wrote is
    left out, and so is a file without a number whose tensors equal those of one with a number (`best`,
    `last`); one warning names them, with the reason.

    Args:
        inputs: Checkpoint files and folders, globs, and folders that hold checkpoints (`run/` with
            `checkpoint-500/`, `checkpoint-1000/`, or files). Steps are numbers, so 1000 comes after
            500; where none is known the numbers in the names decide.
        selection: Which of them to take, in the order of the steps throughout; by default all.
        key: Where the tensors are, as `open_checkpoint` takes it.

    Raises:
        ArgumentError: nothing is left, a filter needs steps that are unknown, or it is unclear whether a
            file that nobody named counts.

    >>> import tempfile, pathlib, torch
    >>> from safetensors.torch import save_file
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for step in (500, 1000, 1500):
    ...     save_file({"w": torch.ones(1)}, folder / f"step-{step}.safetensors")
    >>> [checkpoint.step for checkpoint in select_checkpoints([folder], Selection(last=2))]
    [1000, 1500]

    """
    found = find_checkpoints(inputs, selection, key=key)
    if found.left_out:
        listed = "; ".join(f"{path} ({why})" for path, why in found.left_out.items())
        warn(f"Not everything there counts as a checkpoint. Left out: {listed}.")
    return found.kept


def find_checkpoints(
    inputs: Iterable[str | os.PathLike[str]],
    selection: Selection | None = None,
    *,
    key: str | None = None,
) -> Found:
    """As `select_checkpoints`, with what was left out."""
    paths = [_checked(item) for item in checked_inputs(inputs)]
    wanted: object = selection or Selection()
    if not isinstance(wanted, Selection):
        raise ArgumentError(f"selection is {wanted!r}; expected a polyak.checkpoints.Selection.")
    finder, kept = Finder(key), list[Checkpoint]()
    try:
        with garbage_kept():
            found, left_out = _counted(finder, paths)
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
    return Found(kept, left_out)


def _counted(finder: Finder, items: Sequence[str]) -> tuple[list[Checkpoint], LeftOut]:
    """What counts of each folder and glob, and of the files that were named one by one."""
    found = [finder.expand(item) for item in items]
    named = [one for group, is_named in found if is_named for one in group]
    for group in (named, *(group for group, is_named in found if not is_named)):
        take_steps_from_folders(group)
    kept_of_named, left_out = counted(named, named=True)
    groups = []
    for group, is_named in found:
        kept = [one for one in group if one in kept_of_named]
        if not is_named:
            kept, others = counted(group, named=False)
            left_out |= others
        groups.append(_ordered(kept))
    kept = without_repeats([*chain.from_iterable(groups)], left_out)
    return kept, finder.left_out | left_out


def _ordered(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """By step; those of unknown step before all others, as they are."""
    return sorted(found, key=lambda one: -1 if one.step is None else one.step)


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
        numbers = shared_numbers(found)
        if any(one.step is None for one in found) and numbers is not None:
            found = [
                one for _, one in sorted(zip(numbers, found, strict=True), key=lambda pair: pair[0])
            ]
        else:
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
