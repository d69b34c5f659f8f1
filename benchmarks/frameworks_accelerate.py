"""What an average adds to a step of a real Accelerate run, beside diffusers' EMAModel and ema-pytorch.

python benchmarks/frameworks_accelerate.py [ROUNDS]

Arms alternate in one process; the time is the median over rounds of 20 steps, less that of the plain
loop. Memory: the bytes of the tensors that are alive because of the average, in copies of the weights.
"""

import gc
import sys
import time
import warnings
from statistics import median

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from torch import nn

import polyak

STEPS = 20


def build():
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(40)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    return Accelerator(cpu=True).prepare(model, optimizer)


def held():
    gc.collect()
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def nothing(model, optimizer):
    return lambda: None


def ours(model, optimizer):
    average = polyak.Average(model, polyak.EMA(decay=0.99))
    average.attach(optimizer)
    return lambda: average and None


def diffusers(model, optimizer):
    average = EMAModel(model.parameters(), decay=0.99, foreach=True)
    return lambda: average.step(model.parameters())


def ema_pytorch(model, optimizer):
    average = EMA(model, beta=0.99, update_every=1, update_after_step=0, include_online_model=False)
    return average.update


def run(model, optimizer, update, x):
    start = time.perf_counter()
    for _ in range(STEPS):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update()
    return (time.perf_counter() - start) / STEPS


def main(rounds):
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    x, arms, copies = torch.randn(2, 512), {}, {}
    for make in (nothing, ours, diffusers, ema_pytorch):
        model, optimizer = build()
        run(model, optimizer, lambda: None, x)
        before = held()
        arms[make.__name__] = (model, optimizer, make(model, optimizer))
        run(*arms[make.__name__], x)
        weights = sum(p.nbytes for p in model.parameters())
        copies[make.__name__] = (held() - before) / weights
    times = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            times[name].append(run(*arm, x))
    plain = median(times["nothing"])
    print(f"plain step {plain * 1e3:.2f} ms")
    for name in arms.keys() - {"nothing"}:
        added = median(a - b for a, b in zip(times[name], times["nothing"], strict=True))
        print(f"{name}: {added * 1e3:+.2f} ms a step, {copies[name]:.2f} copies of the weights")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
