"""`polyak update-bn` on files that `polyak average` made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from polyak.checkpoints import open_checkpoint
from polyak.cli.app import run

MODULE = """
import torch
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
def other():
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
def scaled():
    found = model()
    found.register_buffer("scales", torch.ones(2).to(torch.float8_e4m3fn))
    return found
def plain():
    return torch.nn.Linear(3, 4)
def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, generator=g), torch.zeros(8)) for _ in range(5)]
"""


@pytest.fixture
def averaged(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"mine_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    for step in (1, 2):
        model(torch.randn(16, 3) + step)
        torch.save(model.state_dict(), f"step-{step}.pt")
    return name


def command(name, *more, model="model"):
    return ["update-bn", *more, "--model", f"{name}:{model}", "--data", f"{name}:batches"]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_tensors_of_eight_bits_stay_as_they_are(averaged, suffix):
    state = __import__(averaged).scaled().state_dict()
    save = save_file if suffix == "safetensors" else torch.save
    save(state, f"scaled.{suffix}")
    assert run(command(averaged, f"scaled.{suffix}", model="scaled")) == 0
    after = open_checkpoint(f"scaled.{suffix}")
    assert torch.equal(after.tensors["scales"].load().float(), torch.ones(2))
    assert not torch.equal(after.tensors["1.running_mean"].load(), state["1.running_mean"])


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_average_then_update(averaged, capsys, suffix):
    file = f"average.{suffix}"
    assert run(["average", "step-1.pt", "step-2.pt", "-o", file]) == 0
    assert "polyak update-bn" in capsys.readouterr().out
    before = open_checkpoint(file).metadata
    assert before["batchnorm"] == "stale"
    assert run(command(averaged, file)) == 0
    assert "updated the BatchNorm statistics of 1 layers" in capsys.readouterr().out
    after = open_checkpoint(file).metadata
    assert after == before | {"batchnorm": "refreshed"}
    state = load_file(file) if suffix == "safetensors" else torch.load(file, weights_only=True)
    inputs = torch.cat([batch for batch, _ in __import__(averaged).batches()])
    values = torch.nn.functional.linear(inputs, state["0.weight"], state["0.bias"])
    torch.testing.assert_close(state["1.running_mean"], values.mean(0))
    torch.testing.assert_close(state["1.running_var"], values.var(0))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_two_processes_write_the_same_bytes(averaged, suffix):
    run(["average", "step-1.pt", "step-2.pt", "-o", f"average.{suffix}"])
    for seed, name in enumerate(("one", "two")):
        arguments = command(averaged, f"average.{suffix}", "-o", f"{name}.{suffix}")
        path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), "."])
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": path}
        subprocess.run([sys.executable, "-m", "polyak", *arguments], check=True, env=environment)
    assert Path(f"one.{suffix}").read_bytes() == Path(f"two.{suffix}").read_bytes()


def test_another_output(averaged, capsys):
    run(["average", "step-1.pt", "step-2.pt", "-o", "average.safetensors"])
    assert (
        run(command(averaged, "average.safetensors", "-o", "new.safetensors", "--limit", "2")) == 0
    )
    with safe_open("average.safetensors", "pt") as file:
        assert file.metadata()["batchnorm"] == "stale"
    assert run(command(averaged, "average.safetensors", "-o", "new.safetensors")) == 1
    assert "or pass --overwrite to replace it" in " ".join(capsys.readouterr().err.split())
    assert (
        run(command(averaged, "average.safetensors", "-o", "new.safetensors", "--overwrite")) == 0
    )


def test_refusals(averaged, capsys):
    run(["average", "step-1.pt", "step-2.pt", "-o", "average.safetensors"])
    before = load_file("average.safetensors")
    capsys.readouterr()
    for arguments, code, message in [
        (command(averaged, "average.safetensors", model="other"), 1, "[4, 3], expected [5, 3]"),
        (
            command(averaged, "average.safetensors", model="plain"),
            2,
            "no layers with running statistics",
        ),
        (command(averaged, "average.safetensors", model="batches"), 2, "model is a list"),
        (command(averaged, "average.safetensors", model="nothing"), 2, "has nothing at nothing"),
        (command(averaged, "average.safetensors", "-o", "x.gguf"), 2, "expected .safetensors"),
        (command(averaged, "."), 2, "is a folder"),
    ]:
        assert run(arguments) == code
        assert message in " ".join(capsys.readouterr().err.split())
    after = load_file("average.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["1.running_mean", "1.running_var"])
def test_statistics_that_are_not_finite_are_what_it_mends(averaged, name):
    broken = torch.load("step-1.pt", weights_only=True)
    broken[name][1] = float("nan")
    torch.save(broken, "broken.pt")
    assert run(command(averaged, "broken.pt", "-o", "out.pt")) == 0
    assert run(command(averaged, "step-1.pt", "-o", "right.pt")) == 0
    found, right = (torch.load(f, weights_only=True) for f in ("out.pt", "right.pt"))
    assert all(torch.equal(found[key], right[key]) for key in right)


@pytest.mark.parametrize(("name", "bad"), [("0.weight", "nan"), ("1.bias", "-inf")])
def test_weights_that_are_not_finite_are_named(averaged, capsys, name, bad):
    broken = torch.load("step-1.pt", weights_only=True)
    broken[name][1] = float(bad)
    torch.save(broken, "broken.pt")
    assert run(command(averaged, "broken.pt", "-o", "out.pt")) == 1
    assert f"Not finite in broken.pt: {name}. " in capsys.readouterr().err
    assert not Path("out.pt").exists()
