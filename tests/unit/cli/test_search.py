"""`polyak search`, `decay` and `stop`."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from reference import programs
from safetensors.torch import load_file
from torch import nn

import polyak
from polyak.cli.app import run

MODULE = """
import time
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

def plain():
    return nn.Linear(2, 1)

def data():
    torch.manual_seed(0)
    return [torch.randn(16, 2)]

def validation():
    torch.manual_seed(0)
    inputs = torch.randn(90, 2)
    return [(inputs, inputs.sum(1).gt(0).long())]

def distance(state):
    return float((state["weight"][0, 0] - 80).abs())

def val_loss(model):
    return torch.zeros(10)

def nothing(state):
    return None

def asleep(state):
    time.sleep(60)
"""


@pytest.fixture
def record(tmp_path, monkeypatch):
    (tmp_path / "judged.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judged", raising=False)
    return make(tmp_path / "record", nn.Linear(2, 1))


def make(folder, model):
    with polyak.Recorder(model, folder, interval=10, captures=5) as made:
        for step in range(1, 161):
            nn.init.constant_(next(model.parameters()), step)
            made.update()
    return folder


def words(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_a_function_the_page_and_the_best_average(record, tmp_path, capsys):
    flags = ["--evaluate", "judged:distance", "--minimize"]
    best, page = tmp_path / "best.safetensors", tmp_path / "page.html"
    done = run(["search", str(record), *flags, "-o", str(best), "--report", str(page)])
    said = capsys.readouterr().out
    assert done == 0
    assert "17 evaluations, 0 more were known" in said
    chosen = re.search(r"Best: (\S+) at (\d+) steps", said)
    expected = polyak.Trajectory(record).average(chosen[1], float(chosen[2]))
    assert torch.equal(load_file(best)["weight"], expected["weight"])
    assert "Which average is best" in page.read_text()
    assert run(["search", str(record), *flags]) == 0
    assert "0 evaluations, 17 more were known" in capsys.readouterr().out
    assert run(["search", str(record), *flags, "-o", str(best)]) == 1
    assert "pass --overwrite" in words(capsys)


def test_a_program(record, tmp_path, capsys):
    (tmp_path / "eval.py").write_text(
        f"{programs.READS}print('loss of 3 batches:', abs(read(sys.argv[1], 'weight')[1][0] - 80))\n"
    )
    command = f"{sys.executable} -I -S eval.py {{file}}"
    flags = ["--command", command, "--minimize", "--evaluations", "2", "--quick"]
    assert run(["search", str(record), *flags]) == 0
    assert re.search(r"swa:start=80\b", capsys.readouterr().out)
    assert run(["search", str(record), *flags]) == 0
    assert "0 evaluations" in capsys.readouterr().out
    (tmp_path / "eval.py").write_text("print('epoch 1'); print('score: -2.5e1 (best)')")
    assert run(["search", str(record), *flags]) == 0
    assert "score −25" in capsys.readouterr().out  # another program, other scores


def test_a_classifier_with_statistics_of_its_own(record, tmp_path, capsys):
    torch.manual_seed(0)
    normed = make(tmp_path / "normed", nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    flags = [
        "--validation",
        "judged:validation",
        "--model",
        "judged:model",
        "--data",
        "judged:data",
    ]
    best = tmp_path / "best.safetensors"
    assert run(["search", str(normed), *flags, "--quick", "-o", str(best)]) == 0
    said = capsys.readouterr()
    assert "Chosen on 45 examples, compared on 45 others" in said.out
    assert not said.err.count("StaleStatistics")
    import judged

    model = judged.model()
    model.load_state_dict(load_file(best))
    inside = model[0](judged.data()[0])
    assert torch.allclose(model[1].running_mean, inside.mean(0), atol=1e-3)


@pytest.mark.parametrize("question", ["decay", "stop"])
def test_the_other_questions(record, tmp_path, capsys, question):
    flags = ["--evaluate", "judged:distance", "--minimize", "--points", "4"]
    page = tmp_path / "page.html"
    assert run([question, str(record), *flags, "--report", str(page)]) == 0
    assert "of the run" in capsys.readouterr().out
    assert page.exists()


@pytest.mark.parametrize("rule", ["swad", "two-tailed"])
def test_a_rule_instead_of_a_search(record, tmp_path, capsys, rule):
    flags = ["--evaluate", "judged:distance", "--minimize", "--rule", rule]
    best, page = tmp_path / "best.safetensors", tmp_path / "page.html"
    assert run(["search", str(record), *flags, "-o", str(best), "--report", str(page)]) == 0
    said = capsys.readouterr().out
    chosen = re.search(r"Chosen by the rule: (\S+) at (\d+) steps", said)
    expected = polyak.Trajectory(record).average(chosen[1], float(chosen[2]))
    assert torch.equal(load_file(best)["weight"], expected["weight"])
    assert page.exists()


def test_checkpoints_instead_of_a_record(record, tmp_path, capsys):
    for step in (10, 20, 30, 40):
        torch.save({"weight": torch.full((1, 2), float(step))}, tmp_path / f"step-{step}.pt")
    flags = ["--evaluate", "judged:distance", "--minimize"]
    assert run(["search", str(tmp_path / "step-*.pt"), *flags]) == 0
    assert "Best: swa" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "0 evaluations are named; expected one of --validation"),
        (["--evaluate", "judged:distance", "--command", "x {file}"], "2 evaluations are named"),
        (["--evaluate", "judged:distance"], "Pass --minimize for a loss or an error, or pass --maximize"),
        (["--validation", "judged:validation"], "needs the classifier: --model"),
        (["--command", "true", "--minimize"], "does not say where the file goes"),
        (["--command", "./nowhere {file}", "--minimize"], "does not start"),
        (["--command", "false {file}", "--minimize"], "failed with exit code 1"),
        (["--command", "echo nothing{file}", "--minimize"], "printed no number"),
        (["--command", "sh -c 'sleep 60 & sleep 60' {file}", "--minimize", "--timeout", "0.2"], "longer than 0.2 s"),
        (["--evaluate", "judged:asleep", "--minimize", "--timeout", "0.1"], "Pass --timeout"),
        (["--evaluate", "judged:nothing", "--minimize"], "returned NoneType"),
        (["--evaluate", "judged:nowhere", "--minimize"], "has nothing at nowhere"),
        (["--evaluate", "judged:val_loss", "--model", "judged:model"], "is not the record of this model"),
        (["--evaluate", "judged:distance", "--minimize", "--until", "500"], "--until is 500"),
        (["--evaluate", "judged:distance", "--minimize", "--data", "judged:data"], "needs the model"),
        (["--evaluate", "judged:distance", "--minimize", "--holdout", "2"], "--holdout is 2"),
    ],
)  # fmt: skip
def test_what_goes_wrong(record, capsys, flags, message):
    assert run(["search", str(record), *flags]) in (1, 2)
    assert message in words(capsys)


def test_an_input_that_is_none(record, tmp_path, capsys):
    flags = ["--evaluate", "judged:distance", "--minimize"]
    assert run(["search", str(tmp_path / "nowhere"), *flags]) == 2
    assert run(["search", *flags]) == 2
    assert "There is no input" in words(capsys)
