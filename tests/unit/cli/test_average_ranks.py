"""`polyak average` as torchrun starts it: each process takes its part, one of them speaks."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from polyak import open_checkpoint


def test_ranks_share_the_work(tmp_path):
    torch.manual_seed(0)
    base = torch.randn(200, 100)
    for step in (1, 2, 3):
        torch.save({"w": base + step}, tmp_path / f"step-{step}.pt")
    inputs = [str(tmp_path / f"step-{step}.pt") for step in (1, 2, 3)]
    command = [
        sys.executable,
        "-m",
        "polyak",
        "average",
        *inputs,
        "-o",
        str(tmp_path / "out"),
        "--format",
        "dcp",
    ]
    said = []
    for rank in (1, 0, 2):
        ranks = {"TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "WORLD_SIZE": "3"}
        done = subprocess.run(
            command,
            env=os.environ | ranks,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == ""
    assert "Inputs: 3 taken" in said[1]
    assert "the last of the others will publish" in said[1]
    assert "swa" in said[2].lower()
    with open_checkpoint(tmp_path / "out") as opened:
        torch.testing.assert_close(opened.tensors["w"].load(), base + 2)


def test_the_plan_says_tokens_and_the_spread(tmp_path, capsys):
    from polyak.cli import app

    torch.manual_seed(0)
    base = torch.randn(100, 100)
    for step in (1, 2):
        torch.save({"w": base + 0.1 * torch.randn(100, 100)}, tmp_path / f"step-{step}.pt")
    (tmp_path / "table.csv").write_text("step,tokens\n1,1000\n2,2000\n")
    arguments = [
        "average", *(str(tmp_path / f"step-{step}.pt") for step in (1, 2)), "-o", str(tmp_path / "o"),
        "--steps-unit", "tokens", "--steps-from", str(tmp_path / "table.csv"), "--dry-run",
    ]  # fmt: skip
    app.app(arguments, result_action="return_value")
    said = capsys.readouterr().out
    assert "tokens" in said
    assert "2000" in said
    assert "spread" in said
    assert not (tmp_path / "o").exists()
