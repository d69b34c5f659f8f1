"""`polyak average`: which checkpoints, how, and what it says."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyak.checkpoints import (
    Selection,
    average_checkpoints,
    open_checkpoint,
    select_checkpoints,
)
from polyak.checkpoints.writing.save import write_checkpoint
from polyak.cli.app import run
from polyak.errors import FormatError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (500, 1000, 1500, 2000):
        place = tmp_path / "run" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        save_file({"w": torch.full((3,), float(step))}, place / "model.safetensors")
        log = [{"step": s, "eval_loss": abs(s - 1000) / 1000} for s in range(500, step + 1, 500)]
        state = {"global_step": step, "log_history": log}
        (place / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path


def value(path):
    return load_file(path)["w"][0].item()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 1250.0),
        (["--last", "2"], 1750.0),
        (["--steps", "1000:1500"], 1250.0),
        (["--steps", ":1000"], 750.0),
        (["--every", "1000"], 1500.0),
        (["--best", "2", "--metric", "eval_loss"], 750.0),
        (["--best", "1", "--metric", "max:eval_loss"], 2000.0),
        (["--method", "window:length=1000"], 1750.0),
        (["--weights", "0,0,0,1"], 2000.0),
        (["--weights", "0,0,1,1", "--normalize"], 1750.0),
        (["--include", "w", "--verify", "--threads", "1", "--max-memory", "64MB"], 1250.0),
    ],
)
def test_one_output(folder, flags, expected):
    assert run(["average", "run", *flags, "-o", "out.safetensors"]) == 0
    assert value("out.safetensors") == expected


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("s3://b/x.pt", "is an address"),
        ("note.txt/x.pt", "note.txt is a file"),
        ("absent/x.pt", "There is no folder absent"),
        ("there.pt", "there.pt exists"),
        ("", "or an empty name"),
    ],
)
def test_an_output_is_refused_before_the_inputs_are_shown(folder, capsys, output, said):
    for name in ("note.txt", "there.pt"):
        (folder / name).write_text("mine")
    assert run(["average", "run", "-o", output]) != 0
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Inputs" not in printed.out
    assert (folder / "there.pt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "said", "unsaid"),
    [
        (["", "-o", "e.pt"], "A path is empty", "list"),
        (["run", "-o", "e.pt", "--key", "nope"], "Leave out --key", "("),
        (
            ["one.pt", "-o", "e.pt", "--key", "nope"],
            "has no key 'nope'. There are tensors under 'model'",
            "was not",
        ),
        (["one.pt", "-o", "e.pt", "--key", "model.nope"], "('nope' was not found)", "Pass key"),
    ],
)
def test_what_is_refused_is_said_once(folder, capsys, flags, said, unsaid):
    torch.save({"model": {"w": torch.ones(2)}}, folder / "one.pt")
    assert run(["average", *flags]) != 0
    printed = " ".join(capsys.readouterr().err.split())
    assert said in printed
    assert unsaid not in printed.replace("(safetensors)", "").replace(said, "")


@pytest.mark.parametrize("threads", ["-3", "0", "2000"])
def test_one_domain_is_said_of_the_threads(folder, capsys, threads):
    assert run(["average", "run", "-o", "e.pt", "--threads", threads]) != 0
    assert "expected 1 to 1024" in capsys.readouterr().err


def test_key_says_where_the_tensors_are(folder):
    for step in (1, 2):
        nested = {
            "net": {"inner": {"w": torch.full((3,), float(step))}},
            "other": {"v": torch.ones(2)},
        }
        torch.save(nested, folder / f"step-{step}.pt")
    assert run(["average", "step-*.pt", "--key", "net.inner", "-o", "out.safetensors"]) == 0
    assert value("out.safetensors") == 1.5


def test_several_outputs(folder, capsys):
    pairs = [
        "--method",
        "swa",
        "-o",
        "a.safetensors",
        "--method",
        "window:length=500",
        "-o",
        "b.pt",
    ]
    assert run(["average", "run/checkpoint-*", *pairs]) == 0
    assert value("a.safetensors") == 1250
    assert torch.load("b.pt", weights_only=True)["w"][0] == 2000
    out = capsys.readouterr().out
    assert "a.safetensors: SWA() of 4 checkpoints (4 effective), 1 tensors" in out
    assert "b.pt: Window(length=500.0) of 1 checkpoints" in out


def test_the_converter(folder):
    assert run(["average", "run/checkpoint-500", "-o", "one.pt", "--dtype", "bfloat16"]) == 0
    assert torch.load("one.pt", weights_only=True)["w"].dtype == torch.bfloat16
    assert run(["average", "one.pt", "-o", "back", "--dtype", "float32"]) == 0
    assert open_checkpoint("back").tensors["w"].dtype == "F32"


def test_a_plan_writes_nothing(folder, capsys):
    before = sorted(folder.rglob("*"))
    assert (
        run(
            [
                "average",
                "run",
                "-o",
                "out.safetensors",
                "--method",
                "ema:half_life=500",
                "--dry-run",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    for part in (
        "checkpoint-2000",
        "0.2972",  # 1 minus the mean of F over the last gap
        "effective samples",
        "1 tensors averaged",
        "48 B to read",
    ):
        assert part in out
    assert sorted(folder.rglob("*")) == before


def test_the_plan_is_printed_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name, step in {"step-9": 9, "step-10": 10, "step-11": 11, "best": 10}.items():
        torch.save({"w": torch.full((3,), float(step))}, f"run/{name}.pt")
    assert run(["average", "run/step-1*.pt", "-o", "run/mean.pt"]) == 0
    capsys.readouterr()
    assert run(["average", "run", "--weights", "0.2,0.3,0.5", "-o", "out.safetensors"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    expected = (
        ["run/step-9.pt", "9", "0.2"],
        ["run/step-10.pt", "10", "0.3"],
        ["run/step-11.pt", "11", "0.5"],
    )
    assert [row for row in rows if row in expected] == [*expected]
    assert "Left out: run/best.pt: its tensors are those of run/step-10.pt" in out
    assert "Left out: run/mean.pt: it is an average that polyak wrote" in out
    assert value("out.safetensors") == pytest.approx(10.3)
    name = "long" * 40  # a path stays in one piece
    torch.save({"w": torch.ones(3)}, f"run/{name}-1.pt")
    assert run(["average", f"run/{name}-1.pt", "-o", "copy.safetensors"]) == 0
    assert f"run/{name}-1.pt" in capsys.readouterr().out


def test_what_is_refused_has_no_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, step in {"epoch_1": 1, "epoch_2": 2, "init": 0}.items():
        torch.save({"w": torch.full((3,), float(step))}, f"{name}.pt")
    assert run(["average", ".", "-o", "out.safetensors"]) == 2
    assert "init.pt: this has no training step of its own" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_plan_says_that_the_merge_would_be_refused(folder, capsys):
    save_file({"w": torch.ones(1)}, folder / "out.safetensors")
    assert run(["average", "run", "-o", "out.safetensors", "--dry-run"]) == 1
    assert "exists" in capsys.readouterr().err
    assert run(["average", "run", "-o", "out.safetensors", "--dry-run", "--overwrite"]) == 0
    assert run(["average", "run", "-o", "nowhere/out.safetensors", "--dry-run"]) == 1


def test_a_second_run_does_not_eat_the_first(folder):
    for step in (1, 2):
        save_file({"w": torch.full((3,), float(step))}, folder / f"step-{step}.safetensors")
    (folder / "sub").mkdir()
    for name in ("step-1", "step-2"):
        (folder / f"{name}.safetensors").rename(folder / "sub" / f"{name}.safetensors")
    for name in ("first", "second"):
        assert run(["average", "sub", "-o", f"sub/{name}.safetensors"]) == 0
        assert value(f"sub/{name}.safetensors") == 1.5


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_each_file_of_a_folder_is_opened_once(tmp_path, monkeypatch, suffix):
    """An earlier average among them included, which does not enter the new one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        state = {"w": torch.full((3,), float(step))}
        write_checkpoint(f"run/step-{step}.{suffix}", state)
    assert run(["average", "run", "-o", f"run/mean.{suffix}"]) == 0
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a: opened.append(str(path)) or real(path, *a))
    selection = ["--last", "2", "--steps", "0:", "--every", "1"]
    assert run(["average", "run", *selection, "-o", "out.safetensors"]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    files = [f"run/{name}.{suffix}" for name in ("mean", "step-1", "step-2")]
    assert sorted(path for path in opened if path.startswith("run")) == files
    assert value("out.safetensors") == 1.5


def test_opened_checkpoints_are_taken_as_they_are(folder):
    selected = select_checkpoints(["run"], Selection(last=2))
    average_checkpoints(selected, {"out.safetensors": "swa"})
    assert value("out.safetensors") == 1750
    assert selected[0].tensors["w"].nbytes == 12
    average_checkpoints([selected[1], "run/checkpoint-500"], {"two.safetensors": "swa"})
    assert value("two.safetensors") == 1250
    for one in selected:
        one.close()
    with pytest.raises(FormatError, match="closed"):
        average_checkpoints(selected, {"three.safetensors": "swa"})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "-o", "a.safetensors", "-o", "b.safetensors"], 2, "1 methods and 2 outputs"),
        (["run", "-o", "a.safetensors", "--weights", "1,x"], 2, "expected numbers"),
        (
            ["run", "-o", "a.safetensors", "--weights", "1", "--method", "swa"],
            2,
            "exclude each other",
        ),
        (["run", "-o", "a.safetensors", "--steps", "5"], 2, "expected FIRST:LAST"),
        (["run", "-o", "a.safetensors", "--steps", "5000:"], 2, "No checkpoint is left of 4"),
        (["run", "-o", "a.safetensors", "--last", "0"], 2, "last is 0"),
        (["run", "-o", "a.safetensors", "--best", "2"], 2, "go together"),
        (["run", "-o", "a.safetensors", "--best", "2", "--metric", "zeal"], 2, "Write min:zeal"),
        (["run", "-o", "a.safetensors", "--best", "2", "--metric", "wer"], 2, "No score 'wer'"),
        (["runs/*", "-o", "a.safetensors"], 2, "Nothing fits runs/*"),
        (["-o", "a.safetensors"], 2, "no input"),
        (["run", "-o", "run"], 2, "is an input, or holds one"),
        (["run", "-o", "a.safetensors", "--method", "ema:0.9"], 2, "Name the parameter"),
    ],
)
def test_refusals(folder, capsys, arguments, code, message):
    assert run(["average", *arguments]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "a.safetensors").exists()
