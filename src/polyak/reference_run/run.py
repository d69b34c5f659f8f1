"""The folder of a run: read through `Run`, written by one process at a time.

::

    recipe.toml                                the resolved recipe
    metrics.jsonl                              a line for each epoch of each arm and each final result
    swa.safetensors                            the averaged model, with its provenance
    landscape.json                             the surface around the solutions, once it was measured
    run.json                                   when it was started, threads, processes, versions
    weights/seed-0/sgd-iterate.safetensors     the last iterate of an arm (the first seed only)
    weights/seed-0/sgd-average-ema.safetensors an arm's EMA
    weights/seed-0/swa-average-swa.safetensors the SWA of an averaging arm
    weights/seed-0/swa-iterate-epoch-023.safetensors  each of the iterates that were averaged
    record/seed-0/<arm>/                       the means of the arm's intervals, of every seed
    checkpoints/                               what a resumed run continues from
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak.checkpoints.reading.folders import is_record
from polyak.errors import ArgumentError, FormatError, OutputError, UsageError
from polyak.files import replacing, take_lock, writing_errors
from polyak.reference_run.data import Data, load_data
from polyak.reference_run.models import build_model
from polyak.reference_run.recipe import AVERAGES, AVERAGING_ARMS, Recipe, load_recipe
from polyak.reference_run.recording import record_folder
from polyak.study.trajectory import Trajectory
from polyak.version import __version__

_SUFFIX_OF = {"iterate": "-iterate"} | {kind: f"-average-{kind}" for kind in AVERAGES}


class Run:
    """A run folder: its recipe, records and weights, and the data and model it used.

    Raises ArgumentError if the folder is not a run, FormatError if one of its files is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._records: list[dict[str, Any]] = []
        self._records_of: tuple[int, int] | None = None
        if not (self.folder / "recipe.toml").is_file():
            raise ArgumentError(
                f"{self.folder} is not a run: it has no recipe.toml. Pass a folder that "
                "`polyak train` wrote."
            )

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe(str(self.folder / "recipe.toml"))

    def records(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl` in order, without a last line that is cut short.

        The file is read again only after it has changed.
        """
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        found = path.stat()
        version = (found.st_size, found.st_mtime_ns)
        if version != self._records_of:
            self._records, self._records_of = _read_records(path), version
        return list(self._records)

    def epochs(self, *, seed: int | None = None, arm: str | None = None) -> list[dict[str, Any]]:
        """The records of one seed's epochs (the first by default), of one arm or all."""
        seed = self.recipe.first_seed if seed is None else seed
        return [
            record
            for record in self.records()
            if record["kind"] == "epoch" and record["seed"] == seed and arm in (None, record["arm"])
        ]

    def finals(self) -> list[dict[str, Any]]:
        """The final test results, one for each seed, arm, and kind of weights."""
        return [record for record in self.records() if record["kind"] == "final"]

    def is_finished(self) -> bool:
        """Whether every arm of every seed has its final results."""
        done = {(record["seed"], record["arm"]) for record in self.finals()}
        return len(done) == self.recipe.seeds * len(self.recipe.arms)

    def has_record(self, seed: int, arm: str) -> bool:
        """Whether an arm was recorded."""
        return is_record(record_folder(self.folder, seed, arm))

    def trajectory(self, seed: int, arm: str) -> Trajectory:
        """The record of an arm, from its seed's first step on.

        Raises ArgumentError if the run did not record.
        """
        return Trajectory(record_folder(self.folder, seed, arm), cache_size=0)

    def averaging_arm(self) -> str | None:
        """The arm whose average is compared: at a constant rate, else cyclic; None if neither has finished."""
        done = {
            record["arm"] for record in self.finals() if record["seed"] == self.recipe.first_seed
        }
        return next((arm for arm in self.recipe.arms if arm in done & {*AVERAGING_ARMS}), None)

    def averaged_epochs(self, arm: str) -> list[int]:
        """The epochs after which the weights of an arm's SWA were taken and kept."""
        names = (self.folder / "weights" / f"seed-{self.recipe.first_seed}").glob(
            f"{arm}-iterate-epoch-*.safetensors"
        )
        return sorted(int(path.stem.rpartition("-")[2]) for path in names)

    def weights(self, seed: int, arm: str, name: str) -> dict[str, Tensor]:
        """A state dict: `name` is iterate, swa, ema, or epoch-031 for averaged weights."""
        path = weights_path(self.folder, seed, arm, name)
        if not path.is_file():
            raise ArgumentError(
                f"{path} does not exist. Weights are kept for the first seed, of arms that have "
                "finished."
            )
        return _loaded_weights(path)

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """`run.json`: when and how the run was started; empty if there is none."""
        path = self.folder / "run.json"
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FormatError(
                f"{path} is damaged: {error}. Delete it; it is needed by no one."
            ) from error

    @functools.cached_property
    def data(self) -> Data:
        """The data the run was trained and tested on."""
        return load_data(self.recipe)

    def model(self) -> nn.Module:
        """The model of the run with new weights, ready for `load_state_dict`."""
        return build_model(self.recipe, self.data)

    def averaged_model(self) -> nn.Module:
        """The model with the weights of `swa.safetensors`, in evaluation mode."""
        path = self.folder / "swa.safetensors"
        if not path.is_file():
            raise ArgumentError(
                f"{path} does not exist: no averaging arm of this run has finished."
            )
        model = self.model()
        model.load_state_dict(_loaded_weights(path))
        return model.eval()


def _loaded_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged: {error}. Train again in another folder.") from error


def weights_path(folder: Path, seed: int, arm: str, name: str) -> Path:
    """The file of some weights in a run folder."""
    suffix = _SUFFIX_OF.get(name, f"-iterate-{name}")
    return folder / "weights" / f"seed-{seed}" / f"{arm}{suffix}.safetensors"


def _read_records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last part is empty or cut short
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise FormatError(f"{path} is damaged: {error}.") from error


@contextmanager
def run_folder(folder: Path, recipe: Recipe, *, resume: bool) -> Iterator[Path]:
    """Lock a run folder for writing: a new one, or with `resume` that of the same recipe.

    Raises OutputError if it exists already or cannot be written, UsageError if another run is
    writing to it, or if it holds a run of another recipe.
    """
    with writing_errors(folder):
        is_taken = folder.exists() and any(folder.iterdir())
    if is_taken and not resume:
        holds_run = (folder / "recipe.toml").exists()
        how = "Pass resume=True to continue the run in it, or choose" if holds_run else "Choose"
        raise OutputError(f"{folder} is not empty. {how} another folder.")
    if resume:
        _check_same_recipe(folder, recipe)
    with writing_errors(folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = (folder / "checkpoints" / "lock").open("w")
    with lock:
        take_lock(lock.fileno(), lock.name, folder)
        for left in folder.rglob(".*.part"):  # by a writer that was killed
            left.unlink()
        if not (folder / "recipe.toml").exists():
            with replacing(folder / "recipe.toml") as part:
                part.write_text(recipe.to_toml(), encoding="utf-8")
        yield folder


def write_origin(folder: Path, environment: Mapping[str, str], jobs: int) -> None:
    """Write `run.json` into a run folder, unless it is there."""
    path = folder / "run.json"
    if path.exists():
        return
    started = datetime.datetime.now(tz=datetime.UTC).astimezone().isoformat(timespec="seconds")
    known = {"started": started, "polyak": __version__, "jobs": str(jobs), **environment}
    with replacing(path) as part:
        part.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def recorded_threads(folder: Path) -> int | None:
    """The threads with which the run in a folder was started, or None."""
    if not (folder / "recipe.toml").is_file():
        return None
    threads = str(Run(folder).origin.get("threads", ""))
    return int(threads) if threads.isdigit() else None


def metrics_text(records: Iterable[dict[str, Any]]) -> str:
    """Records as the lines of `metrics.jsonl`."""
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    path = folder / "recipe.toml"
    if not path.exists():
        left = [p.name for p in folder.iterdir()] if folder.exists() else []
        # A run that was killed before it wrote its recipe leaves only these.
        if [name for name in left if name != "checkpoints" and not name.endswith(".part")]:
            raise UsageError(
                f"{folder} does not hold a run: it has no recipe.toml. Check the folder."
            )
        return
    if differences := recipe.differences(load_recipe(str(path))):
        raise UsageError(
            f"The recipe differs from that of the run in {folder}:\n  "
            + "\n  ".join(differences)
            + "\nResume it with the same recipe, or start again in another folder."
        )
