"""The training loop: every arm of every seed, epoch by epoch, each epoch ending in a checkpoint.

A checkpoint is one file, replaced as a whole: a line that says what it is, the SHA-256 of the rest,
and the rest as `torch.save` writes it, read back with `weights_only=True`. torch does not notice a
flipped bit in a tensor; the checksum does.
"""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.average import Average
from polyak.checkpoints.writing.save import write_checkpoint
from polyak.errors import FormatError, NonFiniteError, UsageError, require
from polyak.files import replacing, writing_errors
from polyak.reference_run.arm import Arm, final_record, validation_record
from polyak.reference_run.data import Data, load_data
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.models import build_model
from polyak.reference_run.ranks import Ranks, joined, whole
from polyak.reference_run.recipe import Recipe
from polyak.reference_run.recording import begin_record, continue_record, record_folder
from polyak.reference_run.run import MetricsLog, Run, run_folder, weights_path

_MAGIC = b"polyak run checkpoint 2\n"
_KEPT_SEED = 0  # the one whose weights are kept

Watch = Callable[[dict[str, Any], float], None]
"""Called with each record as it is written, and the finished fraction of the run."""


def train(recipe: Recipe, folder: Path, *, resume: bool = False, watch: Watch | None = None) -> Run:
    """Run a recipe in a folder and return the run.

    With `resume`, continue after the last checkpoint in the folder and end in the same bits as a run
    that was never interrupted. torch's random state is restored.

    In processes that torchrun started (or that have a default process group), all train together, each
    on its share of every batch, and the first one writes: the folder must be one that all can read.

    Raises ArgumentError for a model or data that do not fit, before the folder is created;
    OutputError if the folder is not empty or cannot be written; UsageError if the run in it was
    started with another recipe, other data or another number of threads, or is being written;
    FormatError for a damaged checkpoint; NonFiniteError when the loss becomes NaN. Finished epochs
    are kept.
    """
    hardware = Hardware.named(recipe.device)
    data = load_data(recipe)
    require(
        recipe.batch_size <= len(data.train),
        f"batch_size is {recipe.batch_size}, and there are {len(data.train)} training images. Choose at "
        "most that many.",
    )
    devices = [hardware.device] if hardware.device.type == "cuda" else []
    with torch.random.fork_rng(devices), joined(recipe.strategy, hardware.device) as ranks:
        _check_shares(recipe, len(data.train), ranks.count)
        build_model(recipe, data)  # refused before the folder is created if it does not fit
        with ExitStack() as stack:
            locked = run_folder(folder, recipe, resume=resume)
            ranks.first(lambda: stack.enter_context(locked))
            _Loop(recipe, data, hardware, ranks, folder, watch).run()
    return Run(folder)


def _check_shares(recipe: Recipe, n_images: int, n_processes: int) -> None:
    smallest = n_images % recipe.batch_size or recipe.batch_size
    require(
        smallest >= n_processes,
        f"batch_size is {recipe.batch_size}, so the last batch of {n_images} training images has "
        f"{smallest}, too few for {n_processes} processes. Choose another, or fewer processes.",
    )


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


class _Loop:
    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        hardware: Hardware,
        ranks: Ranks,
        folder: Path,
        watch: Watch | None,
    ) -> None:
        self.recipe, self.data, self.folder = recipe, data, folder
        self.hardware, self.ranks = hardware, ranks
        self.environment = hardware.environment() | ranks.environment()
        self.watch = watch or (lambda record, done: None)
        self.units = plan(recipe)
        self.path = folder / "checkpoints" / "latest.polyak"
        self.digest = data.digest()
        self.log: MetricsLog  # of the first process
        self.arm: Arm | None = None
        self.branch: dict[str, Any] | None = None
        self.done = 0

    def run(self) -> None:
        """Train all units that are not done yet."""
        checkpoint = self._resume()
        length = checkpoint.metrics_bytes if checkpoint else 0
        with ExitStack() as stack:
            self.ranks.first(lambda: self._open_log(length, stack))
            for unit in self.units[self.done :]:
                self._run_unit(unit)

    def _open_log(self, length: int, stack: ExitStack) -> None:
        self.log = MetricsLog(self.folder / "metrics.jsonl", length)
        stack.callback(self.log.close)

    def _resume(self) -> RunCheckpoint | None:
        checkpoint = read_checkpoint(self.path)
        if checkpoint is None:
            return None
        checkpoint.check(self.environment, self.digest)
        self.done, self.branch = checkpoint.done, checkpoint.branch
        if checkpoint.arm is not None:
            self.arm = self._new_arm(self.units[self.done])
            self.arm.load_state_dict(checkpoint.arm)
        return checkpoint

    def _run_unit(self, unit: Unit) -> None:
        try:
            self._commit(self._train(unit))
        except NonFiniteError as error:
            raise NonFiniteError(
                f"Seed {unit.seed}, arm {unit.arm}, epoch {unit.epoch + 1}: {error} The epochs "
                "before it are kept. Lower the rate of this arm (rate, swa_rate or cycle_high)."
            ) from None

    def _train(self, unit: Unit) -> list[dict[str, Any]]:
        arm = self.arm or self._begin(unit)
        loss = arm.train_epoch(unit.epoch)
        records = [self._epoch_record(arm, unit, loss)]
        if records[0]["averaged"]:
            self._keep_averaged(arm, unit.epoch + 1)
        if unit.arm == "sgd" and unit.epoch + 1 == self.recipe.branch_epoch:
            self.branch = copy.deepcopy(arm.state_dict())
        self.arm = arm
        if unit.epoch + 1 == self.recipe.epochs:
            arm.close_record()
            records += self._finals(arm, unit)
            self._keep_arm(arm)
            self.arm = None
        return records

    def _begin(self, unit: Unit) -> Arm:
        self.ranks.first(lambda: self._begin_record(unit))
        arm = self._new_arm(unit)
        if unit.arm != "sgd" and self.branch is not None:
            arm.load_state_dict(self.branch)
            if arm.schedule.averages_after(arm.lr.last_epoch):  # the first step averages these
                self._keep_averaged(arm, unit.epoch)
        return arm

    def _begin_record(self, unit: Unit) -> None:
        if (folder := self._record(unit)) is not None:
            begin_record(folder)
            if unit.arm != "sgd" and self.branch is not None:
                source = record_folder(self.folder, unit.seed, "sgd")
                continue_record(folder, source, self.branch["record"])

    def _record(self, unit: Unit) -> Path | None:
        """Where an arm is recorded, if it is."""
        if not self.recipe.record_intervals:
            return None
        return record_folder(self.folder, unit.seed, unit.arm)

    def _new_arm(self, unit: Unit) -> Arm:
        return Arm(
            self.recipe,
            self.data,
            self.hardware,
            seed=unit.seed,
            name=unit.arm,
            ranks=self.ranks,
            record=self._record(unit),
        )

    def _commit(self, records: list[dict[str, Any]]) -> None:
        self.done += 1
        state = self.arm.state_dict() if self.arm else None
        self.ranks.first(lambda: self._write(records, state))

    def _write(self, records: list[dict[str, Any]], arm: dict[str, Any] | None) -> None:
        self.log.append(records)
        RunCheckpoint(
            environment=self.environment,
            data=self.digest,
            done=self.done,
            metrics_bytes=self.log.length,
            arm=arm,
            branch=self.branch,
        ).save(self.path)
        for record in records:
            self.watch(record, self.done / len(self.units))

    def _keep_averaged(self, arm: Arm, epoch: int) -> None:
        """Keep the weights that were averaged after `epoch` epochs."""
        if arm.seed == _KEPT_SEED:
            self._keep_iterate(arm, f"epoch-{epoch:03d}")

    def _keep_arm(self, arm: Arm) -> None:
        """Keep an arm's last iterate and averages; the first SWA is the run's `swa.safetensors`."""
        if arm.seed != _KEPT_SEED:
            return
        self._keep_iterate(arm, "iterate")
        for kind, average in arm.averages.items():
            self._save(average, weights_path(self.folder, arm.seed, arm.name, kind))
        if arm.name == next((name for name in arm.recipe.arms if name != "sgd"), None):
            self._save(arm.averages["swa"], self.folder / "swa.safetensors")

    def _keep_iterate(self, arm: Arm, name: str) -> None:
        path, state = (
            weights_path(self.folder, arm.seed, arm.name, name),
            whole(arm.model.state_dict()),
        )
        self.ranks.first(lambda: _write_iterate(path, state))

    def _save(self, average: Average, path: Path) -> None:
        if self.ranks.is_sharded:  # each process writes its part
            average.save(path, overwrite=True)
        else:
            self.ranks.first(lambda: average.save(path, overwrite=True))

    def _epoch_record(self, arm: Arm, unit: Unit, loss: float) -> dict[str, Any]:
        evaluations = {}
        for kind in arm.kinds():
            with arm.weights_applied(kind) as model:
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
            with arm.weights_applied(kind) as model:
                metrics = final_record(model, self.data, self.hardware)
            finals.append(
                {"kind": "final", "seed": unit.seed, "arm": unit.arm, "weights": kind, **metrics}
            )
        return finals


@dataclass(frozen=True)
class RunCheckpoint:
    """A run after `done` of its units.

    `metrics_bytes` is the length of `metrics.jsonl` at that time, `arm` the state of the arm in
    progress (None between arms), `branch` the state at which the averaging arms leave SGD.
    """

    environment: dict[str, str]
    data: str
    done: int
    metrics_bytes: int
    arm: dict[str, Any] | None
    branch: dict[str, Any] | None

    def save(self, path: Path) -> None:
        """Replace the file at `path`, or leave it as it was and raise OutputError."""
        buffer = io.BytesIO()
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, buffer)
        content = buffer.getvalue()
        with replacing(path, overwrite=True) as part:
            part.write_bytes(_MAGIC + hashlib.sha256(content).digest() + content)

    def check(self, environment: dict[str, str], data: str) -> None:
        """Raise UsageError if a run resumed here would not end in the same bits."""
        changed = [
            f"{name}: {self.environment.get(name)} then, {environment[name]} now"
            for name in environment
            if self.environment.get(name) != environment[name]
        ]
        if changed:
            raise UsageError(
                "Cannot resume here: the result would not be bit-for-bit the same ("
                + "; ".join(changed)
                + "). Resume as the run was started (OMP_NUM_THREADS sets the threads), or start "
                "again in another folder."
            )
        if self.data != data:
            raise UsageError(
                "The data is not what this run began with. Resume with the same data, or start "
                "again in another folder."
            )


def read_checkpoint(path: Path) -> RunCheckpoint | None:
    """The checkpoint at `path`, or None if there is none yet.

    Raises FormatError for a file that is damaged or something else.
    """
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from error
    if not content.startswith(_MAGIC):
        raise FormatError(
            f"{path} is not a checkpoint of this version of polyak: it begins with "
            f"{content[:24]!r}. Start again in another folder."
        )
    digest, body = content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
    if hashlib.sha256(body).digest() != digest:
        raise FormatError(
            f"{path} is damaged: the checksum of its {len(content)} bytes does not match. The "
            "metrics and weights in the run's folder are intact; start again in another folder."
        )
    try:
        return RunCheckpoint(**torch.load(io.BytesIO(body), weights_only=True))
    except (RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise FormatError(f"{path} cannot be read: {error}.") from error


def _write_iterate(path: Path, state: dict[str, Tensor]) -> None:
    with writing_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, state, overwrite=True)
