"""What the averages of a run at a constant rate are worth at each moment of the budget.

The SGD arm up to the branch and the averaging arm from there on are one run; beside it are the runs
that are annealed, in the whole budget and in half of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyak.reference_run.recipe import CONSTANT_ARMS
from polyak.reference_run.run import Run
from polyak.study.paired import Estimate, estimate, paired

ANNEALED = {
    "sgd": "annealed over the whole length",
    "cosine": "annealed over the whole length",
    "half": "annealed in half the length",
    "quarter": "annealed in a quarter of the length",
}
"""The arms that end with a small rate, and what they are called."""

BySeed = dict[int, dict[int, float]]
"""A value by seed and epoch."""
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Reached:
    """After which shares of the budget an average is as good as an annealed run is at its end.

    `shares` are those of the seeds that reach it, ascending; `step` is the share of an epoch, after each of
    which it was measured.
    """

    shares: tuple[float, ...]
    n_seeds: int
    step: float

    @property
    def n_reached(self) -> int:
        """The number of seeds that reach it."""
        return len(self.shares)

    @property
    def interval(self) -> Estimate | None:
        """The mean over the seeds, if it has a 95% interval that says something.

        All seeds reach it, they differ, and the interval lies inside the budget.
        """
        if self.n_reached < max(2, self.n_seeds):
            return None
        value = estimate(self.shares)
        half = value.half_width()
        inside = half is not None and value.mean - half >= 0 and value.mean + half <= 1
        return value if inside else None


@dataclass(frozen=True)
class Budget:
    """Validation values, by seed and epoch: of the run that is averaged, and of the annealed ones.

    `averaged` has the iterate and each average, `annealed` each annealed arm from the epoch on at which
    it leaves the others. Of finished seeds only.
    """

    epochs: int
    averaged: Mapping[str, BySeed]
    annealed: Mapping[str, BySeed]
    is_constant: bool

    @property
    def n_seeds(self) -> int:
        """The number of seeds whose arms have all finished."""
        return len(self.averaged["iterate"])

    def length(self, arm: str) -> int:
        """The epochs after which an annealed arm ends."""
        return max(max(values) for values in self.annealed[arm].values())

    def end(self, arm: str) -> dict[int, float]:
        """The last value of an annealed arm by seed."""
        return {seed: values[max(values)] for seed, values in self.annealed[arm].items()}

    def reached(self, average: str, arm: str) -> Reached:
        """The first epoch, as a share of the budget, at which `average` is at or below an arm's end."""
        ends = self.end(arm)
        first = {
            seed: next((e for e in sorted(values) if values[e] <= ends[seed]), None)
            for seed, values in self.averaged[average].items()
        }
        shares = sorted(epoch / self.epochs for epoch in first.values() if epoch is not None)
        return Reached(tuple(shares), len(first), 1 / self.epochs)

    def difference(self, average: str, epoch: int, arm: str) -> Estimate | None:
        """The average after `epoch` minus an arm's end, paired by seed; None where it does not exist."""
        ends, values = self.end(arm), self.averaged[average]
        seeds = [seed for seed in values if epoch in values[seed]]
        if not seeds:
            return None
        return paired([values[seed][epoch] for seed in seeds], [ends[seed] for seed in seeds])


def budget_of(run: Run, metric: str = "error") -> Budget | None:
    """The values of a run, or None if no averaging arm has finished."""
    arm = run.averaging_arm()
    if arm is None:
        return None
    recipe = run.recipe
    annealed = [name for name in ANNEALED if name in recipe.arms]
    done = {(final["seed"], final["arm"]) for final in run.finals()}
    seeds = {s for s, name in done if all((s, other) in done for other in (arm, *annealed))}
    averaged: dict[str, BySeed] = {}
    beside: dict[str, BySeed] = {name: {} for name in annealed}
    for record in run.records():
        if record["kind"] != "epoch" or record["seed"] not in seeds:
            continue
        seed, epoch = record["seed"], record["epoch"]
        is_trunk = record["arm"] == recipe.baseline and epoch <= recipe.branch_epoch
        if record["arm"] == arm or is_trunk:
            for kind, values in record["evaluations"].items():
                averaged.setdefault(kind, {}).setdefault(seed, {})[epoch] = values[metric]
        if record["arm"] in beside and epoch > recipe.first_epoch(record["arm"]):
            values = record["evaluations"]["iterate"]
            beside[record["arm"]].setdefault(seed, {})[epoch] = values[metric]
    if not averaged:
        return None
    is_own_run = recipe.branch_epoch == 0
    leaves_at_its_rate = (
        recipe.swa_rate == recipe.rate
        and recipe.branch_epoch <= recipe.constant_until * recipe.epochs
    )
    is_constant = arm in CONSTANT_ARMS and (is_own_run or leaves_at_its_rate)
    # The whole annealed arm was one with the averaged run up to the branch.
    whole = {
        seed: {e: v for e, v in by.items() if e > recipe.branch_epoch}
        for seed, by in beside[recipe.baseline].items()
    }
    return Budget(recipe.epochs, averaged, beside | {recipe.baseline: whole}, is_constant)


def mean_curve(by_seed: BySeed) -> tuple[Values, Values, Values, Values]:
    """Epochs, means over the seeds, lowest and highest of them."""
    epochs = sorted(set.intersection(*(set(values) for values in by_seed.values())))
    rows = np.array([[values[e] for e in epochs] for values in by_seed.values()])
    return np.array(epochs, float), rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0)
