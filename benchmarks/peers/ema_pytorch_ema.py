"""ema_pytorch.EMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ema_pytorch import EMA
from torch import Tensor, nn

from peers import Peer, Running


class _Ema(Running):
    def __init__(self, model: nn.Module, decay: float, **options: Any) -> None:
        constant = {"min_value": decay, "update_after_step": 0, "update_every": 1}
        self.model = model
        self.average = EMA(model, beta=decay, **{**constant, **options})

    def update(self) -> None:
        self.average.update()

    def weights(self) -> dict[str, Tensor]:
        return dict(self.average.ema_model.named_parameters())

    def buffers(self) -> dict[str, Tensor]:
        return dict(self.average.ema_model.named_buffers())

    def evaluate(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.average)

    def state(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)

    def names(self) -> list[str]:
        names = self.average.ema_model.state_dict()
        return list(names)


class EmaPytorch(Peer):
    name = "ema-pytorch"

    def ema(self, model: nn.Module, decay: float) -> Running:
        return _Ema(model, decay)

    def early(self, model: nn.Module, decay: float) -> Running:
        return _Ema(model, decay, min_value=0.0)  # its warm-up

    def hooked(self, model: nn.Module, decay: float, optimizer: Any) -> Running:
        running = _Ema(model, decay)
        running.average.add_to_optimizer_post_step_hook(optimizer)
        return running

    def with_buffers(self, model: nn.Module, decay: float) -> Running:
        return _Ema(model, decay)
