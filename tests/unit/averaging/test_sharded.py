"""Sharded models are refused by what they are, before anything of them is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import sharded_averages
from torch import multiprocessing, nn

from polyak import SWA, Average, Averages
from polyak.errors import ArgumentError


def test_fsdp_in_two_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=sharded_averages.try_all, args=(rank, str(tmp_path)))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(found) == 2 * 6 + 5
        for name, text in found.items():
            assert "is sharded (a" in text, f"{name}: {text}"
            assert "not supported yet" in text
            assert "polyak.average_checkpoints" in text
        assert "FullyShardedDataParallel" in found["fsdp1 True whole"]
        assert "0 is sharded" in found["fsdp1 True wrapped since, update"]
        assert "FSDPModule" in found["fsdp2 unsharded"]
        assert "weight is sharded (a DTensor)" in found["fsdp2 a layer of it"]


@pytest.mark.parametrize("status", ["partitioned", "gathered"])
def test_parameters_of_deepspeed_are_refused_whole_or_not(status: str) -> None:
    model = nn.Linear(3, 2)
    average = Average(model, SWA())
    average.update()
    for parameter in model.parameters():
        parameter.ds_id = 0
        if status == "partitioned":
            parameter.data = torch.empty(0)
    for what in (Average(model, SWA()), Averages(model, {"a": SWA()})):
        with pytest.raises(ArgumentError, match=r"weight is sharded \(a parameter of DeepSpeed"):
            what.update()


def test_another_framework_s_class_of_that_name() -> None:
    class XlaFullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = nn.Sequential(XlaFullyShardedDataParallel(nn.Linear(2, 2)))
    with pytest.raises(ArgumentError, match=r"0 is sharded \(a Xla.*average_checkpoints"):
        Average(model, SWA())


def test_master_copies_and_partitions_are_told_what_to_do() -> None:
    """As ZeRO 1 and 2, and mixed precision with float32 copies: the optimizer inside steps others."""

    class Partitioned:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            flat = torch.cat([p.detach().reshape(-1) for p in parameters])
            self.optimizer = torch.optim.AdamW([nn.Parameter(flat)])

        def step(self) -> None:
            self.optimizer.step()

    model = nn.Linear(3, 2)
    with pytest.raises(
        ArgumentError,
        match=r"DeepSpeed ZeRO stages 1 and 2, average.update\(\) after engine.step\(\)",
    ):
        Average(model, SWA()).attach(Partitioned(list(model.parameters())))
