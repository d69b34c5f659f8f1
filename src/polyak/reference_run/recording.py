"""The record of an arm: the means of its intervals, from the first step of its seed on.

An averaging arm continues what the SGD arm has recorded up to the branch: its folder begins with links
to those files, which nobody changes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from polyak.averaging.recorder import Recorder
from polyak.checkpoints.intervals import scan_intervals
from polyak.files import replacing, writing_errors
from polyak.reference_run.recipe import Recipe


def record_folder(folder: Path, seed: int, arm: str) -> Path:
    """Where the record of an arm is, in the folder of a run."""
    return folder / "record" / f"seed-{seed}" / arm


def attached_recorder(
    recipe: Recipe, model: Module, optimizer: Optimizer, folder: Path, *, steps: int
) -> Recorder:
    """Records from now on; `steps` are those of the whole budget, each in one interval at most."""
    recorder = Recorder(model, folder, total=steps, intervals=min(recipe.record_intervals, steps))
    recorder.attach(optimizer)
    return recorder


def begin_record(folder: Path) -> None:
    """An arm begins: what a killed run has left of it goes."""
    with writing_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)


def continue_record(folder: Path, source: Path, state: dict[str, Any]) -> None:
    """Begin a record with the files of another one that a recorder's state counts as written."""
    with writing_errors(folder):
        folder.mkdir(parents=True)
        for one in scan_intervals(source).intervals:
            if one.end <= state["start"]:
                _link(one.path, folder / one.path.name)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without links
        with replacing(target) as part:
            shutil.copyfile(source, part)
