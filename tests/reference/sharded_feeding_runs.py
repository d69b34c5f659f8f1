"""Checks of what sharded averages feed, on real processes: followers, models and records."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reference import sharded_scored
from reference.ranks import run_checks
from reference.sharded_runs import (
    EMA,
    Even,
    Normed,
    adam,
    batches,
    farthest,
    flat_mesh,
    live,
    make,
    refused,
    shard,
    step,
    tensor_parallel,
)
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import polyak
import polyak.sharded
from polyak.errors import MismatchError, NonFiniteError, OutputError
from polyak.tensors.sharding import boxes, local, narrowed


def follow(sharded: Any, kind: Any, width: int, tolerance: float, **options: Any) -> None:
    """A model and its teacher, beside the same in one process, with a forward pass of both."""
    models = [make(kind) for _ in range(4)]
    student, teacher = sharded(models[0]), sharded(models[1])
    plain, plain_teacher = models[2], models[3]
    one, two = polyak.Average(student, EMA), polyak.Average(plain, EMA)
    first, second = adam(student), adam(plain)
    one.attach(first)
    two.attach(second)
    follower = one.follower(teacher, freeze=True, **options)
    two.follower(plain_teacher, freeze=True, **options)
    for x in batches(4, width=width):
        step(student, first, x)
        step(plain, second, x)
        assert (teacher(x) - plain_teacher(x)).abs().max() <= tolerance  # which gathers it
    assert farthest(live(teacher), live(plain_teacher)) <= tolerance
    follower.remove()


def check_followers(folder: Path) -> None:
    from reference.sharded_runs import Uneven

    follow(shard, Uneven, 7, 0.0)
    follow(lambda m: shard(m, reshard_after_forward=False), Uneven, 7, 0.0, evaluation=True)
    follow(shard, Normed, 7, 0.0, buffers=True)
    follow(lambda m: tensor_parallel(m, flat_mesh()), Even, 8, 2e-7)


def check_a_follower_of_a_part(folder: Path) -> None:
    model = shard(make())
    block = fully_shard(make().block, mesh=flat_mesh())
    average = polyak.Average(model, EMA)
    average.update()
    average.follower(block, part="block")
    state = average.state_dict()
    with torch.no_grad():
        block(torch.randn(2, 9))  # gathers it
        for tensor in state["tensors"].values():
            local(tensor).fill_(0.5)
    average.load_state_dict(state)
    with torch.no_grad():
        expected = 0.5 + 3 * 0.5 * torch.tanh(torch.tensor(0.5))
        assert (block(torch.zeros(1, 9)) - expected).abs().max() <= 1e-6


def check_followers_sharded_otherwise(folder: Path) -> None:
    average = polyak.Average(shard(make(Even)), EMA)
    columns = make(Even)
    fully_shard(columns, mesh=flat_mesh(), shard_placement_fn=lambda p: Shard(p.dim() - 1))
    refused(MismatchError, lambda: average.follower(make(Even)), "sharded", "emb.weight")
    refused(MismatchError, lambda: average.follower(columns), "sharded S(1)", "same mesh")
    plain = polyak.Average(make(Even), EMA)
    refused(MismatchError, lambda: plain.follower(shard(make(Even))), "emb.weight", "sharded")


def check_write_back(folder: Path) -> None:
    for options in ({}, {"reshard_after_forward": False}):
        model, plain = shard(make(), **options), make()
        one, two = polyak.Average(model, EMA), polyak.Average(plain, EMA)
        first, second = adam(model), adam(plain)
        one.attach(first)
        two.attach(second)
        one.write_back(every=2)
        two.write_back(every=2)
        for x in batches(5):
            step(model, first, x)
            step(plain, second, x)
            with torch.no_grad():
                assert torch.equal(model(x), plain(x))
        assert farthest(live(model), live(plain)) == 0
        assert farthest(one.averaged_tensors(), two.averaged_tensors()) == 0
    before = live(model)
    if dist.get_rank() == 1:
        local(one.state_dict()["tensors"]["emb.weight"]).fill_(torch.nan)
    refused(NonFiniteError, one.update, "emb.weight", "write_back")
    assert farthest(live(model), before) == 0


def drifting(model: nn.Module, time: int) -> None:
    """Give a model, whole or sharded, the weights of this time."""
    with torch.no_grad():
        for index, tensor in enumerate(model.state_dict().values()):
            values = torch.linspace(0, 1, tensor.numel()).view(tensor.shape)
            values = torch.cos(values * time / 7 + index)
            for spans, here in boxes(tensor):
                narrowed(local(tensor), here).copy_(narrowed(values, spans))


def record(model: nn.Module, folder: Path, first: int, last: int, **options: Any) -> Any:
    recorder = options.pop("recorder", None) or polyak.Recorder(
        model, folder, interval=5, captures=5, **options
    )
    for time in range(first, last):
        drifting(model, time)
        with torch.no_grad():
            model(torch.ones(1, 7))  # gathers the root
        recorder.update()
    return recorder


def contents(folder: Path) -> dict[str, Any]:
    return {
        f"{path.name}: {name}": tensor
        for path in sorted(folder.glob("interval-*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def check_records(folder: Path) -> None:
    for name, options in {
        "plain": {},
        "narrow": {"dtype": torch.bfloat16},
        "merged": {"keep": 2},
    }.items():
        model, plain = shard(make()), make()
        record(model, folder / name, 0, 23, **options).close()
        record(plain, folder / f"{name}-whole", 0, 23, **options).close()  # on rank 0
        dist.barrier()
        found, expected = contents(folder / name), contents(folder / f"{name}-whole")
        assert len({key.split(":")[0] for key in found}) == (2 if name == "merged" else 5)
        errors = {n: float((found[n] - expected[n]).abs().max()) for n in expected}
        assert not any(errors.values()), errors
        assert not list((folder / name).glob(".*"))
    average = polyak.Trajectory(folder / "plain").average(polyak.Window(10))
    assert average["emb.weight"].shape == (9, 7)


def check_a_record_that_is_resumed(folder: Path) -> None:
    for name, options in {"plain": {}, "narrow": {"dtype": torch.bfloat16}}.items():
        model = shard(make())
        there = folder / name
        recorder = record(model, there, 0, 13, **options)
        dcp.save({"recorder": recorder.state_dict()}, checkpoint_id=folder / f"{name}-state")
        record(model, there, 13, 19, recorder=recorder)  # a run that is given up
        recorder.__exit__(ValueError, None, None)
        again = polyak.Recorder(model, there, interval=5, captures=5, **options)
        assert polyak.sharded.load(again, folder / f"{name}-state", key="recorder")
        assert again.time == 13
        record(model, there, 13, 23, recorder=again).close()
        record(make(), folder / f"{name}-whole", 0, 23, **options).close()
        dist.barrier()
        assert farthest(contents(there), contents(folder / f"{name}-whole")) == 0


def check_records_that_are_refused(folder: Path) -> None:
    model = shard(make())
    record(model, folder / "a", 0, 6).close()
    with warnings.catch_warnings():
        other = polyak.Recorder(model, folder / "a", interval=5, captures=5)
        refused(OutputError, other.update, "another record")
    spoiled = polyak.Recorder(model, folder / "b", interval=2, captures=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for time in range(6):
            drifting(model, time)
            if dist.get_rank() == 1 and time == 1:
                with torch.no_grad():
                    local(model.emb.weight)[0] = torch.nan
            spoiled.update()
        spoiled.close()
    assert any("missing from the record" in str(one.message) for one in said)
    dist.barrier()
    assert len(list((folder / "b").glob("interval-*"))) == 2


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name[:6] == "check_"}
CHECKS |= sharded_scored.CHECKS


def run(rank: int, n_ranks: int, folder: str, port: int) -> None:
    """One rank: run the checks, and write what each has said."""
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=n_ranks)
    run_checks(CHECKS, Path(folder, f"{rank}.json"), Path(folder))
    dist.destroy_process_group()
