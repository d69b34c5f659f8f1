"""What an update costs on a GPU, as a multiple of the fewest bytes it must move; `update.py --device cuda`.

The fewest bytes: the weights read once in their own dtype, every average read and written, over the
bandwidth of a copy of 1.6 GB in the same rounds. Peers keep an average in the dtype of the weights.
Each result is checked before it is timed. `host_ms` is how long the call takes, nothing waited for.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from timing import figure, interleaved
from torch import nn
from update import check, in_blocks, mixed, parameters, peers, warmed

import polyak
from polyak.tensors import fused

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPIED = 400_000_000  # values of float32


def language_model(scale: int) -> nn.ParameterList:
    """1.1 G values in 242 tensors: embeddings of 50,304 tokens, 20 layers of width 2048."""
    width = 2048 if scale == 1000 else 512
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    norms = [(width,)] * 8
    shapes = [(50_304, width), (width,), *([*layer, *norms] * 20)]
    return nn.ParameterList(torch.zeros(shape) for shape in shapes)


MODELS = {
    "language model": language_model,
    "64 x 1M": lambda scale: parameters(64, scale * 1000),
    "mixed": mixed,
    "1000 x 4k": lambda _: parameters(1000, 4096),
}


def fewest_bytes(model: nn.Module, n_averages: int = 1) -> int:
    values = [(p.numel(), p.element_size()) for p in model.parameters()]
    return sum(n * (size + 8 * n_averages) for n, size in values)


def host_ms(call) -> float:
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds) * 1e3


def timed(call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def copying(device: str):
    source = torch.zeros(COPIED, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(name: str, dtype: str, options: argparse.Namespace) -> None:
    """One model: polyak, its peers, and four averages at once."""
    model = MODELS[name](100 if options.small else 1000).to(options.device, DTYPES[dtype])
    check(model)
    four = {str(k): polyak.SWA() for k in range(4)}
    ours = {
        "polyak": warmed(polyak.Average(model, polyak.SWA())).update,
        "polyak in blocks": in_blocks(model).update,
        "four averages": warmed(polyak.Averages(model, four)).update,
    }
    found, bandwidth = multiples(model, ours, options)
    on_host = {key: host_ms(ours[key]) for key in ("polyak", "four averages")}
    del ours  # with the peers' copies they would not fit
    gc.collect()
    if options.peers:
        found |= multiples(model, peers(model), options)[0]
    figure(
        "update / fewest bytes",
        model=name,
        dtype=dtype,
        **found,
        host_ms=on_host["polyak"],
        host_ms_four=on_host["four averages"],
        floor_ms=fewest_bytes(model) / bandwidth * 1e3,
        copy_TBps=bandwidth / 1e12,
        card=torch.cuda.get_device_name(options.device),
    )


def multiples(model: nn.Module, candidates, options) -> tuple[dict[str, float], float]:
    """Times over that of the fewest bytes, and the bandwidth of a copy in bytes per second."""
    copy = {"copy_": copying(options.device)}
    times = interleaved(copy | candidates, rounds=options.rounds, device=options.device)
    bandwidth = 2 * 4 * COPIED / times.median("copy_")
    counts = {key: 4 if key == "four averages" else 1 for key in candidates}
    seconds = {key: fewest_bytes(model, count) / bandwidth for key, count in counts.items()}
    return {key: times.median(key) / seconds[key] for key in candidates}, bandwidth


def measure_first_update(options: argparse.Namespace) -> None:
    """What the first update of a process takes longer than the second: compiling, above all."""
    model = parameters(10, 1000).to(options.device)
    average = polyak.Average(model, polyak.SWA())
    seconds = []
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        average.update()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    figure(
        "first update",
        seconds=seconds[0],
        second_ms=seconds[1] * 1e3,
        compiling=fused.seconds_compiling(model[0].device),
        fused=bool(average._member.tracker._grouped.notes()),
    )


def measure_applied(options: argparse.Namespace) -> None:
    """Time and memory of `applied()` of the language model in bfloat16."""
    model = language_model(100 if options.small else 1000).to(options.device, torch.bfloat16)
    average = warmed(polyak.Average(model, polyak.SWA()))

    def lend():
        with average.applied():
            pass

    lend()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    lend()
    torch.cuda.synchronize()
    more = torch.cuda.max_memory_allocated() - before
    source = [p.detach() for p in model.parameters()]
    target = [torch.empty_like(t) for t in source]
    candidates = {"copy": lambda: torch._foreach_copy_(target, source), "applied": lend}
    times = interleaved(candidates, rounds=10, device=options.device)
    figure(
        "applied(), bfloat16",
        memory_MB=more / 2**20,
        ms=times.median("applied") * 1e3,
        of_one_copy=times.ratio("applied", "copy"),
    )


class Step:
    """A training step of 12 transformer layers, 151 M values: AdamW fused, bfloat16 autocast."""

    def __init__(self, options: argparse.Namespace) -> None:
        width = 256 if options.small else 1024
        layer = nn.TransformerEncoderLayer(width, 16, 4 * width, batch_first=True, norm_first=True)
        self.model = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.model.to(options.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.x = torch.randn(16, 512, width, device=options.device)

    def __call__(self) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure_steps(options: argparse.Namespace) -> None:
    """What an average adds to a training step, on the GPU and on the host.

    Nothing that is under way ends in another arm's time: averages are read before the clock is started.
    """
    arms = {
        "no average": None,
        "on the GPU": {},
        "on the host": {"device": "cpu"},
        "on the host, every 10": {"device": "cpu", "every": 10},
    }
    steps, averages = {}, []
    for name, settings in arms.items():
        step = Step(options)
        if settings is not None:
            every = settings.pop("every", None)
            averages.append(polyak.Average(step.model, polyak.EMA(decay=0.999), **settings))
            averages[-1].attach(step.optimizer, every=every)
        steps[name] = lambda step=step: [step() for _ in range(10)]

    def settle():
        for average in averages:
            average._tracker.finish()

    rounds = max(3, options.rounds // 3)
    times = interleaved(steps, rounds=rounds, device=options.device, before=settle)
    found = {f"{name}, ms": times.median(name) * 100 for name in arms}
    added = {f"{name}, added": times.ratio(name, "no average") - 1 for name in list(arms)[1:]}
    source = [p.detach() for p in step.model.parameters()]
    target = [torch.empty_like(t, device="cpu", pin_memory=True) for t in source]
    copying_ms = statistics.median(
        timed(lambda: torch._foreach_copy_(target, source, non_blocking=True)) for _ in range(5)
    )
    figure("training step", **found, **added, copy_to_host_ms=copying_ms)


def run(options: argparse.Namespace) -> None:
    """Every figure; a model at a time, since four averages of the largest need 20 GB."""
    measure_first_update(options)
    for name in MODELS:
        for dtype in DTYPES:
            measure(name, dtype, options)
            gc.collect()
            torch.cuda.empty_cache()
    measure_applied(options)
    gc.collect()
    torch.cuda.empty_cache()
    measure_steps(options)
