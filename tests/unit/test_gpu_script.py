"""`benchmarks/gpu.sh` says when a part of it has failed: run with programs in place of a GPU's."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PROGRAM = """#!/bin/sh
case "$*" in *"$FAILS"*) exit 3 ;; esac
echo ran
"""


@pytest.mark.parametrize(
    "fails", ["update_bn.py", "gpu_table.py", "update.py", "test_kernels", "query-gpu", ""]
)
def test_the_exit_code(tmp_path, fails):
    for name in ("python3", "nvidia-smi"):
        program = tmp_path / name
        program.write_text(PROGRAM)
        program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FAILS": fails or "none at all",
    }
    done = subprocess.run(
        ["sh", SCRIPT, tmp_path / "out"], env=environment, capture_output=True, check=False
    )
    assert done.returncode == bool(fails)
    assert (tmp_path / "out" / "figures.jsonl").exists()
