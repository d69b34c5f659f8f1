"""`polyak schedule`, and what the command line costs before it does anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from polyak.cli.app import run


def test_the_classical_schedule(capsys):
    assert run(["schedule"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    averaged = [line for line in lines if line[1:2] == ["steps"] and len(line) == 3]
    assert [line[0] for line in averaged] == ["100", "110", "120", "130", "140"]
    assert [line[2] for line in averaged[1:]] == ["0.01"] * 4
    assert ["0", "to", "49", "Constant(rate=0.1)", "0.1", "0.1"] in lines


def test_many_points_are_cut_in_the_middle(capsys):
    assert run(["schedule", "cyclic:high=0.1,low=0.01,cycle=2,steps=100"]) == 0
    out = capsys.readouterr().out
    assert "39 more" in out
    assert "100 steps" in out
    assert "none yet" in out  # the weights that enter the first cycle


def test_a_schedule_without_cycles(capsys):
    assert run(["schedule", "constant:rate=0.1,steps=4"]) == 0
    assert "Nothing is averaged" in capsys.readouterr().out


def test_the_picture(tmp_path, capsys):
    target = tmp_path / "schedule.png"
    assert run(["schedule", "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    before = target.stat()
    assert run(["schedule", "--plot", str(target)]) != 0
    assert "exists" in capsys.readouterr().err
    assert target.stat() == before
    assert run(["schedule", "--plot", str(target), "--overwrite"]) == 0
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cyclic:0.1"], "Name the parameter"),
        (["constant:rate=0.1"], "needs steps"),
        (["constant:rate=-1,steps=5"], "0 or more"),
        (["--plot", "picture.xyz"], ".png"),
    ],
)
def test_what_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["schedule", *arguments]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["schedule"], ["schedule", "--help"]], ids=" ".join
)
def test_no_torch_and_no_matplotlib_where_none_is_needed(arguments):
    code = (
        "import sys; from polyak.cli.app import run; assert run(sys.argv[1:]) == 0; "
        "heavy = {'torch', 'numpy.testing', 'matplotlib', 'safetensors'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_import_polyak_costs_nothing():
    code = "import sys, polyak; assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
