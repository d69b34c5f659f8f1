"""torch.optim.swa_utils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import swa_utils

from peers import Peer, Running


class _Averaged(Running):
    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model = model
        self.average = swa_utils.AveragedModel(model, **options)

    def update(self) -> None:
        self.average.update_parameters(self.model)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.average.module.named_parameters())

    def buffers(self) -> dict[str, Tensor]:
        return dict(self.average.module.named_buffers())

    def evaluate(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.average)

    def state(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)

    def names(self) -> list[str]:
        return [n.removeprefix("module.") for n in self.average.state_dict()]


class Torch(Peer):
    name = "torch"

    def ema(self, model: nn.Module, decay: float) -> Running:
        return _Averaged(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))

    def mean(self, model: nn.Module) -> Running:
        return _Averaged(model)

    def with_buffers(self, model: nn.Module, decay: float) -> Running:
        function = swa_utils.get_ema_multi_avg_fn(decay)
        return _Averaged(model, multi_avg_fn=function, use_buffers=True)

    def update_bn(self, model: nn.Module, batches: Any) -> None:
        swa_utils.update_bn(batches, model)
