"""A few runs killed at random moments; `scripts/kill_train.py` by itself makes it fifty."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_train.py"


@pytest.mark.parametrize("task", ["images", "words"])
def test_killed_runs_end_in_the_same_bits(task):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "3", "--task", task],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, byte for byte" in done.stdout
