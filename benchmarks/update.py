"""What one update costs, as a multiple of the time of `x.add_(y)` over the same number of values.

    python benchmarks/update.py [--device cuda] [--rounds 20] [--small] [--peers]

Each result is checked before it is timed. The bounds (2 CPU cores): 1.05 for large tensors, 1.35
for the mixed model, 1.15 of a bare cached `_foreach_lerp_` for a thousand small ones, and K
averages within 10% of (2K + 1) / 3 of one. On a GPU the measure is another: see `update_gpu.py`.
"""

from __future__ import annotations

import argparse
import copy
import warnings

import torch
from timing import figure, interleaved
from torch import nn

import polyak


def parameters(count: int, size: int) -> nn.ParameterList:
    return nn.ParameterList(torch.randn(size) for _ in range(count))


def mixed(scale: int) -> nn.Module:
    norms = nn.ModuleList(nn.BatchNorm1d(512) for _ in range(150))
    return nn.ModuleList([parameters(24, scale * 1000), parameters(300, 4096), norms])


def models(scale: int) -> dict[str, nn.Module]:
    return {
        "64 x 1M": parameters(64, scale * 1000),
        "mixed": mixed(scale),
        "1000 x 4k": parameters(1000, 4096),
    }


def bytes_cost(model: nn.Module):
    """`x.add_(y)` over as many values in one go per large tensor: what moving the bytes costs."""
    total = sum(p.numel() for p in model.parameters())
    device = next(model.parameters()).device
    chunk = 1_000_000
    sizes = [chunk] * (total // chunk) + [total % chunk] * (total % chunk > 0)
    xs = [torch.randn(n, device=device) for n in sizes]
    ys = [torch.randn(n, device=device) for n in sizes]
    return lambda: [x.add_(y) for x, y in zip(xs, ys, strict=True)]


def bare_lerp(model: nn.Module):
    live = [p.detach() for p in model.parameters()]
    kept = [p.clone() for p in live]
    return lambda: torch._foreach_lerp_(kept, live, 0.1)


def warmed(average, updates: int = 3):
    for _ in range(updates):
        average.update()
    return average


def in_blocks(model: nn.Module):
    """An average whose share is so small that weights gather in blocks."""
    average = polyak.Average(model, polyak.EMA(decay=0.9999, keep_initial=True))
    return warmed(average)


def peers(model: nn.Module):
    """The same exponential average by each installed peer, on a copy of the model each."""
    from torch.optim import swa_utils

    found = {}
    default = swa_utils.AveragedModel(model)
    default.update_parameters(model)
    found["torch default SWA"] = lambda: default.update_parameters(model)
    multi = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    multi.update_parameters(model)
    found["torch multi EMA"] = lambda: multi.update_parameters(model)
    for name, build in {
        "ema-pytorch": _ema_pytorch,
        "torch-ema": _torch_ema,
        "diffusers": _diffusers,
    }.items():
        try:
            found[name] = build(model)
        except ImportError:
            print(f"# {name} is not installed")
    return found


def _ema_pytorch(model):
    from ema_pytorch import EMA

    ema = EMA(copy.deepcopy(model), beta=0.9, update_every=1, update_after_step=0)
    ema.update()
    return ema.update


def _torch_ema(model):
    from torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(model.parameters(), decay=0.9)
    return ema.update


def _diffusers(model):
    from diffusers.training_utils import EMAModel

    ema = EMAModel(model.parameters(), decay=0.9, foreach=True)
    return lambda: ema.step(model.parameters())


def check(model: nn.Module) -> None:
    average = polyak.Average(model, polyak.SWA())
    before = [p.detach().clone() for p in model.parameters()]
    average.update()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update()
    after = [p.detach() for p in model.parameters()]
    held = average._member.accumulator.tensors
    for a, b, found in zip(before, after, held, strict=True):
        torch.testing.assert_close(found, (a.float() + b.float()) / 2)


def measure(name: str, model: nn.Module, options: argparse.Namespace) -> None:
    check(model)
    candidates = {
        "add_": bytes_cost(model),
        "foreach_lerp_": bare_lerp(model),
        "polyak": warmed(polyak.Average(model, polyak.SWA())).update,
        "polyak in blocks": in_blocks(model).update,
    }
    if options.peers:
        candidates |= peers(model)
    times = interleaved(candidates, rounds=options.rounds, device=options.device)
    ratios = {key: times.ratio(key, "add_") for key in candidates if key != "add_"}
    figure(
        "update / x.add_(y)",
        model=name,
        **ratios,
        polyak_over_bare_lerp=times.ratio("polyak", "foreach_lerp_"),
        add_ms=times.median("add_") * 1e3,
    )


def measure_several(name: str, model: nn.Module, options: argparse.Namespace) -> None:
    counts = (1, 2, 4, 8)
    candidates = {
        str(k): warmed(polyak.Averages(model, {str(i): polyak.SWA() for i in range(k)})).update
        for k in counts
    }
    times = interleaved(candidates, rounds=options.rounds, device=options.device)
    for k in counts[1:]:
        ratio = times.ratio(str(k), "1")
        figure("K averages / 1", model=name, K=k, ratio=ratio, of_bound=ratio / ((2 * k + 1) / 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="a tenth of the large tensors' size")
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.device.startswith("cuda"):
        import update_gpu

        update_gpu.run(options)
        return
    for name, model in models(100 if options.small else 1000).items():
        measure(name, model.to(options.device), options)
        if name != "1000 x 4k":
            measure_several(name, model, options)


if __name__ == "__main__":
    main()
