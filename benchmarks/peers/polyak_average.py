"""polyak.Average."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polyak
from peers import NotOffered, Peer, Posterior, Running, State


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


class _Swag(Posterior):
    def __init__(self, model: nn.Module) -> None:
        self.swag = polyak.SWAG(model, rank=20)

    def collect(self) -> None:
        self.swag.update()

    def deviations(self) -> Tensor:
        return _vector(self.swag.state_dict()["variance"].values()).sqrt()

    def draws(self, count: int) -> Tensor:
        drawn = []
        for _ in range(count):
            with self.swag.sample() as model:
                drawn.append(_vector(model.parameters()))
        return torch.stack(drawn)

    def drawn(self, batches: list[Tensor]) -> nn.Module:
        with self.swag.sample(update_bn=batches) as model:
            return copy.deepcopy(model)


def _vector(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


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

    def swag(self, model: nn.Module) -> Posterior:
        return _Swag(model)

    def combine(self, method: str, base: State | None, runs: list[State], **how: Any) -> State:
        from polyak.checkpoints import Dare, ModelStock, Slerp, Ties, average_checkpoints

        kinds: dict[str, Any] = {"ties": Ties, "dare": Dare, "model-stock": ModelStock}
        kinds |= {"slerp": Slerp}
        with tempfile.TemporaryDirectory() as folder:
            paths = _saved(runs, folder)
            start = None if base is None else _saved([base], folder, "base")[0]
            made = "swa" if method == "mean" else kinds[method](**how)
            output = Path(folder, "merged.pt")
            average_checkpoints(paths, output, method=made, base=start)
            merged: State = torch.load(output)
            return merged

    def greedy(self, runs: list[State], score: Callable[[State], float]) -> State:
        from polyak.study import make_soup

        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "soup.pt")
            make_soup(_saved(runs, folder), output, score, maximize=True, cache=False)
            soup: State = torch.load(output)
            return soup

    def mean_of_adapters(self, base: nn.Module, folders: list[str]) -> Tensor:
        from peft import PeftModel

        from polyak.checkpoints import merge_adapters

        with tempfile.TemporaryDirectory() as folder:
            merge_adapters(folders, Path(folder, "mean"))
            model = PeftModel.from_pretrained(base, str(Path(folder, "mean")))
            return model.base_model.model[0].get_delta_weight("default")


def _saved(states: list[State], folder: str, name: str = "run") -> list[Path]:
    paths = [Path(folder, f"{name}-{number}.pt") for number in range(len(states))]
    for state, path in zip(states, paths, strict=True):
        torch.save(dict(state), path)
    return paths
