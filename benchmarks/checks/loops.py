"""In the training loop: time, hooks, resuming, evaluating."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from peers import NotOffered
from torch import nn

from checks import Result, below, check, near


@check("loops", "averaging every 10 steps keeps the horizon of averaging every step (ratio 1)")
def every_k(peer: Any) -> Result:
    """Weights that grow by 1 a step, 100 steps; where the average ends, over where k=1 ends.

    Sampling alone moves the end to 1.16 of it; a decay that is not compensated for k, to 0.4.
    """
    ends = []
    for k in (1, 10):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        running = peer.every(model, 0.99, k)
        for step in range(1, 101):
            nn.init.constant_(model.weight, step)
            running.update()
        ends.append(running.weights()["weight"].item())
    return near(ends[1] / ends[0], 1.0, 0.25)


@check("loops", "an EMA 0.999 is not dominated by its first weights after 50 updates")
def first_weights(peer: Any) -> Result:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    running = peer.early(model, 0.999)
    running.update()
    nn.init.ones_(model.weight)
    for _ in range(50):
        running.update()
    return near(running.weights()["weight"].item(), 1.0, 0.1)


@check("loops", "a single NaN in training does not stay in the average")
def nan(peer: Any) -> Result:
    model = nn.Linear(1, 1, bias=False)
    running = peer.guarded(model, 0.9)
    for value in (1.0, float("nan"), 1.0):
        nn.init.constant_(model.weight, value)
        running.update()
    found = running.weights()["weight"].item()
    return Result(found == 1.0, f"{found}")


@check("loops", "gradient accumulation: one update for each real step")
def accumulation(peer: Any) -> Result:
    return _hooked(peer, skipped=set(), accumulate=4)


@check("loops", "steps that a GradScaler skips do not count (fused AdamW)")
def skipped_steps(peer: Any) -> Result:
    return _hooked(peer, skipped={2, 3, 5}, accumulate=1)


def _hooked(peer: Any, *, skipped: set[int], accumulate: int) -> Result:
    """Compare the hook's average with one that is updated by hand after every real step."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
    running = peer.hooked(model, 0.5, optimizer)
    exact = None
    for i in range(8 * accumulate):
        loss = model(torch.ones(1, 1)).sum()
        scaler.scale(loss * (float("inf") if i in skipped else 1.0)).backward()
        if (i + 1) % accumulate:
            continue
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if i not in skipped:
            now = model.weight.item()
            exact = now if exact is None else 0.5 * exact + 0.5 * now
    return near(running.weights()["weight"].item(), exact, 1e-5)


@check("loops", "saved, loaded and continued is bitwise the same as uninterrupted")
def resume(peer: Any) -> Result:
    def run(interrupted: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(8, 8).bfloat16()
        running = peer.ema(model, 0.99)
        for step in range(40):
            if interrupted and step == 20:
                state = copy.deepcopy(running.state())
                running = peer.ema(model, 0.99)
                running.load(state)
            with torch.no_grad():
                model.weight.add_(0.1 * torch.randn(8, 8).bfloat16())
            running.update()
        return running.weights()["weight"].double()

    error = (run(True) - run(False)).abs().max().item()
    return below(error, 0.0, "difference")


@check("loops", "an evaluation that fails leaves the training weights in the model")
def failing_evaluation(peer: Any) -> Result:
    with contextlib.suppress(NotOffered):  # over the weight it should have
        return near(peer.trains("an evaluation that fails"), 1.0, 1e-6)
    model = nn.Linear(1, 1, bias=False)
    running = peer.ema(model, 0.5)
    for value in (3.0, 1.0):
        nn.init.constant_(model.weight, value)
        running.update()

    def fail(_: nn.Module) -> None:
        raise KeyError

    try:
        running.evaluate(fail)
    except KeyError:
        return near(model.weight.item(), 1.0, 1e-6)
    raise NotOffered


@check(
    "loops", "validation before the first update sees the trained weights (1), not initial ones (0)"
)
def early_validation(peer: Any) -> Result:
    found = peer.trains("validation before the first update")
    return Result(found == 1.0, f"{found:g}")


@check("loops", "a run that never reaches an update ends with the trained weights (1)")
def no_update(peer: Any) -> Result:
    found = peer.trains("a run without any update")
    return Result(found == 1.0, f"{found:g}")
