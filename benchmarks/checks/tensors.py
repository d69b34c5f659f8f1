"""Which tensors are averaged, and how they are found again."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from checks import Result, check, near


class _Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([True, True]))


@check("tensors", "integer counters are those of the newest model (1000)")
def counters(peer: Any) -> Result:
    model = _Counting()
    running = peer.with_buffers(model, 0.9)
    for n in (1, 1000):
        model.steps.fill_(n)
        running.update()
    found = running.buffers()["steps"].item()
    return Result(found == 1000, f"{found}")


@check("tensors", "boolean masks are those of the newest model")
def masks(peer: Any) -> Result:
    model = _Counting()
    running = peer.with_buffers(model, 0.9)
    for mask in ([True, True], [True, False]):
        model.mask.copy_(torch.tensor(mask))
        running.update()
    found = running.buffers()["mask"].tolist()
    return Result(found == [True, False], f"{found}, not [True, False]")


@check("tensors", "a model with an added layer is refused")
def grown(peer: Any) -> Result:
    model = nn.Sequential(nn.Linear(1, 1))
    running = peer.ema(model, 0.9)
    running.update()
    model.append(nn.Linear(1, 1))
    try:
        running.update()
    except Exception:  # any error is a notice
        return Result(True)
    return Result("1.weight" in running.weights(), "accepted silently")


@check("tensors", "buffers that are registered again, in another order, keep their values")
def reordered(peer: Any) -> Result:
    model = nn.Linear(1, 1)
    model.register_buffer("a", torch.tensor(1.0))
    model.register_buffer("b", torch.tensor(2.0))
    running = peer.with_buffers(model, 0.9)
    running.update()
    a = model.a
    del model.a
    model.register_buffer("a", a)
    for _ in range(3):
        running.update()
    found = [running.buffers()[n].item() for n in "ab"]
    return Result(
        all(abs(x - y) < 1e-5 for x, y in zip(found, (1.0, 2.0), strict=True)),
        f"a, b = {found[0]:.2g}, {found[1]:.2g}, not 1, 2",
    )


@check("tensors", "tied weights are averaged once, and stay tied (2 x 2)")
def tied(peer: Any) -> Result:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[1].weight = model[0].weight
    nn.init.ones_(model[0].weight)
    running = peer.ema(model, 0.5)
    for value in (1.0, 3.0):
        nn.init.constant_(model[0].weight, value)
        running.update()
    found = running.evaluate(lambda averaged: averaged(torch.ones(1, 1)).item())
    return near(found, 2.0 * 2.0, 1e-6)


@check("tensors", "a model with old weight_norm that has run")
def old_weight_norm(peer: Any) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.utils.weight_norm(nn.Linear(1, 1))
    model(torch.ones(1, 1))
    running = peer.ema(model, 0.9)
    running.update()
    return Result(bool(running.weights()))


@check("tensors", "a compiled model's weights are saved under the model's own names")
def compiled_names(peer: Any) -> Result:
    running = peer.ema(torch.compile(nn.Linear(1, 1), backend="eager"), 0.9)
    running.update()
    names = running.names()
    return Result("weight" in names, next(n for n in names if "weight" in n))


@check("tensors", "frozen weights cost no memory (100 values train, 10,000 do not)")
def frozen_memory(peer: Any) -> Result:
    model = nn.ParameterList([nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(10_000))])
    model[1].requires_grad_(False)
    running = peer.partial(model, 0.9)
    running.update()
    n_values = sum(t.numel() for t in running.held())
    return Result(n_values <= 100, f"{n_values} values kept")
