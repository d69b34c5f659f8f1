"""What `evidence.py` trains and measures: jobs, each a function of plain values, run in a process.

A job gives records: dictionaries that go to the results file as they are.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from evidence_afterwards import afterwards

from polyak import SWA, Average
from polyak.errors import StaleStatistics
from polyak.reference_run.arm import Arm
from polyak.reference_run.data import load_data
from polyak.reference_run.evaluation import final_record, validation_record
from polyak.reference_run.flatness import LOSS, N_RAYS, REACH, image_surface
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.recipe import Recipe, load_recipe
from polyak.study.landscape import along_rays, along_segments

REGIMES = {"weak": "taught", "strong": "annealing-wins"}
"""Flips alone, against flips, shifts by a pixel and BatchNorm."""

_SURFACE_IMAGES = 1000


@dataclass(frozen=True)
class Job:
    """Something to train: `name` says which function of this file does it."""

    name: str
    regime: str
    epochs: int
    seed: int
    rate: float
    rates: tuple[tuple[str, tuple[float, ...]], ...] = ()  # of the averaging arms, to try or to use

    @property
    def key(self) -> str:
        """What the results file knows the job by."""
        rates = ";".join(f"{arm}={','.join(f'{r:g}' for r in tried)}" for arm, tried in self.rates)
        return f"{self.name}:{self.regime}:{self.epochs}:{self.seed}:{self.rate:g}:{rates}"


def start_worker() -> None:
    """One thread a process: two processes fill two cores, and results do not depend on them."""
    torch.set_num_threads(1)


def carry_out(job: Job) -> tuple[Job, list[dict[str, Any]]]:
    """The records of a job, each with its key and what it trained."""
    works = {"trial": _trial, "branches": _branches, "final": _final, "afterwards": afterwards}
    found = works[job.name](job)
    common = {"job": job.key, "regime": job.regime, "epochs": job.epochs, "seed": job.seed}
    return job, [{**common, **record} for record in found]


def _trial(job: Job) -> list[dict[str, Any]]:
    """SGD at one rate: its validation figures."""
    arm = _arm(job, "sgd")
    _train(arm, 0, job.epochs)
    metrics = validation_record(arm.model, arm.data, arm.hardware)
    return [{"kind": "trial", "arm": "sgd", "rate": job.rate, **metrics}]


def _branches(job: Job) -> list[dict[str, Any]]:
    """From one SGD run every averaging arm at each of its rates: the SWA's validation figures."""
    state = _branch_state(job)
    records = []
    for name, rates in job.rates:
        for rate in rates:
            arm = _branched(job, name, rate, state)
            _train(arm, arm.recipe.branch_epoch, job.epochs)
            with arm.weights_applied("swa") as model:
                metrics = validation_record(model, arm.data, arm.hardware)
            records.append({"kind": "trial", "arm": name, "rate": rate, **metrics})
    return records


def _final(job: Job) -> list[dict[str, Any]]:
    """Every arm at its tuned rate: test figures, and the surface around the first averaging arm."""
    sgd = _arm(job, "sgd")
    branch = sgd.recipe.branch_epoch
    _train(sgd, 0, branch)
    state = copy.deepcopy(sgd.state_dict())
    _train(sgd, branch, job.epochs)
    records = _arm_records(sgd, "sgd")
    for index, (name, (rate,)) in enumerate(job.rates):
        arm = _branched(job, name, rate, state)
        if index:
            _train(arm, branch, job.epochs)
            records += _arm_records(arm, name)
        else:
            records += _watched(arm, sgd)
    return records


def _watched(arm: Arm, sgd: Arm) -> list[dict[str, Any]]:
    """Train an averaging arm with further averages beside it, and measure around it."""
    each_step = Average(arm.model, SWA())
    averaged_statistics = (
        Average(arm.model, SWA(), average_buffers=["*running_*"])
        if (arm.recipe.batchnorm)
        else None
    )
    path = [_weights(arm)]
    with each_step.attach(arm.optimizer, every=1):
        for epoch in range(arm.recipe.branch_epoch, arm.recipe.epochs):
            if averaged_statistics:
                averaged_statistics.update()
            arm.train_epoch(epoch)
            path.append(_weights(arm))
    records = []
    if averaged_statistics:
        averaged_statistics.update()
        records += [_stale(arm, arm.averages["swa"], "swa-newest-statistics")]
        records += [_stale(arm, averaged_statistics, "swa-averaged-statistics")]
    records += _arm_records(arm, arm.name)
    arm.averages["swa-each-step"] = each_step
    with arm.weights_applied("swa-each-step") as model:
        records.append(_record(arm, model, arm.name, "swa-each-step"))
    return [*records, _surroundings(arm, sgd, path)]


def _arm_records(arm: Arm, name: str) -> list[dict[str, Any]]:
    records = []
    for kind in arm.kinds():
        with arm.weights_applied(kind) as model:
            records.append(_record(arm, model, name, kind))
    return records


def _stale(arm: Arm, average: Average, kind: str) -> dict[str, Any]:
    with warnings.catch_warnings(), average.applied() as model:
        warnings.simplefilter("ignore", StaleStatistics)  # what they cost is the question
        return _record(arm, model, arm.name, kind)


def _record(arm: Arm, model: torch.nn.Module, name: str, kind: str) -> dict[str, Any]:
    metrics = final_record(model, arm.data, arm.hardware)
    del metrics["reliability"]
    return {"kind": "final", "arm": name, "weights": kind, **metrics}


def _surroundings(arm: Arm, sgd: Arm, path: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Mean rise of the training loss along rays, and the highest barrier between checkpoints."""
    average = arm.averages["swa"].averaged_tensors()
    named = {"sgd": _weights(sgd), "iterate": path[-1], "swa": average}
    with image_surface(arm.model, arm.data, _SURFACE_IMAGES, arm.hardware) as surface:
        points = {name: surface.vector(weights) for name, weights in named.items()}
        reach = REACH * float(points["sgd"].norm())
        rises = {}
        for name, point in points.items():
            values = along_rays(surface, point, [0, reach / 2, reach], n_rays=N_RAYS).values[LOSS]
            rises[name] = (values - values[:, :1]).mean(axis=0)[1:].tolist()
        segments = along_segments(surface, [surface.vector(w) for w in path], n_inner=3)
    barriers = segments.barriers(LOSS)
    ends = np.append(segments.values[LOSS][:, 0], segments.values[LOSS][-1, -1])
    return {
        "kind": "surface", "arm": arm.name, "reach": reach, "rises": rises,
        "barrier": float(barriers.max()), "loss_at_checkpoints": float(ends.mean()),
    }  # fmt: skip


def _branch_state(job: Job) -> dict[str, Any]:
    sgd = _arm(job, "sgd")
    _train(sgd, 0, sgd.recipe.branch_epoch)
    return copy.deepcopy(sgd.state_dict())


def _branched(job: Job, name: str, rate: float, state: dict[str, Any]) -> Arm:
    arm = _arm(job, name, rate)
    arm.load_state_dict(copy.deepcopy(state))
    return arm


def _arm(job: Job, name: str, rate: float | None = None) -> Arm:
    recipe = _recipe(job, name, rate)
    return Arm(recipe, load_data(recipe), Hardware.named("cpu"), seed=job.seed, name=name)


def _recipe(job: Job, name: str, rate: float | None) -> Recipe:
    fields: dict[str, Any] = {"epochs": job.epochs, "rate": job.rate, "device": "cpu"}
    if rate is not None and name == "swa":
        fields["swa_rate"] = rate
    if rate is not None and name == "cyclic":
        fields |= {"cycle_high": rate, "cycle_low": rate / 10}
    return load_recipe(REGIMES[job.regime], fields)


def _train(arm: Arm, first: int, last: int) -> None:
    for epoch in range(first, last):
        arm.train_epoch(epoch)


def _weights(arm: Arm) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in arm.model.state_dict().items()}
