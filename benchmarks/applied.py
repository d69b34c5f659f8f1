"""What it costs to evaluate on the average: microseconds per tensor, and memory.

    python benchmarks/applied.py [--rounds 20] [--peers]

A context is entered and left; nothing is evaluated inside. Memory is what PyTorch allocates at most
meanwhile, as a multiple of the weights. Of bfloat16 weights, whose averages are float32: the time as a
multiple of copying the weights once, and megabytes. The bounds (2 CPU cores): 2, and 64 MB.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from timing import figure, interleaved
from torch import nn

import polyak


def model_of(count: int, size: int) -> nn.Module:
    return nn.ParameterList(torch.randn(size) for _ in range(count))


def averaged(model: nn.Module, **options) -> polyak.Average:
    average = polyak.Average(model, polyak.SWA(), **options)
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        average.update()
    return average


def swapped_in(average: polyak.Average, **options):
    def call() -> None:
        with average.applied(**options):
            pass

    return call


def check(model: nn.Module, average: polyak.Average) -> None:
    first = next(model.parameters())
    before = first.detach().clone()
    with average.applied():
        torch.testing.assert_close(first.detach(), before - 0.5)
    assert torch.equal(first, before)


def allocated(call) -> int:
    """The peak of torch's CPU allocator in bytes, beyond what it held at the start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    out = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            out += event.nbytes()
            most = max(most, out)
    return most


def peers(model: nn.Module):
    found = {}
    try:
        from torch_ema import ExponentialMovingAverage

        ema = ExponentialMovingAverage(model.parameters(), decay=0.9)

        def torch_ema() -> None:
            with ema.average_parameters():
                pass

        found["torch-ema"] = torch_ema
    except ImportError:
        print("# torch-ema is not installed")
    try:
        from diffusers.training_utils import EMAModel

        theirs = EMAModel(model.parameters(), decay=0.9, foreach=True)

        def diffusers() -> None:
            theirs.store(model.parameters())
            theirs.copy_to(model.parameters())
            theirs.restore(model.parameters())

        found["diffusers"] = diffusers
    except ImportError:
        print("# diffusers is not installed")
    return found


def measure_bfloat16(name: str, model: nn.Module, rounds: int) -> None:
    """Against the least that a copy would cost: `copy_` of the weights into fresh memory, and no rounding."""
    average = averaged(model.bfloat16())
    weights = [p.detach() for p in model.parameters()]
    candidates = {
        "copy": lambda: [torch.empty_like(w).copy_(w) for w in weights],
        "applied": swapped_in(average),
        "in_place": swapped_in(average, in_place=True),
    }
    times = interleaved(candidates, rounds=rounds)
    figure(
        "applied, bfloat16",
        model=name,
        applied_over_copy=times.ratio("applied", "copy"),
        in_place_over_copy=times.ratio("in_place", "copy"),
        copy_ms=times.median("copy") * 1e3,
        **{f"{key}_MB": allocated(call) / 1e6 for key, call in candidates.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name, (count, size) in {"1000 x 4k": (1000, 4096), "16 x 1M": (16, 1_000_000)}.items():
        model = model_of(count, size)
        average = averaged(model)
        check(model, average)
        candidates = {
            "applied": swapped_in(average),
            "in_place": swapped_in(average, in_place=True),
        }
        candidates |= peers(model) if options.peers else {}
        times = interleaved(candidates, rounds=options.rounds)
        weights = 4 * count * size
        figure(
            "applied",
            model=name,
            **{f"{key}_us_per_tensor": times.median(key) / count * 1e6 for key in candidates},
            **{f"{key}_memory": allocated(call) / weights for key, call in candidates.items()},
        )
    for name, (count, size) in {"16 x 1M": (16, 1_000_000), "16 x 16M": (16, 16_000_000)}.items():
        measure_bfloat16(name, model_of(count, size), options.rounds)


if __name__ == "__main__":
    main()
