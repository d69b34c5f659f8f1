"""A search that is killed or stopped in the middle continues where it was."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import polyak

JUDGED = """
import os
from pathlib import Path

def val_loss(state):
    value = float((state["weight"][0, 0] - 80).abs())
    with open("calls", "a") as file:
        file.write(f"{value}\\n")
    calls = Path("calls").read_text().count("\\n")
    if Path("pull").exists() and calls == 6:
        os.kill(os.getpid(), int(Path("pull").read_text()))
    return value
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_known_scores_are_not_evaluated_again(tmp_path, number):
    model = torch.nn.Linear(2, 1)
    with polyak.Recorder(model, tmp_path / "record", interval=10, captures=5) as recorder:
        for step in range(160):
            torch.nn.init.constant_(model.weight, step)
            recorder.update()
    (tmp_path / "judged.py").write_text(JUDGED)
    (tmp_path / "pull").write_text(str(int(number)))
    command = [sys.executable, "-m", "polyak", "search", "record", "--evaluate", "judged:val_loss"]
    again = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120, "check": False}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env=environment, **again)
    if number == signal.SIGINT:
        assert first.returncode == 130
        assert "5 scores are kept" in first.stderr
    else:
        assert first.returncode == -signal.SIGKILL
    (tmp_path / "pull").unlink()
    torn = next((tmp_path / "record" / ".scores").iterdir())
    torn.write_bytes(torn.read_bytes()[:20])
    second = subprocess.run(command, env=environment, **again)
    assert second.returncode == 0, second.stderr
    assert "13 evaluations, 4 more were known" in second.stdout
    assert len((tmp_path / "calls").read_text().splitlines()) == 6 + 13
    best = re.search(r"Best: (\S+) at (\d+) steps", second.stdout)
    found = polyak.Trajectory(tmp_path / "record").search(
        lambda state: (state["weight"][0, 0] - 80).abs(), minimize=True, cache=False
    )
    assert (best[1], float(best[2])) == (found.best.profile, found.best.until)
