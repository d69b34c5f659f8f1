"""One arm of one seed: a model that trains, its averages, its schedule, and their evaluation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polyak.averaging.average import Average
from polyak.averaging.lr_schedule import LRSchedule
from polyak.averaging.recorder import Recorder
from polyak.errors import NonFiniteError
from polyak.maths.profiles import EMA, SWA
from polyak.maths.schedules import (
    Constant,
    Cosine,
    CyclicLinear,
    Linear,
    Schedule,
    Warmup,
    chain,
)
from polyak.reference_run.data import Augmentation, Data, Split, permutation
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.models import build_model
from polyak.reference_run.ranks import Ranks, shard_momenta, sharded_like, whole
from polyak.reference_run.recipe import AVERAGING_ARMS, Recipe
from polyak.reference_run.recording import attached_recorder
from polyak.study.metrics import best_temperature, error, nll, reliability
from polyak.tensors.modes import restored_modes

_BATCH = 250  # images without gradients: a batch stays in the cache
CURVE_IMAGES = 1000  # the first training images: enough for the statistics of a point of a curve


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
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        self.schedule = arm_schedule(recipe, name, self.steps_per_epoch)
        self.lr = LRSchedule(self.optimizer, self.schedule)
        self.averages: dict[str, Average] = {}
        if name != "half":  # a control, of which only the last weights are asked
            self.averages["ema"] = Average(self.model, self._ema())
            self.averages["ema"].attach(self.optimizer)
        if name in AVERAGING_ARMS:
            # Also of the weights with which averaging begins, as in the paper: if that is where the
            # arm leaves SGD, the schedule averages there, and this average is empty.
            self.averages["swa"] = Average(self.model, SWA())
            self.averages["swa"].attach(self.optimizer, at=self.lr)
        self.recorder: Recorder | None = None
        if record is not None:
            steps = recipe.epochs * self.steps_per_epoch
            self.recorder = attached_recorder(
                recipe, self.model, self.optimizer, record, steps=steps
            )

    def train_epoch(self, epoch: int) -> float:
        """Train on every image once; returns the mean loss.

        Raises NonFiniteError if the loss is not finite.
        """
        n, recipe = len(self.data.train), self.recipe
        augment = Augmentation.draw(self.seed, epoch, n, flips=recipe.flips, shift=recipe.shift)
        self._trained.train()
        batches = permutation(self.seed, epoch, n).split(recipe.batch_size)  # type: ignore[no-untyped-call]
        losses = torch.stack([self._step(augment, indices) for indices in batches]).double()
        sizes = [len(indices) for indices in batches]
        return self._mean_loss(self.ranks.total(losses).cpu(), sizes, epoch)

    @contextmanager
    def weights_applied(self, kind: str, *, whole: bool = True) -> Iterator[nn.Module]:
        """The model with its last weights (`iterate`) or those of an average (`ema`, `swa`).

        The BatchNorm statistics of an average are updated on the training images first, or without
        `whole` on the first 1,000 of them.
        """
        if kind == "iterate":
            yield self.model
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
        return ["iterate", *(kind for kind, average in self.averages.items() if average.count)]

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
            if kind in self.averages:
                self.averages[kind].load_state_dict(average)
        if self.recorder is not None:
            self.recorder.load_state_dict(state["record"])
        self.hardware.set_random_state(state["random"])

    def _ema(self) -> EMA:
        return EMA.from_half_life(self.recipe.ema_half_life * self.steps_per_epoch)

    def _step(self, augment: Augmentation, indices: Tensor) -> Tensor:
        """One step; returns this process's part of the mean loss of the batch."""
        train, own = self.data.train, self.ranks.share(indices)
        images = self.hardware.images(augment(train.images[own], own))
        labels = train.labels[own].to(self.hardware.device)
        self.optimizer.zero_grad()
        with self.hardware.precision():
            loss = cross_entropy(self._trained(images), labels) * (len(own) / len(indices))
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
        images = self.data.train.images[: None if whole else CURVE_IMAGES]
        own = self.ranks.share(images)
        n = -(-len(images) // (_BATCH * self.ranks.count))
        return map(self.hardware.images, own.tensor_split(n))


def steps_per_epoch(recipe: Recipe, n_images: int) -> int:
    """Batches in a pass over the images; the last one may be smaller."""
    return -(-n_images // recipe.batch_size)


def arm_schedule(recipe: Recipe, arm: str, steps: int) -> Schedule:
    """The schedule of an arm over the whole budget, in steps; an epoch has `steps` of them.

    sgd: warm-up, constant, then down to `final_ratio` of the rate, then held. half: the same in half
    of the budget. The others follow sgd up to the branch; then swa keeps a constant rate and
    averages once an epoch (or a step) from `swa_from` on, and cyclic repeats cycles from high to low
    and averages at the end of each.

    >>> from polyak.reference_run.recipe import load_recipe
    >>> note = arm_schedule(load_recipe("note"), "cyclic", steps=1)
    >>> note.averaging_points(), round(note(113), 12)
    ((100, 110, 120, 130, 140), 0.034)
    """
    schedule = _annealed(recipe, recipe.last_epoch(arm) * steps)
    if arm in AVERAGING_ARMS:
        branch, left = recipe.branch_epoch, recipe.epochs - recipe.branch_epoch
        schedule = chain((branch * steps, schedule), (left * steps, _averaging(recipe, arm, steps)))
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


def logits_of(model: nn.Module, split: Split, hardware: Hardware) -> Tensor:
    """Logits `(n, k)`, float32 on the CPU, in evaluation mode; all modes are restored."""
    with restored_modes(model), torch.no_grad(), hardware.precision():
        model.eval()
        batches = [model(hardware.images(batch)) for batch in split.batches(_BATCH)]
    return torch.cat(batches).float().cpu()


def validation_record(model: nn.Module, data: Data, hardware: Hardware) -> dict[str, float]:
    """Error in percent and NLL in nats on the validation images."""
    logits = logits_of(model, data.validation, hardware)
    labels = data.validation.labels
    return {"error": 100 * error(logits, labels), "nll": nll(logits, labels)}


def final_record(model: nn.Module, data: Data, hardware: Hardware) -> dict[str, Any]:
    """Error and calibration error in percent and NLL on the test images.

    The temperature is fitted on the validation images.
    """
    logits, labels = logits_of(model, data.test, hardware), data.test.labels
    validation = logits_of(model, data.validation, hardware)
    temperature = best_temperature(validation, data.validation.labels)
    bins = reliability(logits, labels)
    return {
        "error": 100 * error(logits, labels),
        "nll": nll(logits, labels),
        "ece": 100 * bins.ece,
        "temperature": temperature,
        "nll_scaled": nll(logits, labels, temperature=temperature),
        "reliability": {name: list(values) for name, values in asdict(bins).items()},
    }
