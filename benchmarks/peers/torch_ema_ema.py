"""torch_ema.ExponentialMovingAverage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch_ema import ExponentialMovingAverage

from peers import Peer, Running


class _Ema(Running):
    def __init__(self, model: nn.Module, decay: float, **options: Any) -> None:
        self.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.average = ExponentialMovingAverage(trained, decay=decay, **options)

    def update(self) -> None:
        self.average.update()

    def weights(self) -> dict[str, Tensor]:
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        return dict(zip(trained, self.average.shadow_params, strict=False))

    def evaluate(self, function: Callable[[nn.Module], Any]) -> Any:
        with self.average.average_parameters():
            return function(self.model)

    def state(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)

    def held(self) -> list[Tensor]:
        return list(self.average.shadow_params)


class TorchEma(Peer):
    name = "torch-ema"

    def ema(self, model: nn.Module, decay: float) -> Running:
        return _Ema(model, decay, use_num_updates=False)

    def early(self, model: nn.Module, decay: float) -> Running:
        return _Ema(model, decay)  # its warm-up

    def partial(self, model: nn.Module, decay: float) -> Running:
        return self.ema(model, decay)
