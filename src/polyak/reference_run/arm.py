"""What weights are worth on the validation and test images, as records.

The arms of a run as schedules: the rate of every step, and when weights are averaged.

One arm of one seed: a model that trains, with its averages beside it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polyak.averaging.average import Average
from polyak.averaging.lr_schedule import LRSchedule
from polyak.errors import NonFiniteError
from polyak.maths.profiles import EMA, SWA
from polyak.maths.schedules import Constant, Cosine, CyclicLinear, Linear, Schedule, chain
from polyak.reference_run.data import Augmentation, Data, Split, permutation
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.models import build_model
from polyak.reference_run.recipe import Recipe
from polyak.study.metrics import best_temperature, error, nll, reliability
from polyak.tensors.modes import restored_modes

_BATCH = 250  # stays in the cache


def logits_of(model: nn.Module, split: Split, hardware: Hardware) -> Tensor:
    """Logits `(n, k)`, float32 on the CPU, in evaluation mode; each module's mode comes back."""
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


def steps_per_epoch(recipe: Recipe, n_images: int) -> int:
    """Batches in a pass over the images, the last one smaller where they do not come out even."""
    return -(-n_images // recipe.batch_size)


def arm_schedule(recipe: Recipe, arm: str, steps: int) -> Schedule:
    """The schedule of an arm over the whole budget, in steps, `steps` being one epoch's.

    sgd: constant, then down to `final_ratio` of the rate, then held. The others follow it up to
    the branch; then swa keeps a constant rate and averages once an epoch (or a step), and cyclic
    falls from high to low again and again and averages at the end of each cycle.

    >>> from polyak.reference_run.recipe import load_recipe
    >>> note = arm_schedule(load_recipe("note"), "cyclic", steps=1)
    >>> note.averaging_points(), round(note(113), 12)
    ((100, 110, 120, 130, 140), 0.034)
    """
    sgd = _annealed(recipe, steps)
    if arm == "sgd":
        return sgd
    branch = recipe.branch_epoch * steps
    return chain((branch, sgd), (recipe.epochs * steps - branch, _averaging(recipe, arm, steps)))


def _annealed(recipe: Recipe, steps: int) -> Schedule:
    budget = recipe.epochs * steps
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
    if arm == "swa":
        # A cycle that falls from a rate to the same rate is a constant that knows when to average.
        every = steps if recipe.swa_average == "epoch" else 1
        return CyclicLinear(high=recipe.swa_rate, low=recipe.swa_rate, cycle=every)
    cycle = recipe.cycle_epochs * steps
    return CyclicLinear(high=recipe.cycle_high, low=recipe.cycle_low, cycle=cycle)


_STATISTICS_BATCH = 250  # stays in the cache


class Arm:
    """A model, its optimizer and schedule, an EMA of every step, and the SWA of averaging arms.

    The random state of torch (initial weights, dropout) is the arm's own: it is seeded here, kept
    in `state_dict` and set by `load_state_dict`.
    """

    def __init__(
        self, recipe: Recipe, data: Data, hardware: Hardware, *, seed: int, name: str
    ) -> None:
        self.recipe, self.data, self.hardware = recipe, data, hardware
        self.seed, self.name = seed, name
        torch.manual_seed(seed)
        self.model = hardware.place(build_model(recipe, data))
        self.steps_per_epoch = steps_per_epoch(recipe, len(data.train))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.schedule = arm_schedule(recipe, name, self.steps_per_epoch)
        self.lr = LRSchedule(self.optimizer, self.schedule)
        self.averages = {"ema": Average(self.model, self._ema(), unit="steps")}
        if name != "sgd":
            self.averages["swa"] = Average(self.model, SWA(), unit="captures")

    def train_epoch(self, epoch: int) -> float:
        """Train on every image once; the mean loss over them. NonFiniteError if it is none."""
        n, recipe = len(self.data.train), self.recipe
        augment = Augmentation.draw(self.seed, epoch, n, flips=recipe.flips, shift=recipe.shift)
        self.model.train()
        losses, sizes = [], []
        order = permutation(self.seed, epoch, n)
        for start in range(0, n, recipe.batch_size):
            indices = order[start : start + recipe.batch_size]
            losses.append(self._step(augment, indices))
            sizes.append(len(indices))
        return self._mean_loss(torch.stack(losses).double().cpu(), sizes, epoch)

    def take_entering_weights(self) -> None:
        """Average the weights with which an averaging arm leaves SGD, as the paper does."""
        if self.schedule.averages_after(self.lr.last_epoch):
            self.averages["swa"].update()

    @contextmanager
    def holding(self, kind: str) -> Iterator[nn.Module]:
        """The model with its last weights (`iterate`) or those of an average (`ema`, `swa`).

        An average's BatchNorm statistics are those of the training images under its weights.
        """
        if kind == "iterate":
            yield self.model
            return
        self.averages[kind].update_bn(self._statistics_batches())
        with self.averages[kind].applied():
            yield self.model

    def kinds(self) -> list[str]:
        """What there is to evaluate: the iterate, and each average that is not empty."""
        return ["iterate", *(kind for kind, average in self.averages.items() if average.count)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, as plain values and tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr": self.lr.state_dict(),
            "averages": {kind: average.state_dict() for kind, average in self.averages.items()},
            "random": self.hardware.random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; an average that it does not hold begins anew."""
        self.model.load_state_dict(state["model"])
        # A copy: torch takes momenta as they are, and would write into the state that others begin from.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.lr.load_state_dict(state["lr"])
        for kind, average in state["averages"].items():
            self.averages[kind].load_state_dict(average)
        self.hardware.set_random_state(state["random"])

    def _ema(self) -> EMA:
        return EMA.from_half_life(self.recipe.ema_half_life * self.steps_per_epoch)

    def _step(self, augment: Augmentation, indices: Tensor) -> Tensor:
        train = self.data.train
        images = self.hardware.images(augment(train.images[indices], indices))
        labels = train.labels[indices].to(self.hardware.device)
        self.optimizer.zero_grad()
        with self.hardware.precision():
            loss = cross_entropy(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.lr.step()
        self.averages["ema"].update()
        if "swa" in self.averages and self.schedule.averages_after(self.lr.last_epoch):
            self.averages["swa"].update()
        return loss.detach()

    def _mean_loss(self, losses: Tensor, sizes: list[int], epoch: int) -> float:
        mean = float(losses @ torch.tensor(sizes, dtype=torch.float64)) / sum(sizes)
        if math.isfinite(mean):
            return mean
        step = int((~torch.isfinite(losses)).nonzero()[0])
        rate = self.schedule(epoch * self.steps_per_epoch + step)
        raise NonFiniteError(
            f"the training loss became {float(losses[step])} in batch {step + 1}, at the rate "
            f"{rate:.3g}."
        )

    def _statistics_batches(self) -> Iterator[Tensor]:
        return map(self.hardware.images, self.data.train.batches(_STATISTICS_BATCH))
