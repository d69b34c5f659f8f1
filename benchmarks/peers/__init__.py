"""Thin adapters: how each library is used, as its own documentation says, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

State = Mapping[str, Tensor]


class NotOffered(Exception):  # noqa: N818 - an answer, not an error
    """The library does not claim to do this; it is not judged on it."""


class Running:
    """One running average of a model, in some library."""

    model: nn.Module

    def update(self) -> None:
        """Update the average with the model's current weights."""
        raise NotOffered

    def weights(self) -> dict[str, Tensor]:
        """The averaged parameters by the model's names."""
        raise NotOffered

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that belong to the average."""
        raise NotOffered

    def evaluate(self, function: Callable[[nn.Module], Any]) -> Any:
        """Run a function on the averaged model, by the library's one documented call for it."""
        raise NotOffered

    def state(self) -> dict[str, Any]:
        """The state to save."""
        raise NotOffered

    def load(self, state: dict[str, Any]) -> None:
        """Continue from it."""
        raise NotOffered

    def names(self) -> list[str]:
        """The names under which weights are saved."""
        raise NotOffered

    def held(self) -> list[Tensor]:
        """Every tensor that the average keeps beside the model."""
        raise NotOffered


class Posterior:
    """One SWAG of a model, of rank 20, in some library; its draws are those of its default scale."""

    def collect(self) -> None:
        """Take the model's current weights."""
        raise NotOffered

    def deviations(self) -> Tensor:
        """The standard deviation of each weight, as its draws use it."""
        raise NotOffered

    def draws(self, count: int) -> Tensor:
        """That many draws, a vector each."""
        raise NotOffered

    def drawn(self, batches: list[Tensor]) -> nn.Module:
        """A draw with the BatchNorm statistics that the library measures for it."""
        raise NotOffered


class Peer:
    """A library. What it does not override, it does not offer."""

    name = ""

    @property
    def version(self) -> str:
        return version(self.name)

    def ema(self, model: nn.Module, decay: float) -> Running:
        """A plain EMA of constant decay, updated by hand, beginning at the first update."""
        raise NotOffered

    def mean(self, model: nn.Module) -> Running:
        """An equal mean of all updates."""
        raise NotOffered

    def early(self, model: nn.Module, decay: float) -> Running:
        """An EMA with whatever the library offers against the bias to its first samples."""
        raise NotOffered

    def every(self, model: nn.Module, decay: float, k: int) -> Running:
        """An EMA whose `update`, called after each step, averages only every k-th, at the same horizon.

        An option to update less often that promises nothing about the horizon is not this.
        """
        raise NotOffered

    def hooked(self, model: nn.Module, decay: float, optimizer: Any) -> Running:
        """An EMA updated by a hook on the optimizer."""
        raise NotOffered

    def guarded(self, model: nn.Module, decay: float) -> Running:
        """An EMA that keeps non-finite weights out."""
        raise NotOffered

    def partial(self, model: nn.Module, decay: float) -> Running:
        """An EMA of the parameters that train."""
        raise NotOffered

    def with_buffers(self, model: nn.Module, decay: float) -> Running:
        """An EMA that handles buffers too, floating ones averaged if that is offered."""
        raise NotOffered

    def update_bn(self, model: nn.Module, batches: Any) -> None:
        """Recompute normalisation statistics."""
        raise NotOffered

    def trains(self, check: str) -> float:
        """For frameworks that own the loop: run it their way, and return that check's figure."""
        raise NotOffered

    def swag(self, model: nn.Module) -> Posterior:
        """SWAG of rank 20."""
        raise NotOffered

    def combine(self, method: str, base: State | None, runs: list[State], **how: Any) -> State:
        """ "mean", "ties", "dare" (both with a density), "model-stock" or "slerp" (t) of runs, in float32."""
        raise NotOffered

    def greedy(self, runs: list[State], score: Callable[[State], float]) -> State:
        """A greedy soup; higher scores are better."""
        raise NotOffered

    def mean_of_adapters(self, base: nn.Module, folders: list[str]) -> Tensor:
        """What the mean of LoRA adapters, as exact as is offered, adds to the weight of layer "0"."""
        raise NotOffered


def all_peers(subject: str) -> list[Peer]:
    """polyak first, then the others that do this and are there."""
    from peers.polyak_average import Polyak

    others = {"SWAG": _swags, "combinations": _mergers}.get(subject, _averagers)
    return [Polyak(), *others()]


def _averagers() -> list[Peer]:
    from peers.diffusers_ema import Diffusers
    from peers.ema_pytorch_ema import EmaPytorch
    from peers.lightning_callback import Lightning
    from peers.torch_ema_ema import TorchEma
    from peers.torch_swa_utils import Torch

    return [Torch(), EmaPytorch(), TorchEma(), Diffusers(), Lightning()]


def _swags() -> list[Peer]:
    if "SWAG_WHEELS" not in os.environ:
        return []
    from peers.swag_classes import SwaGaussian, TorchUncertainty

    return [SwaGaussian(), TorchUncertainty()]


def _mergers() -> list[Peer]:
    from peers.mergekit_command import Mergekit
    from peers.model_soups_script import ModelSoups
    from peers.peft_merging import Peft

    given = {"MERGEKIT": Mergekit, "MODEL_SOUPS": ModelSoups}
    return [*(kind() for name, kind in given.items() if name in os.environ), Peft()]
