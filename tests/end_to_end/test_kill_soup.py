"""`polyak soup` that is killed while it evaluates, or while it mixes, ends in the same bytes."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

JUDGED = """
import os
from pathlib import Path
import torch

def val_loss(state):
    calls = Path("calls").read_text().count("x") if Path("calls").exists() else 0
    with open("calls", "a") as file:
        file.write("x")
    if Path("pull").exists() and calls == int(Path("pull").read_text()):
        os.kill(os.getpid(), 9)
    return (state["w"].double() - 1).square().mean(1)
"""

# Kills in the middle of a merge: the engine's third call of `mark` in the second mix.
MERGING = """
import os, sys
from polyak.checkpoints.merging import journal
from polyak.cli.app import run

begun, mark = 0, journal.Journal.mark

def counted(self, index, checksums):
    global begun
    begun += 1
    mark(self, index, checksums)
    if begun == 20:
        os.kill(os.getpid(), 9)

journal.Journal.mark = counted
run(sys.argv[1:])
"""


def soup(folder, output, *, prefix=("-m", "polyak")):
    command = [sys.executable, *prefix, "soup", *(f"run-{n}.pt" for n in "abcde")]
    command += ["-o", output, "--evaluate", "judged:val_loss"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    numbers = np.random.default_rng(0)
    for name in "abcde":
        noise = torch.from_numpy(numbers.normal(size=(800, 1000)).astype(np.float32))
        torch.save({"w": (1 + 0.3 * noise).bfloat16()}, tmp_path / f"run-{name}.pt")
    (tmp_path / "judged.py").write_text(JUDGED)
    return tmp_path


def test_a_killed_soup_continues(folder):
    whole = soup(folder, "whole.pt")
    assert whole.returncode == 0, whole.stderr
    assert len((folder / "calls").read_text()) == 9
    for scores in (folder / ".scores").iterdir():
        scores.unlink()
    (folder / "pull").write_text("16")  # the eighth evaluation
    assert soup(folder, "soup.pt").returncode == -signal.SIGKILL
    left = {path.name for path in (folder / ".soup.pt.soup").iterdir()}
    assert sum(name.startswith("mix-") for name in left) == 2
    (folder / "pull").unlink()
    for scores in (folder / ".scores").iterdir():
        torn = scores
    torn.write_bytes(torn.read_bytes()[:20])
    again = soup(folder, "soup.pt")
    assert again.returncode == 0, again.stderr
    assert "3 evaluations, 6 more were known" in again.stdout
    assert (folder / "soup.pt").read_bytes() == (folder / "whole.pt").read_bytes()
    (folder / "merging.py").write_text(MERGING)
    for scores in (folder / ".scores").iterdir():
        scores.unlink()
    assert soup(folder, "cut.pt", prefix=("merging.py",)).returncode == -signal.SIGKILL
    assert not (folder / "cut.pt").exists()
    again = soup(folder, "cut.pt")
    assert again.returncode == 0, again.stderr
    assert (folder / "cut.pt").read_bytes() == (folder / "whole.pt").read_bytes()
    hidden = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert hidden == {".scores"}
