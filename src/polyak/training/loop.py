"""The loop: every arm of every seed, epoch by epoch, each ending in a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyak.errors import NonFiniteError
from polyak.training.arm import Arm
from polyak.training.checkpoint import RunCheckpoint, read_checkpoint
from polyak.training.data import Data, load_data
from polyak.training.evaluation import final_record, validation_record
from polyak.training.folder import Journal, run_folder
from polyak.training.hardware import Hardware
from polyak.training.keeping import keep_arm, keep_averaged
from polyak.training.models import build_model
from polyak.training.recipe import Recipe
from polyak.training.run import Run

Watch = Callable[[dict[str, Any], float], None]
"""Called with each record as it is written, and the fraction of the run that is done."""


@dataclass(frozen=True)
class Unit:
    """An epoch, counted from 0, of an arm of a seed: what a run is made of."""

    seed: int
    arm: str
    epoch: int


def plan(recipe: Recipe) -> list[Unit]:
    """All epochs of a run in order; averaging arms begin at the branch.

    >>> [(u.arm, u.epoch) for u in plan(Recipe(epochs=4, seeds=1, arms=("sgd", "swa")))]
    [('sgd', 0), ('sgd', 1), ('sgd', 2), ('sgd', 3), ('swa', 3)]
    """
    return [
        Unit(seed, arm, epoch)
        for seed in range(recipe.seeds)
        for arm in recipe.arms
        for epoch in range(0 if arm == "sgd" else recipe.branch_epoch, recipe.epochs)
    ]


def train(recipe: Recipe, folder: Path, *, resume: bool = False, watch: Watch | None = None) -> Run:
    """Carry out a recipe in a folder and return the run.

    With `resume`, go on after the last checkpoint in the folder and end in the same bits as a run
    that was never interrupted. torch's random state is given back as it was.

    Raises ArgumentError for a model or data that do not fit, before there is a folder; OutputError
    for a folder that is not empty or cannot be written, UsageError where the
    run in it was begun otherwise (recipe, data, threads) or is being written, FormatError for a
    damaged checkpoint, NonFiniteError when the loss becomes NaN. What was finished is kept.
    """
    hardware = Hardware.named(recipe.device)
    data = load_data(recipe)
    devices = [hardware.device] if hardware.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        build_model(recipe, data)  # one that does not fit is refused before there is a folder
        with run_folder(folder, recipe, resume=resume):
            _Loop(recipe, data, hardware, folder, watch).run()
    return Run(folder)


class _Loop:
    def __init__(
        self, recipe: Recipe, data: Data, hardware: Hardware, folder: Path, watch: Watch | None
    ) -> None:
        self.recipe, self.data, self.hardware, self.folder = recipe, data, hardware, folder
        self.watch = watch or (lambda record, done: None)
        self.units = plan(recipe)
        self.path = folder / "checkpoints" / "latest.polyak"
        self.digest = data.digest()
        self.arm: Arm | None = None
        self.branch: dict[str, Any] | None = None
        self.done = 0

    def run(self) -> None:
        """All units that are not done yet."""
        checkpoint = self._resume()
        self.journal = Journal(
            self.folder / "metrics.jsonl", checkpoint.metrics_bytes if checkpoint else 0
        )
        try:
            for unit in self.units[self.done :]:
                self._carry_out(unit)
        finally:
            self.journal.close()

    def _resume(self) -> RunCheckpoint | None:
        checkpoint = read_checkpoint(self.path)
        if checkpoint is None:
            return None
        checkpoint.check(self.hardware.environment(), self.digest)
        self.done, self.branch = checkpoint.done, checkpoint.branch
        if checkpoint.arm is not None:
            self.arm = self._new_arm(self.units[self.done])
            self.arm.load_state_dict(checkpoint.arm)
        return checkpoint

    def _carry_out(self, unit: Unit) -> None:
        try:
            self._commit(self._train(unit))
        except NonFiniteError as error:
            raise NonFiniteError(
                f"Seed {unit.seed}, arm {unit.arm}, epoch {unit.epoch + 1}: {error} The epochs "
                "before it are kept. Lower the rate of this arm (--rate, --swa-rate, --cycle-high)."
            ) from error

    def _train(self, unit: Unit) -> list[dict[str, Any]]:
        arm = self.arm or self._begin(unit)
        loss = arm.train_epoch(unit.epoch)
        records = [self._epoch_record(arm, unit, loss)]
        if records[0]["averaged"]:
            keep_averaged(self.folder, arm, unit.epoch + 1)
        if unit.arm == "sgd" and unit.epoch + 1 == self.recipe.branch_epoch:
            self.branch = copy.deepcopy(arm.state_dict())
        self.arm = arm
        if unit.epoch + 1 == self.recipe.epochs:
            records += self._finals(arm, unit)
            keep_arm(self.folder, arm)
            self.arm = None
        return records

    def _begin(self, unit: Unit) -> Arm:
        arm = self._new_arm(unit)
        if unit.arm != "sgd" and self.branch is not None:
            arm.load_state_dict(self.branch)
            arm.take_entering_weights()
            if arm.averages["swa"].count:
                keep_averaged(self.folder, arm, unit.epoch)
        return arm

    def _new_arm(self, unit: Unit) -> Arm:
        return Arm(self.recipe, self.data, self.hardware, seed=unit.seed, name=unit.arm)

    def _commit(self, records: list[dict[str, Any]]) -> None:
        self.journal.append(records)
        self.done += 1
        RunCheckpoint(
            environment=self.hardware.environment(),
            data=self.digest,
            done=self.done,
            metrics_bytes=self.journal.length,
            arm=self.arm.state_dict() if self.arm else None,
            branch=self.branch,
        ).save(self.path)
        for record in records:
            self.watch(record, self.done / len(self.units))

    def _epoch_record(self, arm: Arm, unit: Unit, loss: float) -> dict[str, Any]:
        evaluations = {}
        for kind in arm.kinds():
            with arm.holding(kind) as model:
                evaluations[kind] = validation_record(model, self.data, self.hardware)
        step = arm.lr.last_epoch
        return {
            "kind": "epoch",
            "seed": unit.seed,
            "arm": unit.arm,
            "epoch": unit.epoch + 1,
            "step": step,
            "rate": arm.schedule(step - 1),
            "train_loss": loss,
            "evaluations": evaluations,
            "averaged": unit.arm != "sgd" and arm.schedule.averages_after(step),
        }

    def _finals(self, arm: Arm, unit: Unit) -> list[dict[str, Any]]:
        finals = []
        for kind in arm.kinds():
            with arm.holding(kind) as model:
                worth = final_record(model, self.data, self.hardware)
            finals.append(
                {"kind": "final", "seed": unit.seed, "arm": unit.arm, "weights": kind, **worth}
            )
        return finals
