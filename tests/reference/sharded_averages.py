"""A process of two that try to average FSDP1 models, and write down what they were told."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


def build():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def told(call):
    from polyak.errors import ArgumentError

    try:
        call()
    except ArgumentError as error:
        return str(error)
    return "nothing"


def try_all(rank, folder):
    torch.set_num_threads(1)
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    found = {**fsdp1(use_orig_params=False), **fsdp1(use_orig_params=True)}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def fsdp1(*, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    import polyak

    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    inner = build()
    early = polyak.Average(inner, polyak.SWA())
    inner[0] = FullyShardedDataParallel(inner[0], **options)  # as an automatic policy does it
    outer = FullyShardedDataParallel(build(), **options)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    make = lambda model: lambda: polyak.Average(model, polyak.SWA())  # noqa: E731
    calls = {
        "whole": make(outer),
        "a part": make(inner),
        "inside": lambda: polyak.Average(outer.module, polyak.SWA()).update(),
        "wrapped since, attach": lambda: early.attach(optimizer),
        "wrapped since, update": early.update,
    }
    with FullyShardedDataParallel.summon_full_params(outer):
        calls_full = {"summoned": told(make(outer))}
    results = {name: told(call) for name, call in calls.items()} | calls_full
    return {f"fsdp1 {use_orig_params} {name}": text for name, text in results.items()}
