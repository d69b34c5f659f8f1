"""One arm of one seed: a model that trains, its averages, its schedule, and their evaluation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyak.averaging.average import Average
from polyak.averaging.lr_schedule import LRSchedule
from polyak.averaging.recorder import Recorder
from polyak.batchnorm.update import update_bn
from polyak.errors import NonFiniteError
from polyak.maths.profile import Profile
from polyak.maths.profiles import EMA, SWA, After, Annealed, PowerEMA
from polyak.maths.schedules import (
    Constant,
    Cosine,
    CyclicLinear,
    Linear,
    Schedule,
    Warmup,
    chain,
)
from polyak.maths.text import profile_text
from polyak.reference_run.data import Augmentation, Data, permutation
from polyak.reference_run.evaluation import BATCH, CURVE_EXAMPLES, loss_of
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.models import build_model
from polyak.reference_run.ranks import Ranks, shard_momenta, sharded_like, whole
from polyak.reference_run.recipe import AVERAGING_ARMS, SHORT_ARMS, Recipe
from polyak.reference_run.recording import attached_recorder
from polyak.study.trajectory import Trajectory


class Arm:
    """A model, its optimizer and schedule, an EMA of every step, and the SWA of averaging arms.

    The EMA counts steps and the SWA captures, so each is an `Average` attached with its own timing.
    `record` is the folder of its record, where there is to be one. torch's random state (initial weights, dropout) belongs to the arm: it is seeded here, stored in
    `state_dict` and set by `load_state_dict`.
    """

    def __init__(  # noqa: PLR0913 - keyword-only
        self,
        recipe: Recipe,
        data: Data,
        hardware: Hardware,
        *,
        seed: int,
        name: str,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
        record: Path | None = None,
    ) -> None:
        self.recipe, self.data, self.hardware, self.ranks = recipe, data, hardware, ranks
        self.seed, self.name = seed, name
        torch.manual_seed(seed)
        self.model = hardware.place(build_model(recipe, data))
        self._trained = ranks.trained(self.model)
        self.steps_per_epoch = steps_per_epoch(recipe, len(data.train))
        self.optimizer = build_optimizer(recipe, self.model)
        self.schedule = arm_schedule(recipe, name, self.steps_per_epoch)
        self.lr = LRSchedule(self.optimizer, self.schedule)
        self.averages: dict[str, Average] = {}
        if name not in SHORT_ARMS:  # controls, of which only the last weights are asked
            self._attach_averages()
        if name in AVERAGING_ARMS:
            # Also of the weights with which averaging begins, as in the paper: if that is where the
            # arm leaves SGD, the schedule averages there, and this average is empty.
            self.averages["swa"] = Average(self.model, SWA())
            self.averages["swa"].attach(self.optimizer, at=self.lr)
        self.recorder: Recorder | None = None
        self._record = record
        if record is not None:
            steps = recipe.epochs * self.steps_per_epoch
            self.recorder = attached_recorder(
                recipe, self.model, self.optimizer, record, steps=steps
            )

    def _attach_averages(self) -> None:
        """Those of every step; an averaging arm has an SWA of its own."""
        profiles = step_profiles(self.recipe, self.steps_per_epoch)
        for kind in self.recipe.averages:
            if kind in profiles and not (kind == "swa" and self.name in AVERAGING_ARMS):
                self.averages[kind] = Average(self.model, profiles[kind])
                self.averages[kind].attach(self.optimizer)

    def train_epoch(self, epoch: int) -> float:
        """Train on every image once, or on the windows that are drawn; returns the mean loss.

        Raises NonFiniteError if the loss is not finite.
        """
        n, recipe = len(self.data.train), self.recipe
        augment = Augmentation.draw(self.seed, epoch, n, flips=recipe.flips, shift=recipe.shift)
        self._trained.train()
        order = permutation(self.seed, epoch, n, recipe.epoch_size)
        batches = order.split(recipe.batch_size)  # type: ignore[no-untyped-call]
        losses = torch.stack([self._step(augment, indices) for indices in batches]).double()
        sizes = [len(indices) for indices in batches]
        return self._mean_loss(self.ranks.total(losses).cpu(), sizes, epoch)

    @contextmanager
    def weights_applied(self, kind: str, *, whole: bool = True) -> Iterator[nn.Module]:
        """The model with its last weights (`iterate`) or those of an average (`ema`, `swa`, ...).

        The BatchNorm statistics of an average are updated on the training images first, or without
        `whole` on the first 1,000 of them. `wsm` is a model of its own, made from the closed record.
        """
        if kind == "iterate":
            yield self.model
            return
        if kind == "wsm":
            yield self._merged()
            return
        self.averages[kind].update_bn(self._statistics_batches(whole=whole))
        with self.averages[kind].applied():
            yield self.model

    def close_record(self) -> None:
        """Training is over: write what is not written yet."""
        if self.recorder is not None:
            self.recorder.close()

    def kinds(self) -> list[str]:
        """The weights to evaluate: the iterate, and each average that is not empty."""
        begun = self.lr.last_epoch > self.recipe.swa_epoch * self.steps_per_epoch
        return [
            "iterate",
            *(
                kind
                for kind, average in self.averages.items()
                if average.count and (kind != "swa" or begun or self.name in AVERAGING_ARMS)
            ),
        ]

    def final_kinds(self) -> list[str]:
        """At the end also what is made from the record."""
        merged = ["wsm"] if self.recorder is not None and "wsm" in self.recipe.averages else []
        return [*self.kinds(), *merged]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, as plain values and tensors."""
        return {
            "model": whole(self.model.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "lr": self.lr.state_dict(),
            "averages": {kind: whole(a.state_dict()) for kind, a in self.averages.items()},
            "record": self.recorder and whole(self.recorder.state_dict()),
            "random": self.hardware.random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; an average that is not in it starts empty."""
        self.model.load_state_dict(sharded_like(state["model"], self.model.state_dict()))
        # A copy: torch uses the momenta as they are, and would write into a state that other arms load.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        shard_momenta(self.optimizer)
        self.lr.load_state_dict(state["lr"])
        for kind, average in state["averages"].items():
            own = self.averages.get(kind)  # the SWA of an annealed arm is another one
            if own is not None and average["profile"] == profile_text(own.profile):
                own.load_state_dict(average)
        if self.recorder is not None:
            self.recorder.load_state_dict(state["record"])
        self.hardware.set_random_state(state["random"])

    def _merged(self) -> nn.Module:
        """The average of the record whose weights are those of a decay from `swa_from` on (WSM)."""
        self.ranks.first(lambda: None)  # the record of another process is complete
        begin = self.recipe.swa_epoch * self.steps_per_epoch
        profile = After(begin, Annealed.from_shape("sqrt"))
        state = Trajectory(cast("Path", self._record), cache_size=0).average(profile)
        model = copy.deepcopy(self.model)
        model.load_state_dict(state)
        update_bn(model, self._statistics_batches(whole=True))
        return model

    def _step(self, augment: Augmentation, indices: Tensor) -> Tensor:
        """One step; returns this process's part of the mean loss of the batch."""
        train, own = self.data.train, self.ranks.share(indices)
        inputs = self.hardware.inputs(augment(train.inputs[own], own))
        labels = self.hardware.labels(train.labels[own])
        self.optimizer.zero_grad()
        with self.hardware.precision():
            loss = loss_of(self._trained, inputs, labels) * (len(own) / len(indices))
        # Gradients become the mean over the processes, and should be their sum.
        (loss * self.ranks.count).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.lr.step()
        return loss.detach()

    def _mean_loss(self, losses: Tensor, sizes: list[int], epoch: int) -> float:
        mean = float(losses @ torch.tensor(sizes, dtype=torch.float64)) / sum(sizes)
        if math.isfinite(mean):
            return mean
        step = int((~torch.isfinite(losses)).nonzero()[0])
        rate = self.schedule(epoch * self.steps_per_epoch + step)
        raise NonFiniteError(
            f"The training loss is {float(losses[step])} in batch {step + 1}, at a rate of {rate:.3g}."
        )

    def _statistics_batches(self, *, whole: bool) -> Iterator[Tensor]:
        # update_bn merges the processes: equally many batches in each, none of them empty.
        inputs = self.data.train.inputs[: None if whole else CURVE_EXAMPLES]
        own = self.ranks.share(inputs)
        n = -(-len(inputs) // (BATCH * self.ranks.count))
        return map(self.hardware.inputs, own.tensor_split(n))


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """SGD, or AdamW that decays matrices only."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=recipe.rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault(decay, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
        lr=recipe.rate,
        betas=(recipe.momentum, recipe.beta2),
    )


def step_profiles(recipe: Recipe, steps: int) -> dict[str, Profile]:
    """The averages of every step, by name; an epoch has `steps` of them."""
    return {
        "ema": EMA.from_half_life(recipe.ema_half_life * steps),
        "power": PowerEMA.from_relative_std(recipe.power_std),
        "swa": After(recipe.swa_epoch * steps, SWA()),
    }


def steps_per_epoch(recipe: Recipe, n_examples: int) -> int:
    """Batches in an epoch; the last one may be smaller."""
    return -(-(recipe.epoch_size or n_examples) // recipe.batch_size)


def arm_schedule(recipe: Recipe, arm: str, steps: int) -> Schedule:
    """The schedule of an arm over the whole budget, in steps; an epoch has `steps` of them.

    sgd, for words cosine: warm-up, constant, then down to `final_ratio` of the rate, then held. half and
    quarter: the same in that part of the budget. The others follow it up to the branch; then swa, for words
    constant, keeps a constant rate and averages once an epoch (or a step) from `swa_from` on, and cyclic
    repeats cycles from high to low and averages at the end of each.

    >>> from polyak.reference_run.recipe import load_recipe
    >>> note = arm_schedule(load_recipe("note"), "cyclic", steps=1)
    >>> note.averaging_points(), round(note(113), 12)
    ((100, 110, 120, 130, 140), 0.034)
    """
    schedule = _annealed(recipe, recipe.last_epoch(arm) * steps)
    if arm in AVERAGING_ARMS:
        branch, left = recipe.branch_epoch, recipe.epochs - recipe.branch_epoch
        after = _averaging(recipe, arm, steps)
        schedule = chain((branch * steps, schedule), (left * steps, after)) if branch else after
    return Warmup(recipe.warmup_epochs * steps, schedule) if recipe.warmup_epochs else schedule


def _annealed(recipe: Recipe, budget: int) -> Schedule:
    low = recipe.rate * recipe.final_ratio
    start, end = round(recipe.constant_until * budget), round(recipe.annealed_at * budget)
    curve = Linear if recipe.annealing == "linear" else Cosine
    pieces = [
        (start, Constant(recipe.rate)),
        (end - start, curve(recipe.rate, low)),
        (budget - end, Constant(low)),
    ]
    return chain(*[(length, schedule) for length, schedule in pieces if length])


def _averaging(recipe: Recipe, arm: str, steps: int) -> Schedule:
    if arm == "cyclic":
        cycle = recipe.cycle_epochs * steps
        return CyclicLinear(high=recipe.cycle_high, low=recipe.cycle_low, cycle=cycle)
    # A cycle from a rate to the same rate is a constant that says when to average.
    every = steps if recipe.swa_average == "epoch" else 1
    averaging = CyclicLinear(high=recipe.swa_rate, low=recipe.swa_rate, cycle=every)
    before = (recipe.swa_epoch - recipe.branch_epoch) * steps
    if not before:
        return averaging
    after = (recipe.epochs - recipe.swa_epoch) * steps
    return chain((before, Constant(recipe.swa_rate)), (after, averaging))
