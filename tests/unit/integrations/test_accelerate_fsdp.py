"""Averages under Accelerate's FSDP2, in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference import accelerate_fsdp_runs
from reference.ranks import check_said, free_port, launch, said_in

import polyak
import polyak.sharded
from polyak.checkpoints import open_checkpoint

N_RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("accelerate")
    launch(accelerate_fsdp_runs.run, N_RANKS, str(path), free_port())
    return path


@pytest.mark.parametrize("name", accelerate_fsdp_runs.CHECKS)
def test_fsdp2(folder: Path, name: str) -> None:
    check_said(said_in(folder, N_RANKS), name)


def test_one_process_reads_it(folder: Path) -> None:
    saved = folder / "saved"
    average = polyak.Average(accelerate_fsdp_runs.Model(), accelerate_fsdp_runs.EMA)
    polyak.sharded.load(average, saved / "state" / "average")
    expected = torch.load(saved / "expected.pt")
    assert average.count == 2
    assert all(torch.equal(t, expected[n]) for n, t in average.averaged_tensors().items())
    for state in (saved / "state", folder / "full" / "state"):
        with open_checkpoint(state) as model:
            assert model.tensors.keys() == expected.keys()
