"""What averages of sharded models feed: followers, the model, a record, scores; in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from reference import sharded_feeding_runs
from reference.ranks import check_said, free_port, launch, said_in

N_RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("feeding")
    launch(sharded_feeding_runs.run, N_RANKS, str(path), free_port())
    return path


@pytest.mark.parametrize("name", sharded_feeding_runs.CHECKS)
def test_feeding(folder: Path, name: str) -> None:
    check_said(said_in(folder, N_RANKS), name)
