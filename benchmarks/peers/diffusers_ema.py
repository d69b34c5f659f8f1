"""diffusers.training_utils.EMAModel."""

from __future__ import annotations

from typing import Any

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from peers import Peer, Running


class _Ema(Running):
    def __init__(
        self, model: nn.Module, decay: float, *, only_trained: bool = False, **kw: Any
    ) -> None:
        self.model = model
        self.named = [
            (n, p) for n, p in model.named_parameters() if p.requires_grad or not only_trained
        ]
        self.only_trained = only_trained
        self.average = EMAModel(self._parameters(), decay=decay, **kw)

    def _parameters(self) -> list[nn.Parameter]:
        parameters = self.model.parameters()
        return [p for p in parameters if p.requires_grad or not self.only_trained]

    def update(self) -> None:
        self.average.step(self._parameters())

    def weights(self) -> dict[str, Tensor]:
        names = [n for n, _ in self.named]
        return dict(zip(names, self.average.shadow_params, strict=False))

    def state(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)

    def held(self) -> list[Tensor]:
        return list(self.average.shadow_params)


class Diffusers(Peer):
    name = "diffusers"

    def ema(self, model: nn.Module, decay: float) -> Running:
        return _Ema(model, decay, min_decay=decay)  # the only way to a constant decay

    def early(self, model: nn.Module, decay: float) -> Running:
        return _Ema(model, decay, use_ema_warmup=True)

    def partial(self, model: nn.Module, decay: float) -> Running:
        return _Ema(model, decay, only_trained=True, min_decay=decay)
