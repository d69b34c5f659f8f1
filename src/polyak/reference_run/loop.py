"""The training loop: every arm of every seed, epoch by epoch, each epoch ending in a checkpoint.

An arm of a seed is a leg. Legs do not depend on each other, but that all leave the SGD leg of their
seed, which keeps its state at those epochs; so they run one after the other, or side by side
(`jobs`), and end in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.average import Average
from polyak.checkpoints.writing.save import write_checkpoint
from polyak.errors import NonFiniteError, UsageError, require
from polyak.files import replacing, writing_errors
from polyak.reference_run.arm import Arm
from polyak.reference_run.data import Data, load_data
from polyak.reference_run.evaluation import evaluation_of
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.leg_checkpoint import LegCheckpoint, branch_path, leg_path
from polyak.reference_run.models import build_model
from polyak.reference_run.ranks import Ranks, joined, whole
from polyak.reference_run.recipe import AVERAGING_ARMS, SHORT_ARMS, Recipe
from polyak.reference_run.recording import begin_record, continue_record, record_folder
from polyak.reference_run.run import Run, metrics_text, run_folder, weights_path, write_origin

Watch = Callable[[dict[str, Any], float], None]
"""Called with each record as it is written, and the finished fraction of the run."""

Records = list[dict[str, Any]]


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    jobs: int = 1,
) -> Run:
    """Run a recipe in a folder and return the run.

    With `resume`, continue after the last checkpoint in the folder and end in the same bits as a run
    that was never interrupted. torch's random state is restored.

    With `jobs`, as many arms and seeds train side by side, each in a process of its own with as many
    threads as torch has here, to the same bits as one after the other. A script that asks for it needs
    Python's `if __name__ == "__main__":`.

    In processes that torchrun started (or that have a default process group), all train together, each
    on its share of every batch, and the first one writes: the folder must be one that all can read.

    Raises ArgumentError for a model or data that do not fit, before the folder is created;
    OutputError if the folder is not empty or cannot be written; UsageError if the run in it was
    started with another recipe, other data or another number of threads, is being written, or a
    process of `jobs` was killed; FormatError for a damaged checkpoint; NonFiniteError when the loss
    becomes NaN. Finished epochs are kept.
    """
    with ready(recipe, folder, resume=resume, jobs=jobs) as begin:
        return begin(watch)


@contextmanager
def ready(
    recipe: Recipe, folder: Path, *, resume: bool = False, jobs: int = 1
) -> Iterator[Callable[[Watch | None], Run]]:
    """A run that can begin: everything is checked and its folder locked. Yields what trains, as `train` does.

    Raises what `train` does before the first epoch.
    """
    require(jobs >= 1, f"jobs is {jobs}; expected 1 or more.")
    hardware = Hardware.named(recipe.device)
    data = load_data(recipe)
    n_examples = _examples_in_an_epoch(recipe, data)
    devices = [hardware.device] if hardware.device.type == "cuda" else []
    with torch.random.fork_rng(devices), joined(recipe.strategy, hardware.device) as ranks:
        _check_shares(recipe, n_examples, ranks.count)
        require(jobs == 1 or ranks.count == 1, f"jobs is {jobs}, under torchrun; expected 1.")
        build_model(recipe, data)  # refused before the folder is created if it does not fit
        with ExitStack() as stack:
            locked = run_folder(folder, recipe, resume=resume)
            ranks.first(lambda: stack.enter_context(locked))
            trainer = Trainer(recipe, data, hardware, ranks, folder)
            board = Board(trainer)
            ranks.first(lambda: write_origin(folder, trainer.environment, jobs))
            yield lambda watch: _trained(trainer, board, jobs, watch)


def _trained(trainer: Trainer, board: Board, jobs: int, watch: Watch | None) -> Run:
    board.watch = watch or board.watch
    if jobs == 1:
        for leg in board.unfinished():
            for records in trainer.run(leg):
                board.take(leg, records)
    else:
        from polyak.reference_run.side_by_side import run_side_by_side

        run_side_by_side(trainer, board, jobs)
    trainer.ranks.first(trainer.clean)
    return Run(trainer.folder)


def _examples_in_an_epoch(recipe: Recipe, data: Data) -> int:
    """Of the training data; there are as many, and a batch has no more than that."""
    what = "windows" if recipe.task == "words" else "images"
    require(
        recipe.epoch_size <= len(data.train),
        f"epoch_size is {recipe.epoch_size}, and there are {len(data.train)} training {what}. Choose at most "
        "that many.",
    )
    n = recipe.epoch_size or len(data.train)
    require(
        recipe.batch_size <= n,
        f"batch_size is {recipe.batch_size}, and there are {n} training {what}"
        f"{' in an epoch' if recipe.epoch_size else ''}. Choose at most that many.",
    )
    return n


def _check_shares(recipe: Recipe, n_examples: int, n_processes: int) -> None:
    smallest = n_examples % recipe.batch_size or recipe.batch_size
    what = "windows" if recipe.task == "words" else "images"
    require(
        smallest >= n_processes,
        f"batch_size is {recipe.batch_size}, so the last batch of {n_examples} training {what} has "
        f"{smallest}, too few for {n_processes} processes. Choose another, or fewer processes.",
    )


@dataclass(frozen=True)
class Leg:
    """An arm of a seed, from the epoch at which it leaves the SGD arm to its last."""

    seed: int
    arm: str


def legs(recipe: Recipe) -> list[Leg]:
    """All legs of a run in order."""
    return [Leg(seed, arm) for seed in recipe.all_seeds for arm in recipe.arms]


@dataclass(frozen=True)
class Unit:
    """An epoch, counted from 0, of an arm of a seed: what a run is made of."""

    seed: int
    arm: str
    epoch: int


def plan(recipe: Recipe) -> list[Unit]:
    """All epochs of a run in order; the other arms begin where they leave SGD.

    >>> short = Recipe(epochs=4, seeds=1, branch_at=0.75, arms=("sgd", "swa"))
    >>> [(u.arm, u.epoch) for u in plan(short)]
    [('sgd', 0), ('sgd', 1), ('sgd', 2), ('sgd', 3), ('swa', 3)]
    """
    return [
        Unit(leg.seed, leg.arm, epoch)
        for leg in legs(recipe)
        for epoch in range(recipe.first_epoch(leg.arm), recipe.last_epoch(leg.arm))
    ]


class Board:
    """The records of all legs, `metrics.jsonl`, and who watches."""

    def __init__(self, trainer: Trainer) -> None:
        self._ranks, self._path = trainer.ranks, trainer.folder / "metrics.jsonl"
        self.recipe = trainer.recipe
        self.watch: Watch = lambda record, done: None
        self.records = {leg: trainer.records(leg) for leg in legs(self.recipe)}
        self._n_units = len(plan(self.recipe))
        self._ranks.first(self._write)

    def epochs_done(self, leg: Leg) -> int:
        """How many epochs of its own a leg has done."""
        return sum(record["kind"] == "epoch" for record in self.records[leg])

    def unfinished(self) -> list[Leg]:
        """The legs that have epochs left."""
        recipe = self.recipe
        return [
            leg
            for leg in self.records
            if self.epochs_done(leg) < recipe.last_epoch(leg.arm) - recipe.first_epoch(leg.arm)
        ]

    def is_ready(self, leg: Leg) -> bool:
        """Whether the annealed leg has come to where this one leaves it."""
        first = self.recipe.first_epoch(leg.arm)
        baseline = self.recipe.baseline
        return self.epochs_done(Leg(leg.seed, baseline)) >= first or leg.arm == baseline

    def take(self, leg: Leg, records: Records) -> None:
        """Write the records of an epoch, and show them."""
        self.records[leg] += records
        done = sum(map(self.epochs_done, self.records)) / self._n_units

        def publish() -> None:
            self._write()
            for record in records:
                self.watch(record, done)

        self._ranks.first(publish)

    def _write(self) -> None:
        with replacing(self._path, overwrite=True) as part:
            text = metrics_text(record for leg in self.records.values() for record in leg)
            part.write_text(text, encoding="utf-8")


class Trainer:
    """Trains legs of a run in its folder, each epoch ending in a checkpoint."""

    def __init__(
        self, recipe: Recipe, data: Data, hardware: Hardware, ranks: Ranks, folder: Path
    ) -> None:
        self.recipe, self.data, self.folder = recipe, data, folder
        self.hardware, self.ranks = hardware, ranks
        self.environment = hardware.environment() | ranks.environment()
        self.digest, self._evaluation = data.digest(), evaluation_of(recipe)
        self._branches = {recipe.first_epoch(arm) for arm in recipe.arms} - {0}

    def records(self, leg: Leg) -> Records:
        """What a leg has measured so far. Raises UsageError if it cannot be resumed here."""
        found = LegCheckpoint.read(leg_path(self.folder, leg.seed, leg.arm))
        if found is None:
            return []
        found.check(self.environment, self.digest)
        return found.records

    def run(self, leg: Leg) -> Iterator[Records]:
        """Train a leg to its end; the records of each epoch, once its checkpoint is written."""
        found = LegCheckpoint.read(leg_path(self.folder, leg.seed, leg.arm))
        records = found.records if found else []
        arm = self._arm(leg, found)
        first = arm.lr.last_epoch // arm.steps_per_epoch
        for epoch in range(first, self.recipe.last_epoch(leg.arm)):
            new = self._epoch(arm, epoch)
            records += new
            self._commit(leg, arm, records, epoch + 1)
            yield new

    def clean(self) -> None:
        """Remove the states at which the legs of a finished run have left SGD."""
        for seed in self.recipe.all_seeds:
            for epoch in self._branches:
                branch_path(self.folder, seed, epoch).unlink(missing_ok=True)

    def _arm(self, leg: Leg, found: LegCheckpoint | None) -> Arm:
        first = self.recipe.first_epoch(leg.arm)
        begins = found is None
        if begins and first:
            path = branch_path(self.folder, leg.seed, first)
            found = LegCheckpoint.read(path)
            if found is None:
                raise UsageError(f"{path} is missing. Start again in another folder.")
        if begins:
            self.ranks.first(lambda: self._begin_record(leg, found))
        arm = self._new_arm(leg)
        if found is not None:
            arm.load_state_dict(found.state)
        if begins and first and arm.schedule.averages_after(arm.lr.last_epoch):
            self._keep_averaged(arm, first)  # the first step averages these
        return arm

    def _new_arm(self, leg: Leg) -> Arm:
        return Arm(
            self.recipe,
            self.data,
            self.hardware,
            seed=leg.seed,
            name=leg.arm,
            ranks=self.ranks,
            record=self._record(leg),
        )

    def _begin_record(self, leg: Leg, branch: LegCheckpoint | None) -> None:
        if (folder := self._record(leg)) is not None:
            begin_record(folder)
            if branch is not None:
                source = record_folder(self.folder, leg.seed, self.recipe.baseline)
                continue_record(folder, source, branch.state["record"])

    def _record(self, leg: Leg) -> Path | None:
        """Where an arm is recorded, if it is: a control has another length, and no average."""
        if not self.recipe.record_intervals or leg.arm in SHORT_ARMS:
            return None
        return record_folder(self.folder, leg.seed, leg.arm)

    def _epoch(self, arm: Arm, epoch: int) -> Records:
        try:
            loss = arm.train_epoch(epoch)
            records = [self._epoch_record(arm, epoch, loss)]
            if records[0]["averaged"]:
                self._keep_averaged(arm, epoch + 1)
            if epoch + 1 == self.recipe.last_epoch(arm.name):
                arm.close_record()
                records += self._finals(arm)
                self._keep_arm(arm)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"Seed {arm.seed}, arm {arm.name}, epoch {epoch + 1}: {error} The epochs "
                "before it are kept. Lower the rate of this arm (rate, swa_rate or cycle_high)."
            ) from None
        return records

    def _commit(self, leg: Leg, arm: Arm, records: Records, epochs: int) -> None:
        is_last = epochs == self.recipe.last_epoch(leg.arm)
        is_branch = leg.arm == self.recipe.baseline and epochs in self._branches
        state = {} if is_last and not is_branch else arm.state_dict()

        def write() -> None:
            if is_branch:
                branch = LegCheckpoint(self.environment, self.digest, [], state)
                branch.save(branch_path(self.folder, leg.seed, epochs))
            kept = {} if is_last else state
            checkpoint = LegCheckpoint(self.environment, self.digest, records, kept)
            checkpoint.save(leg_path(self.folder, leg.seed, leg.arm))

        self.ranks.first(write)

    def _keep_averaged(self, arm: Arm, epoch: int) -> None:
        """Keep the weights that were averaged after `epoch` epochs."""
        if arm.seed == self.recipe.first_seed:
            self._keep_iterate(arm, f"epoch-{epoch:03d}")

    def _keep_arm(self, arm: Arm) -> None:
        """Keep an arm's last iterate and averages; the first SWA is the run's `swa.safetensors`."""
        if arm.seed != self.recipe.first_seed:
            return
        self._keep_iterate(arm, "iterate")
        for kind, average in arm.averages.items():
            self._save(average, weights_path(self.folder, arm.seed, arm.name, kind))
        if arm.name == next((name for name in arm.recipe.arms if name in AVERAGING_ARMS), None):
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

    def _epoch_record(self, arm: Arm, epoch: int, loss: float) -> dict[str, Any]:
        evaluations = {}
        for kind in arm.kinds():
            with arm.weights_applied(kind, whole=False) as model:
                evaluations[kind] = self._evaluation.validation(model, self.data, self.hardware)
        step = arm.lr.last_epoch
        return {
            "kind": "epoch",
            "seed": arm.seed,
            "arm": arm.name,
            "epoch": epoch + 1,
            "step": step,
            "rate": arm.schedule(step - 1),
            "train_loss": loss,
            "evaluations": evaluations,
            "averaged": arm.name in AVERAGING_ARMS and arm.schedule.averages_after(step),
        }

    def _finals(self, arm: Arm) -> Records:
        finals = []
        for kind in arm.final_kinds():
            with arm.weights_applied(kind) as model:
                metrics = self._evaluation.final(model, self.data, self.hardware)
            finals.append(
                {"kind": "final", "seed": arm.seed, "arm": arm.name, "weights": kind, **metrics}
            )
        return finals


def _write_iterate(path: Path, state: dict[str, Tensor]) -> None:
    with writing_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, state, overwrite=True)
