"""polyak.Average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import polyak
from peers import NotOffered, Peer, Running


class _Average(Running):
    def __init__(self, model: nn.Module, profile: Any, **options: Any) -> None:
        self.model, self.k, self.calls = model, 1, 0
        self.average = polyak.Average(model, profile, **options)

    def update(self) -> None:
        self.calls += 1
        if self.calls % self.k == 0:
            self.average.update(dt=self.k)

    def weights(self) -> dict[str, Tensor]:
        averaged = self.average.averaged_tensors()
        return {n: averaged[n] for n, _ in self.model.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        averaged = self.average.averaged_tensors()
        return {n: averaged[n] for n, _ in self.model.named_buffers()}

    def evaluate(self, function: Callable[[nn.Module], Any]) -> Any:
        with self.average.applied() as model:
            return function(model)

    def state(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)

    def names(self) -> list[str]:
        return list(self.average.averaged_tensors())

    def held(self) -> list[Tensor]:
        return list(self.average.state_dict()["tensors"].values())


class Polyak(Peer):
    name = "polyak"

    def ema(self, model: nn.Module, decay: float) -> Running:
        return _Average(model, polyak.EMA(decay=decay, keep_initial=True))

    def mean(self, model: nn.Module) -> Running:
        return _Average(model, polyak.SWA())

    def early(self, model: nn.Module, decay: float) -> Running:
        return _Average(model, polyak.EMA(decay=decay))

    def every(self, model: nn.Module, decay: float, k: int) -> Running:
        running = _Average(model, polyak.EMA(decay=decay, keep_initial=True))
        running.k = k
        return running

    def hooked(self, model: nn.Module, decay: float, optimizer: Any) -> Running:
        running = _Average(model, polyak.EMA(decay=decay, keep_initial=True))
        running.average.attach(optimizer, every=1)
        return running

    def guarded(self, model: nn.Module, decay: float) -> Running:
        return _Average(model, polyak.EMA(decay=decay, keep_initial=True), nonfinite="skip")

    def partial(self, model: nn.Module, decay: float) -> Running:
        return self.ema(model, decay)

    def with_buffers(self, model: nn.Module, decay: float) -> Running:
        return self.ema(model, decay)

    def update_bn(self, model: nn.Module, batches: Any) -> None:
        polyak.update_bn(model, batches)

    def trains(self, check: str) -> float:
        """Our context manager in the place of the framework's hooks."""
        if check not in ("validation before the first update", "a run without any update"):
            raise NotOffered
        model = nn.Linear(1, 1)
        nn.init.zeros_(model.weight)
        average = polyak.Average(model, polyak.EMA(decay=0.9))
        nn.init.ones_(model.weight)  # trained, but the first average has not been reached
        if check == "validation before the first update":
            with average.applied():
                return model.weight.item()
        average.copy_to(model)
        return model.weight.item()
