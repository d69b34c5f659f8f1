"""Checks of averages under Accelerate's FSDP2, on real processes: each by name, in one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from reference.ranks import become_rank, run_checks, whole
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import polyak
import polyak.sharded
from polyak.errors import ArgumentError, MismatchError, UsageError
from polyak.integrations.accelerate import track

BATCHES = 12
EMA = polyak.EMA(decay=0.8)


def accelerator_of(kind: str, **options: Any) -> Accelerator:
    """Accelerate shards on accelerators only: it is told that these processes have some."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=30,
        state_dict_type=kind,
        **options,
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)


class Model(nn.Module):
    """A child that is sharded by itself, others by the root, and a scale of which one rank has nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(1))
        self.first, self.block = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 9), nn.Tanh())
        self.out = nn.Linear(9, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.block(self.first(x))) * self.scale


class Run:
    """One training: the same data on every rank."""

    def __init__(
        self, kind: str = "FULL_STATE_DICT", *, missing: str = "raise", **options: Any
    ) -> None:
        self.accelerator = accelerator_of(kind, **options)
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        self.ema = polyak.Average(model, EMA)
        self.ema.attach(optimizer)  # before prepare, which replaces its parameters
        torch.manual_seed(1)
        n = self.accelerator.num_processes
        x = torch.randn(4 * BATCHES, 4).view(BATCHES, 4, 4)
        data = TensorDataset(x.repeat_interleave(n, 0).reshape(-1, 4))  # the same batch on all
        self.model, self.optimizer, self.data = self.accelerator.prepare(
            model, optimizer, DataLoader(data, 4)
        )
        self.several = polyak.Averages(self.model, {"swa": "swa", "window": polyak.Window(3)})
        self.several.attach(self.optimizer)
        track(self.accelerator, self.ema, missing=missing)
        track(self.accelerator, self.several, "several", missing=missing)

    def train(self, first: int = 0, last: int = BATCHES) -> Run:
        """The batches from `first` up to `last` of one epoch."""
        batches = self.accelerator.skip_first_batches(self.data, first) if first else self.data
        for index, (x,) in enumerate(batches, start=first):
            if index == last:
                break
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(x).square().mean())
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    def values(self) -> dict[str, Any]:
        """Everything that must be equal, whole."""
        found: dict[str, Any] = {f"live.{n}": t for n, t in self.model.state_dict().items()}
        for name, average in {"ema": self.ema, **self.several}.items():
            found |= {f"{name}.{n}": t for n, t in average.averaged_tensors().items()}
        return {n: whole(t) for n, t in found.items()}


def farthest(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys(), (a.keys(), b.keys())
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def plain() -> dict[str, Any]:
    """The same training in one process, without a framework."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    averages = polyak.Averages(model, {"ema": EMA, "swa": "swa", "window": polyak.Window(3)})
    averages.attach(optimizer)
    torch.manual_seed(1)
    for index, x in enumerate(torch.randn(4 * BATCHES, 4).view(BATCHES, 4, 4)):
        (model(x).square().mean() / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    found = {f"live.{n}": t.detach() for n, t in model.state_dict().items()}
    for name, average in averages.items():
        found |= {f"{name}.{n}": t for n, t in average.averaged_tensors().items()}
    return found


def resumed_is_uninterrupted(folder: Path, kind: str, **options: Any) -> None:
    run = Run(kind, **options)
    run.train(last=8).accelerator.save_state(folder / "state")
    assert run.ema.count == 4
    uninterrupted = run.train(first=8).values()
    assert run.ema.count == 6
    assert farthest(uninterrupted, plain()) <= 1e-6
    with torch.no_grad(), run.ema.applied():
        found = run.model(torch.ones(3, 4))
    model = Model()
    run_average = {n[4:]: t for n, t in uninterrupted.items() if n.startswith("ema.")}
    expected = torch.func.functional_call(model, run_average, (torch.ones(3, 4),))
    assert torch.equal(found, expected)

    other = Run(kind, **options)
    other.train(last=2)  # what it has averaged is forgotten
    other.accelerator.load_state(folder / "state")
    assert other.ema.count == other.several["window"].count == 4
    again = other.train(first=8).values()
    assert all(torch.equal(uninterrupted[n], again[n]) for n in again), farthest(
        uninterrupted, again
    )


def check_full(folder: Path) -> None:
    resumed_is_uninterrupted(folder, "FULL_STATE_DICT", cpu_ram_efficient_loading=False)


def check_sharded(folder: Path) -> None:
    resumed_is_uninterrupted(folder, "SHARDED_STATE_DICT")


def check_gathered_and_checkpointed(folder: Path) -> None:
    """Parameters stay gathered after a forward pass; activations are computed again."""
    options = {"reshard_after_forward": False, "activation_checkpointing": True}
    resumed_is_uninterrupted(folder, "SHARDED_STATE_DICT", **options)


def check_saved_before_the_first_step(folder: Path) -> None:
    """To save an optimizer without a state, torch steps it once, at a rate of 0: that is no step."""
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        run = Run(kind)
        run.accelerator.save_state(folder / kind)
        assert run.ema.empty
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0  # of a warm-up
        assert run.train(last=4).ema.count == 2


def check_saved(folder: Path) -> None:
    """One file, and what one process reads of the state."""
    run = Run("SHARDED_STATE_DICT").train(last=4)
    run.ema.save(folder / "averaged.safetensors")
    expected = {n: whole(t) for n, t in run.ema.averaged_tensors().items()}
    run.accelerator.save_state(folder / "state")
    if torch.distributed.get_rank() == 0:
        model = Model()
        one = polyak.Average(model, EMA)
        one.load(folder / "averaged.safetensors")
        assert one.averaged_tensors().keys() == expected.keys()
        assert all(torch.equal(t, expected[n]) for n, t in one.averaged_tensors().items())
        torch.save(expected, folder / "expected.pt")


def refused(kind: type[Exception], call: Any, *words: str) -> None:
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(f"{words}: not refused")


def check_bad_input(folder: Path) -> None:
    run = Run().train(last=4)
    with run.ema.applied():
        save = run.accelerator.save_state
        refused(UsageError, lambda: save(folder / "lent"), "inside applied()", "remove it")
    save(folder / "state")
    del run
    slow = Run()
    slow.ema.detach()
    other = polyak.Average(slow.model, polyak.SWA())
    track(slow.accelerator, other, "slow")
    refused(
        ArgumentError,
        lambda: slow.accelerator.load_state(folder / "state"),
        "no average 'slow'",
        "have been loaded",
    )
    start = Run(missing="start")
    start.train(last=2)
    if torch.distributed.get_rank() == 0:
        for path in (folder / "state" / "average").iterdir():
            path.unlink()
        (folder / "state" / "average").rmdir()
    torch.distributed.barrier()
    start.accelerator.load_state(folder / "state")
    assert start.ema.empty
    assert start.several["swa"].count == 2
    third = Run()
    third.several.detach()
    track(third.accelerator, polyak.Average(third.model, "swa"), "mine")
    third.train(last=2).accelerator.save_state(folder / "third")
    fourth = Run()
    track(fourth.accelerator, polyak.Average(fourth.model, EMA), "mine")
    load = fourth.accelerator.load_state
    refused(MismatchError, lambda: load(folder / "third"), "profile", "have been loaded")


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name[:6] == "check_"}


def run(rank: int, n_ranks: int, folder: str, port: int) -> None:
    """One rank: run the checks, and write what each has said."""
    become_rank(rank, n_ranks, port, ACCELERATE_USE_CPU="true")
    accelerator_of("FULL_STATE_DICT")
    run_checks(CHECKS, Path(folder, f"{rank}.json"), Path(folder))
    torch.distributed.destroy_process_group()
