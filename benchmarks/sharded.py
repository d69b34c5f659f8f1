"""Sharded averages over processes: the time of an update, the memory of `applied()` and of `save`.

    python benchmarks/sharded.py [--ranks 4] [--megabytes 1024] [--dtype bfloat16] [--kind block]

Kinds: a plain average, one with an open block, a window of three snapshots; `--megabytes` are those of the
weights in their dtype.

Time is a ratio to an `Average` of plain tensors of the local shapes, alternating in one run; memory is the
growth of the peak of one process's resident set, of the worst rank. Each result is checked.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polyak
from polyak.tensors.sharding import local

LAYERS, ROUNDS = 16, 15
PROFILES = {
    "average": polyak.EMA(decay=0.99),
    "block": polyak.EMA(decay=0.9999, keep_initial=True),
    "window": polyak.Window(3),
}


class Peak:
    """The growth of the resident set within a block, in bytes, sampled."""

    def __enter__(self):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before is not used again unseen
        self._process = psutil.Process()
        self._before = self.bytes = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()
        self.bytes -= self._before


class Plain(nn.Module):
    """Parameters of the local shapes."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(t.detach().clone()) for t in tensors])


def build(megabytes: int, dtype: torch.dtype) -> nn.Module:
    width = int((megabytes * 2**20 / dtype.itemsize / LAYERS) ** 0.5)
    return nn.Sequential(*[nn.Linear(width, width, dtype=dtype) for _ in range(LAYERS)])


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def update_ratio(model: nn.Module, sharded: polyak.Average) -> float:
    plain = polyak.Average(Plain(map(local, model.parameters())), sharded.profile)
    plain.update()
    ratios = []
    for index in range(ROUNDS + 1):
        seconds = {}
        for one in (plain, sharded) if index % 2 else (sharded, plain):
            dist.barrier()
            seconds[one] = timed(one.update)
        ratios.append(seconds[sharded] / seconds[plain])
    return statistics.median(ratios[1:])


def measure(
    rank: int, ranks: int, folder: str, megabytes: int, dtype: torch.dtype, kind: str
) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    with torch.device("meta"):
        model = build(megabytes, dtype)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).fill_(1.0)
    average = polyak.Average(model, PROFILES[kind])
    for _ in range(3):
        average.update()
    found = {"update_ratio": update_ratio(model, average)}
    dist.barrier()
    with Peak() as peak, average.applied():
        assert all((local(p) == 1).all() for p in list(model.parameters())[:1])
    found["applied_scratch_mb"] = peak.bytes / 2**20
    dist.barrier()
    with Peak() as peak:
        average.save(Path(folder, "averaged.safetensors"))
    found["save_above_shards_mb"] = peak.bytes / 2**20
    if kind != "window":  # a file does not hold its snapshots
        fresh = polyak.Average(model, average.profile)
        fresh.update()
        with Peak() as peak:
            fresh.load(Path(folder, "averaged.safetensors"))
        found["load_mb"] = peak.bytes / 2**20
        assert fresh.count == average.count
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    everyone: list[dict[str, float] | None] = [None] * ranks
    dist.all_gather_object(everyone, found)
    if rank == 0:
        for name in found:
            values = [one[name] for one in everyone if one]
            figure = statistics.median(values) if name == "update_ratio" else max(values)
            print(
                json.dumps(
                    {
                        "benchmark": "sharded",
                        "ranks": ranks,
                        "dtype": str(dtype),
                        "kind": kind,
                        "megabytes": megabytes,
                        "figure": name,
                        "value": round(figure, 3),
                    }
                ),
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--kind", default="average", choices=tuple(PROFILES))
    given = parser.parse_args()
    context = torch.multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        dtype = getattr(torch, given.dtype)
        arguments = (given.ranks, folder, given.megabytes, dtype, given.kind)
        ranks = [context.Process(target=measure, args=(r, *arguments)) for r in range(given.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(600)


if __name__ == "__main__":
    main()
