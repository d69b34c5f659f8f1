"""Averages of sharded models on real processes; and the kinds of sharding that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import sharded_averages, sharded_runs
from reference.ranks import check_said, launch, said_in
from torch import nn

from polyak import SWA, Average, Averages
from polyak.errors import ArgumentError

NAMES = {2: tuple(sharded_runs.CHECKS), 4: sharded_runs.ON_FOUR}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[int, list[dict[str, str]]]:
    """What each rank says of each check."""
    for n_ranks, names in NAMES.items():
        launch(sharded_runs.run, n_ranks, str(folder), names)
    return {n_ranks: said_in(folder / str(n_ranks), n_ranks) for n_ranks in NAMES}


@pytest.mark.parametrize(
    ("n_ranks", "name"), [(n_ranks, name) for n_ranks in NAMES for name in NAMES[n_ranks]]
)
def test_sharded(said: dict[int, list[dict[str, str]]], n_ranks: int, name: str) -> None:
    check_said(said[n_ranks], name)


@pytest.mark.parametrize("n_ranks", [1, 3, 4])
@pytest.mark.usefixtures("said")
def test_resumed_on_other_ranks(folder: Path, n_ranks: int) -> None:
    saved = folder / "2" / "distributed_checkpoint"
    launch(sharded_runs.run_resume, n_ranks, str(folder), str(saved))
    for rank in range(n_ranks):
        text = json.loads((folder / f"resume-{n_ranks}-{rank}.json").read_text())["resume"]
        assert text == "ok", text


def test_fsdp1_in_two_processes(tmp_path: Path) -> None:
    launch(lambda rank, n, folder: sharded_averages.try_all(rank, folder), 2, str(tmp_path))
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(found) == 2 * 6
        for name, text in found.items():
            assert "is sharded (a" in text, f"{name}: {text}"
            assert "fully_shard (FSDP2)" in text
            assert "polyak.average_checkpoints" in text
        assert "FullyShardedDataParallel" in found["fsdp1 True whole"]
        assert "0 is sharded" in found["fsdp1 True wrapped since, update"]


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
