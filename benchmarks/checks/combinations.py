"""Combinations of separate runs: soups, TIES, DARE, Model Stock, SLERP, LoRA adapters."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checks import Result, below, check, near

SUBJECT = "combinations"


def _around(base: Tensor, count: int, size: float) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [{"w": (base + size * torch.randn(base.shape)).to(base.dtype)} for _ in range(count)]


def _three() -> tuple[list[dict[str, Tensor]], Tensor]:
    """Three runs in bfloat16, and their mean rounded once."""
    runs = _around(torch.ones(1000).bfloat16(), 3, 0.1)
    exact = torch.stack([run["w"].double() for run in runs]).mean(0)
    return runs, exact.bfloat16()


def _equal(found: Tensor, exact: Tensor) -> Result:
    off = float((found != exact).double().mean())
    return Result(off == 0, f"{off:.0%} of the values differ")


@check(SUBJECT, "the mean of three bfloat16 runs is rounded once")
def mean_bfloat16(peer: Any) -> Result:
    runs, exact = _three()
    return _equal(peer.combine("mean", None, runs)["w"], exact)


@check(SUBJECT, "the mean of three runs keeps integer counters whole")
def counters(peer: Any) -> Result:
    runs = [{"w": torch.ones(2), "n": torch.tensor([1000])} for _ in range(3)]
    found = peer.combine("mean", None, runs)["n"]
    return Result(
        found.dtype == torch.int64 and found.item() == 1000, f"{found.item()}, {found.dtype}"
    )


@check(SUBJECT, "greedy: a run with which the score stays as it is joins the soup (the paper's >=)")
def joins(peer: Any) -> Result:
    runs = [{"w": torch.tensor([value])} for value in (1.0, 2.0, 9.0)]
    found = peer.greedy(runs, lambda state: float(state["w"].item() < 3))
    return near(found["w"].item(), 1.5, 1e-6)


@check(SUBJECT, "greedy: the mean of two bfloat16 runs and a third is rounded once")
def grown(peer: Any) -> Result:
    runs, exact = _three()
    soups = iter([4.0, 5.0])  # each better than what was before

    def score(state: Any) -> float:
        for number, run in enumerate(runs):
            if torch.equal(state["w"].float(), run["w"].float()):
                return 3.0 - number
        return next(soups, 9.0)

    return _equal(peer.greedy(runs, score)["w"], exact)


@check(SUBJECT, "SLERP of two runs 1.5 degrees apart keeps their length, within 1e-6")
def slerp(peer: Any) -> Result:
    first, other = torch.zeros(1000), torch.zeros(1000)
    first[::2], other[1::2] = 1.0, 1.0
    angle = math.radians(1.5)
    second = math.cos(angle) * first + math.sin(angle) * other
    found = peer.combine("slerp", None, [{"w": first}, {"w": second}], t=0.5)["w"]
    return below(abs(float(found.norm() / first.norm()) - 1), 1e-6, "relative error")


@check(SUBJECT, "TIES keeps the largest change of a tensor of four (density 0.2)")
def small_tensor(peer: Any) -> Result:
    base, run = {"w": torch.zeros(4)}, {"w": torch.tensor([1.0, 2.0, 3.0, 9.0])}
    found = peer.combine("ties", base, [run, run], density=0.2)["w"]
    return near(found[3].item(), 9.0, 1e-6)


@check(
    SUBJECT, "TIES treats changes of one size alike, wherever they are (all 10 values, density 0.5)"
)
def alike(peer: Any) -> Result:
    base, run = {"w": torch.zeros(10)}, {"w": torch.ones(10)}
    found = peer.combine("ties", base, [run, run], density=0.5)["w"]
    return Result(
        len(set(found.tolist())) == 1, f"{int((found != 0).sum())} of 10 equal changes stay"
    )


@check(SUBJECT, "TIES of bfloat16 runs is the exact result, rounded once (density 1)")
def ties_bfloat16(peer: Any) -> Result:
    torch.manual_seed(1)
    base = torch.randn(1000).bfloat16()
    runs = _around(base, 3, 0.1)
    deltas = torch.stack([run["w"].double() - base.double() for run in runs])
    positive = deltas.sum(0) >= 0
    agrees = torch.where(positive, deltas > 0, deltas < 0)
    exact = base.double() + (deltas * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    found = peer.combine("ties", {"w": base}, runs, density=1.0)["w"]
    return _equal(found, exact.to(torch.bfloat16))


@check(SUBJECT, "DARE: dropped and rescaled, changes keep their mean (1 beside nine of 0.01: 1)")
def unbiased(peer: Any) -> Result:
    change = torch.tensor([1.0] + [0.01] * 9)
    base = {f"w{n}": torch.zeros(10) for n in range(2000)}
    runs = [{name: change.clone() for name in base} for _ in range(2)]
    found = peer.combine("dare", base, runs, density=0.1)
    means = torch.stack([found[name] for name in base]).mean(0)
    return near(float(means[0]), 1.0, 0.2)  # 4.2 standard deviations


@check(SUBJECT, "Model Stock: the angle of small changes (norm 1e-4) counts as that of large ones")
def small_changes(peer: Any) -> Result:
    torch.manual_seed(0)
    base = {"w": torch.zeros(100)}
    shared, other = torch.zeros(100), torch.zeros(100)
    shared[0], other[1] = 1e-4, 1e-4
    runs = [{"w": shared}, {"w": 0.6 * shared + 0.8 * other}]  # cosine 0.6, so t is 0.75
    found = peer.combine("model-stock", base, runs)["w"]
    return near(float(found[0] / 8e-5), 0.75, 1e-3)


def _adapters(base: nn.Module, folder: str, **each: Any) -> tuple[list[str], Tensor]:
    """Two adapters of ranks 2 and 4, and the mean of what they add to the weight."""
    from peft import LoraConfig, get_peft_model

    places, added = [], []
    for rank in (2, 4):
        config = LoraConfig(r=rank, lora_alpha=8, target_modules=["0"], **each)
        model = get_peft_model(base, config)
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p)
        places.append(str(Path(folder, f"rank-{rank}")))
        model.save_pretrained(places[-1])
        added.append(model.base_model.model[0].get_delta_weight("default").detach().double())
        base = model.unload()
    return places, (added[0] + added[1]) / 2


def _of_adapters(peer: Any, **each: Any) -> Result:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12))
    with tempfile.TemporaryDirectory() as folder:
        places, exact = _adapters(base, folder, **each)
        found = peer.mean_of_adapters(base, places).detach().double()
    return below(float((found - exact).norm() / exact.norm()), 1e-5, "relative error")


@check(SUBJECT, "the mean of LoRA adapters of ranks 2 and 4 is the mean of their products")
def lora(peer: Any) -> Result:
    return _of_adapters(peer)


@check(SUBJECT, "the same of adapters with rank-stabilised scaling (rsLoRA)")
def rslora(peer: Any) -> Result:
    return _of_adapters(peer, use_rslora=True)
