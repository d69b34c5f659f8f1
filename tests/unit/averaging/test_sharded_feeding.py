"""What averages of sharded models feed: followers, the model, a record; in two processes."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from reference import sharded_feeding_runs
from reference.ranks import launch

N_RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("feeding")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch(sharded_feeding_runs.run, N_RANKS, str(path), port)
    return path


@pytest.mark.parametrize("name", sharded_feeding_runs.CHECKS)
def test_feeding(folder: Path, name: str) -> None:
    for rank in range(N_RANKS):
        said = json.loads((folder / f"{rank}.json").read_text())
        text = said.get(name, "was not run: an earlier one has failed, or hangs")
        assert text == "ok", f"rank {rank}: {text}"
