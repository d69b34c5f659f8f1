"""`polyak average` of a record, and `polyak thin`."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import polyak
from polyak.checkpoints import thin_record
from polyak.cli.app import run

WEIGHTS = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
SHORT = {"swa.safetensors": "", "swa.pt": "", "ema.safetensors": ":half_life=20"}


@pytest.fixture
def record(tmp_path):
    model = nn.Linear(2, 2)
    with polyak.Recorder(model, tmp_path / "record", interval=10, captures=5) as made:
        for step in range(1, 161):
            nn.init.constant_(model.weight, step)
            made.update()
    return tmp_path / "record"


def test_several_averages_in_one_pass(record, tmp_path, capsys):
    outputs = [tmp_path / "window.safetensors", tmp_path / "ema.pt"]
    methods = ["window:length=40", "ema:half_life=20"]
    pairs = [
        x for m, o in zip(methods, outputs, strict=True) for x in ("--method", m, "-o", str(o))
    ]
    assert run(["average", str(record), *pairs, "--until", "80"]) == 0
    assert load_file(outputs[0])["weight"][0, 0] == 61
    expected = polyak.Trajectory(record).average("ema:half_life=20", 80)["weight"]
    assert torch.equal(torch.load(outputs[1])["weight"], expected)
    said = capsys.readouterr().out
    assert "window:length=40 at 80 steps" in said
    assert "planned error" in said


def test_a_dry_run_writes_nothing(record, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    assert run(["average", str(record), "-o", str(target), "--dry-run"]) == 0
    assert not target.exists()
    assert "swa at 160 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--last", "3"], "not --weights or a selection"),
        (["--weights", "1"], "not --weights or a selection"),
        (["--base", "x.pt"], "Leave out --base"),
        (["--until", "500"], "--until is 500.0; the record is from 0 to 160 steps"),
        (["--cache-size", "many"], "--cache-size is 'many'"),
    ],
)
def test_what_does_not_fit_a_record(record, tmp_path, capsys, flags, words):
    assert run(["average", str(record), "-o", str(tmp_path / "out.safetensors"), *flags]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_moment_needs_a_record(record, tmp_path, capsys):
    files = sorted(map(str, record.glob("interval-*")))
    assert run(["average", *files, "-o", str(tmp_path / "a.pt"), "--until", "5"]) == 2
    assert "are for the record of a run" in capsys.readouterr().err


def test_thin(record, capsys):
    assert run(["thin", str(record), "--keep", "4"]) == 0
    assert "12 files merged into their neighbours" in capsys.readouterr().out
    assert len(polyak.Trajectory(record).intervals) == 4
    assert run(["thin", str(record), "--keep", "3", "--by", "age"]) == 0
    assert run(["thin", str(record.parent / "nowhere"), "--keep", "3"]) == 2


def test_the_folder_of_a_run_stands_for_the_one_record_in_it(record, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{}")
    made, search = tmp_path / "made.pt", ["--command", "echo {file} 1", "--minimize"]
    assert run(["average", str(tmp_path), "-o", str(made), "--method", "window:length=40"]) == 0
    assert torch.load(made)["weight"][0, 0] == 141
    made.unlink()
    assert run(["stop", str(tmp_path), *search]) == 0
    (tmp_path / "other").mkdir()
    record.rename(tmp_path / "other" / "first")
    second = tmp_path / "other" / "second"
    second.mkdir()
    for one in (tmp_path / "other" / "first").glob("*.safetensors"):
        (second / one.name).write_bytes(one.read_bytes())
    assert run(["average", str(tmp_path), "-o", str(made), "--method", "swa"]) == 2
    assert str(second) in capsys.readouterr().err
    assert run(["thin", str(tmp_path), "--keep", "3"]) == 2
    assert str(second) in capsys.readouterr().err
    assert run(["thin", str(second.parent / "first"), "--keep", "4"]) == 0
    shutil.rmtree(second)
    assert run(["thin", str(tmp_path), "--keep", "3"]) == 0
    assert "first: 1 files merged" in capsys.readouterr().out
    assert thin_record(tmp_path, 2) == 1


def _files(folder):
    for step in (10, 20):
        torch.save(WEIGHTS, folder / f"step-{step}.pt")
    return "checkpoints (step-10.pt, step-20.pt)", f"'{folder / 'step-*.pt'}'"


def _folders(folder):
    for step in (10, 20):
        (folder / f"checkpoint-{step}").mkdir()
        save_file(WEIGHTS, folder / f"checkpoint-{step}" / "model.safetensors")
    return "checkpoints (checkpoint-10, checkpoint-20)", f"'{folder / 'checkpoint-*'}'"


def _numbered_epoch(folder):
    torch.save(WEIGHTS, folder / "epoch_3.ckpt")
    torch.save({"optimizer": {}}, folder / "optimizer.pt")
    return "checkpoints (epoch_3.ckpt)", f"the checkpoints ({folder / 'epoch_3.ckpt'})"


def _final(folder):
    save_file(WEIGHTS, folder / "model.safetensors")
    return "weights of its own", "the file of the weights, or move the record"


def _damaged(folder):
    (folder / "step-10.pt").write_bytes(b"half a file")
    torch.save(WEIGHTS, folder / "step-20.pt")
    return "checkpoints (step-10.pt, step-20.pt)", f"'{folder / 'step-*.pt'}'"


@pytest.mark.parametrize("beside", [_files, _folders, _numbered_epoch, _final, _damaged])
def test_a_folder_with_a_record_and_checkpoints_is_asked_about(record, tmp_path, capsys, beside):
    found, advice = beside(tmp_path)
    target, before = tmp_path.parent / f"{tmp_path.name}.pt", set(tmp_path.rglob("*"))
    search = ["--command", "echo {file} 1", "--minimize"]
    for command in (
        ["average", str(tmp_path), "-o", str(target)],
        ["search", str(tmp_path), *search],
    ):
        assert run(command) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"holds {found}, and the record of a run" in said
        assert f"Name the record ({record}), or " in said
        assert advice in said
    assert set(tmp_path.rglob("*")) == before
    assert not target.exists()
    assert run(["average", str(record), "-o", str(target), "--method", "window:length=40"]) == 0
    assert torch.load(target)["weight"][0, 0] == 141


@pytest.mark.parametrize("names", [["swa.safetensors"], ["swa.pt", "ema.safetensors"]])
def test_averages_beside_a_record_are_no_checkpoints(record, tmp_path, capsys, names):
    for name in names:
        polyak.Trajectory(record).save(tmp_path / name, name.partition(".")[0] + SHORT[name])
    target = tmp_path / "window.pt"
    assert run(["average", str(tmp_path), "-o", str(target), "--method", "window:length=40"]) == 0
    assert torch.load(target)["weight"][0, 0] == 141
