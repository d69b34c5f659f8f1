"""One arm of one seed: a model that trains, with its averages beside it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polyak.averaging.average import Average
from polyak.averaging.lr_schedule import LRSchedule
from polyak.errors import NonFiniteError
from polyak.maths.profiles import EMA, SWA
from polyak.training.arms import arm_schedule, steps_per_epoch
from polyak.training.augment import Augmentation, permutation
from polyak.training.data import Data
from polyak.training.hardware import Hardware
from polyak.training.models import build_model
from polyak.training.recipe import Recipe

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
