"""`polyak soup`: the plan, what is printed, and messages in the words of the command line."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyak.cli.app import run

MODULE = """
import torch

def val_loss(state):
    return (state["w"].double() - 1).square().mean(1)

def val_accuracy(state):
    return float("nan")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judged_soup.py").write_text(MODULE)
    torch.manual_seed(0)
    for name, scale in zip("abc", (0.2, 0.25, 5), strict=True):
        (tmp_path / f"run-{name}").mkdir()
        save_file(
            {"w": 1 + scale * torch.randn(20, 30)}, tmp_path / f"run-{name}" / "model.safetensors"
        )
    return tmp_path


RUNS = ["run-a", "run-b", "run-c"]


def test_a_soup_of_folders(folder, capsys):
    asked = ["soup", *RUNS, "-o", "soup", "--evaluate", "judged_soup:val_loss"]
    assert run([*asked, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "Ingredient: run-b" in planned
    assert "greedy soup of 3: at most 5 evaluations, at most 14.4 kB to read" in planned
    assert not (folder / "soup").exists()
    assert not (folder / ".scores").exists()
    assert run(asked) == 0
    said = capsys.readouterr().out
    assert "the soup with run-b: 0.0" in said
    assert "soup: greedy soup of 2 of 3 (lower is better)" in said
    assert "the soup minus the best ingredient: −0.0" in said
    made = load_file(folder / "soup" / "model.safetensors")["w"]
    runs = [load_file(folder / f"run-{name}" / "model.safetensors")["w"] for name in "ab"]
    torch.testing.assert_close(made, sum(runs) / 2)


def test_methods_and_options(folder, capsys):
    score = ["--evaluate", "judged_soup:val_loss"]
    assert run(["soup", *RUNS, "-o", "u.pt", "--method", "uniform", "--dtype", "bfloat16"]) == 0
    assert torch.load(folder / "u.pt")["w"].dtype == torch.bfloat16
    assert run(["soup", *RUNS, "-o", "l.pt", "--method", "learned", *score]) == 0
    assert (
        run(["soup", "run-b", "run-c", "-o", "s.pt", "--method", "model-stock", "--base", "run-a"])
        == 0
    )
    said = capsys.readouterr().out
    assert "model-stock soup of 2 of 2" in said
    assert "of the mean of the inputs, the rest of the base" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "s.pt"], 2, "Pass --evaluate, or take another method"),
        (["-o", "s.pt", "--evaluate", "judged_soup:val_accuracy"], 1, "score of run-a is nan"),
        (["-o", "s.pt", "--evaluate", "judged_soup:val_loss", "--command", "x {file}"], 2, "2 evaluations are named"),
        (["-o", "run-a", "--method", "uniform", "--overwrite"], 2, "is an input, or holds one"),
        (["-o", "s.pt", "--method", "model-stock"], 2, "Pass --base PATH"),
    ],
)  # fmt: skip
def test_mistakes(folder, capsys, arguments, code, message):
    assert run(["soup", *RUNS, *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (folder / "s.pt").exists()
