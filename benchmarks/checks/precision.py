"""Averages in low precision, and in float32 over many updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from checks import Result, below, check, near


def _walk(start: Any, model: nn.Linear, values: torch.Tensor) -> float:
    """Average these values; some libraries begin where the model is, some at the first update."""
    nn.init.constant_(model.weight, values[0])
    running = start(model)
    with torch.no_grad():
        for value in values:
            model.weight.fill_(value)
            running.update()
    return next(iter(running.weights().values())).double().mean().item()


def _model(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(1, 1, bias=False).to(dtype)


@check("precision", "EMA 0.999 of bfloat16 weights reaches its target (1.5, from 1.0)")
def bfloat16_ema(peer: Any) -> Result:
    model = _model(torch.bfloat16)
    values = torch.full((8001,), 1.5)
    values[0] = 1.0
    return near(_walk(lambda m: peer.ema(m, 0.999), model, values), 1.5, 4e-3)


@check("precision", "equal mean of 2000 bfloat16 weights (a ramp from 1 to 2)")
def bfloat16_mean(peer: Any) -> Result:
    model = _model(torch.bfloat16)
    values = torch.linspace(1, 2, 2000)
    return near(_walk(peer.mean, model, values), 1.5, 4e-3)


@check("precision", "EMA 0.9999 of slowly drifting float32 weights, 20,000 updates, within 1e-5")
def float32_ema(peer: Any) -> Result:
    model = _model()
    values = torch.linspace(1, 1.001, 20_000)
    found = _walk(lambda m: peer.ema(m, 0.9999), model, values)
    exact = float(values[0])
    for value in values.double().tolist()[1:]:
        exact += (1 - 0.9999) * (value - exact)
    return below(abs(found - exact) / exact, 1e-5, "relative error")


@check("precision", "equal mean of 100,000 drifting float32 weights, within 1e-5")
def float32_mean(peer: Any) -> Result:
    model = _model()
    values = torch.linspace(1, 2, 100_000)
    found = _walk(peer.mean, model, values)
    return below(abs(found - 1.5) / 1.5, 1e-5, "relative error")


@check("precision", "float64 weights are averaged in float64")
def float64_stays(peer: Any) -> Result:
    model = _model(torch.float64)
    values = 1 + 1e-10 * torch.arange(1, 11, dtype=torch.float64)
    found = _walk(lambda m: peer.ema(m, 0.5), model, values)
    exact = float(values[0])
    for value in values.tolist()[1:]:
        exact += 0.5 * (value - exact)
    return below(abs(found - exact) / 1e-10, 1e-4, "error, in steps of the data,")
