"""`polyak landscape line`, `plane` and `rays`."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from reference import programs
from torch import nn

import polyak
from polyak.cli.app import run

MODULE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

def batches():
    x = torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    return [(x, x.sum(1).gt(0).long())]

def data():
    return [batches()[0][0]]

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

def nan(state):
    return float("nan")

def distance(state):
    return float(state["0.weight"].double().square().sum())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "judged.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judged", raising=False)
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    return tmp_path


JUDGED = ["--model", "judged:model", "--validation", "judged:batches", "--data", "judged:data"]
STALE = pytest.mark.filterwarnings("ignore::polyak.errors.StaleStatistics")
PLAIN = ["--evaluate", "judged:distance", "--minimize"]


def words(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_a_line_its_files_and_a_finer_one_later(folder, capsys):
    line = ["landscape", "line", "a.pt", "b.pt", "c.pt", *JUDGED]
    assert run([*line, "--points", "3", "-o", "line.json", "-o", "line.csv", "-o", "line.svg"]) == 0
    said = capsys.readouterr()
    assert re.search(r"Barrier from a\.pt to b\.pt: .* 95% interval", said.out)
    assert "StaleStatistics" not in said.err
    values = json.loads((folder / "line.json").read_text())["values"]
    rows = list(csv.reader((folder / "line.csv").read_text().splitlines()))[1:]
    assert [float(row[2]) for row in rows] == values
    assert len(values) == 5
    assert run([*line, "--points", "5", "-o", "line.json"]) == 1
    assert "pass --overwrite" in words(capsys)
    assert run([*line, "--points", "5", "-o", "line.json", "--overwrite"]) == 0
    assert "4 evaluations, 5 more were known" in capsys.readouterr().out


@STALE
def test_a_program_judges_a_plane(folder, capsys):
    (folder / "eval.py").write_text(
        f"{programs.READS}print(sum(v * v for v in read(sys.argv[1], '0.weight')[1]))\n"
    )
    command = [f"--command={sys.executable} -I -S eval.py {{file}}", "--minimize"]
    assert (
        run(
            ["landscape", "plane", "a.pt", "b.pt", "c.pt", *command, "--points", "3", "-o", "p.csv"]
        )
        == 0
    )
    assert "12 evaluations" in capsys.readouterr().out
    twin = ["landscape", "plane", "a.pt", "b.pt", "c.pt", *PLAIN, "--points", "3", "-o", "q.csv"]
    assert run(twin) == 0
    rows = [(folder / name).read_text().splitlines()[1:] for name in ("p.csv", "q.csv")]
    for one, other in zip(*rows, strict=True):
        assert list(map(float, one.split(","))) == pytest.approx(list(map(float, other.split(","))))


@STALE
def test_a_record(folder, capsys):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with polyak.Recorder(model, folder / "record", interval=5) as recorder:
        for _ in range(40):
            with torch.no_grad():
                model[0].weight.add_(0.1 * torch.randn(3, 2))
            recorder.update()
    record = ["--trajectory", "record", *PLAIN]
    assert run(["landscape", "plane", *record, "--points", "3"]) == 0
    assert "of the variance of the intervals" in capsys.readouterr().out
    assert (
        run(
            ["landscape", "plane", "first", "last", "ema:half_life=10@30", *record, "--points", "3"]
        )
        == 0
    )
    assert "ema:half_life=10@30 at" in capsys.readouterr().out
    assert (
        run(["landscape", "rays", *record, "--rays", "2", "--points", "3", "--normalize", "filter"])
        == 0
    )
    assert re.search(r"^last .*^mean ", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
    assert run(["landscape", "line", *record, "--points", "3"]) == 0
    assert run(["landscape", "line", *record, "--points", "3"]) == 0
    assert "0 evaluations, 3 more were known" in capsys.readouterr().out
    assert run(["landscape", "line", "first", "mean@soon", *record]) == 2
    assert "'mean@soon' names no moment after @" in words(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["line", *PLAIN], "There is no input; name checkpoints"),
        (["line", "a.pt", *PLAIN], "There is 1 checkpoint; a line needs two or more"),
        (["line", "a.pt", "a.pt", *PLAIN], "a.pt is named twice"),
        (["line", "a.pt", "./a.pt", *PLAIN], "a.pt is named twice"),
        (["line", "a.pt", "nowhere.pt", *PLAIN], "nowhere.pt"),
        (["line", "a.pt", "b.pt"], "0 evaluations are named; expected one of --validation"),
        (["line", "a.pt", "b.pt", "--evaluate", "judged:nan", "--minimize"], "The score of a.pt is nan"),
        (["line", "a.pt", "b.pt", *PLAIN, "-o", "line.gif"], "ends in '.gif'; expected .json"),
        (["line", "a.pt", "b.pt", *PLAIN, "-o", "no/line.svg"], "There is no folder no for line.svg"),
        (["line", "a.pt", "b.pt", *PLAIN, "-o", "l.svg", "-o", "l.svg"], "same output is named twice"),
        (["line", "a.pt", "b.pt", *PLAIN, "--data", "judged:data"], "pass --model too"),
        (["line", "a.pt", "b.pt", *PLAIN, "--points", "2"], "--points is 2; expected 3 or more"),
        (["plane", "a.pt", "b.pt", *PLAIN], "a plane needs three"),
        (["rays", "a.pt", *PLAIN, "--reach", "-1"], "--reach is -1"),
        (["plane", "--trajectory", "nowhere", *PLAIN], "There is no folder nowhere"),
    ],
)  # fmt: skip
@STALE
def test_what_goes_wrong(folder, capsys, arguments, message):
    before = set(folder.iterdir())
    assert run(["landscape", *arguments]) in (1, 2)
    assert message in words(capsys)
    assert set(folder.iterdir()) - before <= {folder / "__pycache__"}


def test_one_warning_of_statistics(folder, capsys):
    with pytest.warns(polyak.errors.StaleStatistics) as caught:
        assert run(["landscape", "line", "a.pt", "b.pt", "--points", "5", *JUDGED[:4]]) == 0
    assert len(caught) == 1


@pytest.mark.parametrize("arguments", [["nonsense"], ["line", "--nonsense"], ["curvature", "a.pt"]])
def test_what_is_no_command(folder, capsys, arguments):
    with pytest.raises(SystemExit) as left:
        run(["landscape", *arguments])
    assert left.value.code != 0


def test_the_commands_are_listed(capsys):
    assert run(["landscape", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("line", "plane", "rays"))


def test_a_curve_is_trained_and_followed(folder, capsys):
    connect = [
        "landscape",
        "connect",
        "a.pt",
        "b.pt",
        "--model",
        "judged:model",
        "--data",
        "judged:batches",
    ]
    connect += ["--loss", "judged:loss", "-o", "bend.safetensors"]
    assert run([*connect, "--epochs", "2"]) == 0
    assert re.search(
        r"bend.safetensors: the mean loss on the curve went from", capsys.readouterr().out
    )
    assert run(connect) == 1
    assert "pass --overwrite" in words(capsys)
    line = ["landscape", "line", "--curve", "bend.safetensors", *JUDGED, "--points", "5"]
    assert run([*line, "a.pt", "b.pt"]) == 0
    assert "Barrier from a.pt to b.pt" in capsys.readouterr().out
    for taken in ("a.pt", "./b.pt"):
        before = Path(taken).read_bytes()
        assert run([*connect[:-1], taken, "--overwrite"]) == 2
        assert "is an input" in words(capsys)
        assert Path(taken).read_bytes() == before
    assert run([*line, "a.pt", "c.pt"]) == 2
    assert "between other checkpoints than a.pt and c.pt" in words(capsys)


def test_curvature_of_each_checkpoint(folder, capsys):
    flags = ["--model", "judged:model", "--data", "judged:batches", "--loss", "judged:loss"]
    assert run(["landscape", "curvature", "a.pt", "b.pt", *flags, "--k", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    import judged

    for name, line in zip(("a.pt", "b.pt"), said, strict=True):
        model = judged.model()
        model.load_state_dict(torch.load(folder / name))
        found = polyak.study.hessian_eigenvalues(model, judged.loss, judged.batches(), k=2)
        assert line == f"{name}: {found}"
    assert run(["landscape", "curvature", *flags]) == 2
    assert "There is no input" in words(capsys)
    torch.save({"w": torch.ones(2)}, folder / "other.pt")
    assert run(["landscape", "curvature", "a.pt", "other.pt", *flags]) == 1
    said = capsys.readouterr()
    assert "other.pt holds no weights of this model" in " ".join(said.err.split())
    assert not said.out  # it is refused before anything is computed
    assert run(["landscape", "curvature", "a.pt", *flags, "--k", "0"]) == 2
    assert "--k is 0" in words(capsys)


@STALE
def test_without_an_output_scores_are_kept_in_the_folder_that_one_is_in(folder, capsys):
    asked = ["landscape", "line", "a.pt", "b.pt", "--points", "5", *PLAIN]
    assert run(asked) == 0
    assert "5 evaluations, 0 more were known" in capsys.readouterr().out
    assert run(asked) == 0
    assert "0 evaluations, 5 more were known" in capsys.readouterr().out
    assert (folder / ".scores").is_dir()
