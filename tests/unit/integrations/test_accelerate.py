"""The average beside Accelerate's own training state, with the real library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration, TorchDynamoPlugin
from reference import accelerate_run
from reference.accelerate_run import Run, differences
from safetensors.torch import load_file
from torch import nn

import polyak
from polyak.errors import ArgumentError, FormatError, MismatchError, UsageError
from polyak.integrations.accelerate import track


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate's state is one for the process."""
    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()


def small(**options):
    """An accelerator with one linear layer and its optimizer, prepared."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, **options)
    model = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return accelerator, model, optimizer


def step(model, optimizer, times=1):
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()


# Resuming


@pytest.mark.parametrize("stop", [2, 6, 8])
@pytest.mark.parametrize("safe", [True, False])
def test_resume_is_bitwise(stop, safe, tmp_path):
    run = Run().train(last=stop)
    run.accelerator.save_state(tmp_path / "checkpoint", safe_serialization=safe)
    whole = run.train(first=stop).values()
    resumed = Run()
    resumed.accelerator.load_state(tmp_path / "checkpoint")
    assert not differences(whole, resumed.train(first=stop).values())
    assert whole["ema.count"] == 3
    assert whole["swa.count"] == 4  # the weights that enter the cycle, and those after each


def test_the_loaded_average_is_not_merely_the_one_that_was_there(tmp_path):
    run = Run().train(last=8)
    run.accelerator.save_state(tmp_path / "checkpoint")
    before = run.values()
    run.train(first=8)
    assert differences(before, run.values())
    run.accelerator.load_state(tmp_path / "checkpoint")
    assert not differences(before, run.values())


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 12), (2, 6), (5, 3), (12, 1)])
def test_steps_are_counted_not_batches(accumulation, steps):
    run = Run(accumulation)
    every_step = run.several["window"]
    run.train()
    assert every_step.count == steps  # the last one is where the data end


@pytest.mark.slow
def test_two_processes(tmp_path):
    alone = Run().train(last=8)
    alone.accelerator.save_state(tmp_path / "alone")
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [accelerate_run.__file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, *script],
        env=environment, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1)]
    first, second = (one["whole"] for one in found)
    statistics = {name for name in first if "running" in name}
    assert len(statistics) == 8
    assert set(differences(first, second)) == statistics  # each process measured its own data,
    assert [one["loaded"] for one in found] == [[], []]
    assert [one["resumed"] for one in found] == [[], []]  # and has its own back
    assert sorted(p.name for p in (tmp_path / "both").glob("*.pt")) == [
        "average_0.pt", "average_1.pt", "several_0.pt", "several_1.pt",
    ]  # fmt: skip
    for one in found:
        assert not differences(alone.ema.averaged_tensors(), one["ema from one process"])
        assert one["counts from one process"] == {n: a.count for n, a in alone.several.items()}

    back = Run()  # and what two have saved continues on one
    back.accelerator.load_state(tmp_path / "both")
    assert back.ema.count == 2


def test_files_of_processes_that_are_no_more_are_removed(tmp_path):
    accelerator, model, optimizer = small()
    average = polyak.Average(model, "swa")
    average.attach(optimizer)
    track(accelerator, average, "ema")
    step(model, optimizer)
    others = ["ema_1_0.pt", "ema_x.pt", "ema2_3.pt"]
    for name in ["ema_1.pt", "ema_17.pt", *others]:
        (tmp_path / name).touch()
    accelerator.save_state(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("ema*")) == sorted(["ema_0.pt", *others])


# Names, rotation, several averages


def test_automatic_naming_and_rotation(tmp_path):
    naming = ProjectConfiguration(tmp_path, automatic_checkpoint_naming=True, total_limit=2)
    accelerator, model, optimizer = small(project_config=naming)
    average = polyak.Average(model, "ema:decay=0.5")
    average.attach(optimizer)
    track(accelerator, average)
    saved = []
    for _ in range(4):
        step(model, optimizer)
        accelerator.save_state()
        saved.append(average.averaged_tensors())
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [one.name for one in kept] == ["checkpoint_2", "checkpoint_3"]
    assert all((one / "average_0.pt").exists() for one in kept)
    accelerator.load_state(str(kept[0]))
    assert average.count == 3
    assert not differences(average.averaged_tensors(), saved[2])
    accelerator.load_state()
    assert not differences(average.averaged_tensors(), saved[3])


def test_each_average_has_a_name():
    accelerator, model, _ = small()
    first, second = (polyak.Average(model, "swa") for _ in range(2))
    tracked = track(accelerator, first)
    with pytest.raises(UsageError, match=r"An average 'average' is tracked already.*name="):
        track(accelerator, second)
    with pytest.raises(UsageError, match="This average is tracked already, as 'average'"):
        track(accelerator, first, "another")
    track(accelerator, second, "second")
    tracked.remove()
    tracked.remove()
    track(accelerator, first)
    with pytest.raises(UsageError, match="tracked already"):
        track(accelerator, polyak.Average(model, "swa"))


def test_a_second_training_with_the_same_accelerator(tmp_path):
    accelerator = Accelerator(cpu=True)
    for fold in range(2):
        model = nn.Linear(2 + fold, 1)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        average = polyak.Average(model, "swa")
        average.attach(optimizer)
        with track(accelerator, average) as tracked:
            assert tracked.average is average
            optimizer.step()
            accelerator.save_state(tmp_path / str(fold))
            accelerator.load_state(tmp_path / str(fold))
        model, optimizer = accelerator.free_memory(model, optimizer)
        assert torch.load(tmp_path / str(fold) / "average_0.pt")["count"] == 1
    model, optimizer = accelerator.prepare(
        nn.Linear(4, 1), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    )
    accelerator.save_state(tmp_path / "without")
    assert not (tmp_path / "without" / "average_0.pt").exists()


# What does not fit


@pytest.fixture
def without_average(tmp_path):
    """A checkpoint that was saved before there was an average."""
    accelerator, model, optimizer = small()
    step(model, optimizer, 3)
    accelerator.save_state(tmp_path / "without")
    return accelerator, model, optimizer, tmp_path / "without"


def test_a_checkpoint_without_an_average_is_refused(without_average):
    accelerator, model, optimizer, folder = without_average
    average = polyak.Average(model, "swa")
    average.attach(optimizer)
    track(accelerator, average)
    step(model, optimizer)
    before = model.weight.clone()
    with pytest.raises(ArgumentError, match=r"no average 'average'.*missing='start'"):
        accelerator.load_state(folder)
    assert average.count == 1
    assert torch.equal(model.weight, before)  # the checkpoint was not loaded by half


@pytest.mark.parametrize("several", [False, True])
def test_or_begins_a_new_one_from_its_weights(without_average, several):
    accelerator, model, optimizer, folder = without_average
    saved = model.weight.detach().clone()
    made = polyak.Averages(model, {"a": "swa"}) if several else polyak.Average(model, "swa")
    made.attach(optimizer, every=2)
    track(accelerator, made, missing="start")
    step(model, optimizer, 5)  # of weights that are replaced: they must not count
    accelerator.load_state(folder)
    assert made.empty
    assert torch.equal(model.weight, saved)
    step(model, optimizer, 2)  # two, although one was pending
    average = made["a"] if several else made
    assert average.count == 1
    assert torch.equal(average.averaged_tensors()["weight"], model.weight)


@pytest.mark.parametrize(
    ("name", "file", "error"),
    [
        (
            "the profile",
            r"mine_0.pt: This state belongs to a different average.*ema",
            MismatchError,
        ),
        ("the model", r"mine_0.pt: This state belongs to a different.*weight", MismatchError),
        ("their number", r"mine_0.pt: This is not the state of a polyak average", FormatError),
    ],
)
def test_a_checkpoint_of_another_average(name, file, error, tmp_path):
    accelerator, model, optimizer = small()
    average = polyak.Average(model, "ema:decay=0.5")
    average.attach(optimizer)
    tracked = track(accelerator, average, "mine")
    step(model, optimizer)
    accelerator.save_state(tmp_path)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    step(model, optimizer)
    tracked.remove()
    state = torch.load(tmp_path / "mine_0.pt")
    if name == "the profile":
        average = polyak.Average(model, "swa")
    elif name == "the model":
        state["tensors"] = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    else:
        state = {"one": state}
    torch.save(state, tmp_path / "mine_0.pt")
    track(accelerator, average, "mine")
    count, after = average.count, {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=f"(?s){file}"):
        accelerator.load_state(tmp_path)
    assert average.count == count
    assert not differences(after, model.state_dict())
    assert differences(before, model.state_dict())


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "pickled object", "folder"])
def test_a_damaged_file(damage, tmp_path):
    accelerator, model, optimizer = small()
    average = polyak.Average(model, "swa")
    average.attach(optimizer)
    track(accelerator, average)
    step(model, optimizer)
    accelerator.save_state(tmp_path)
    file = tmp_path / "average_0.pt"
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "pickled object":
        torch.save({"state": Path("somewhere")}, file)
    else:
        file.write_bytes({"cut": content[:-100], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(FormatError, match=r"average_0.pt is damaged.*Nothing was loaded"):
        accelerator.load_state(tmp_path)
    assert average.count == 1


def test_saving_inside_applied_is_refused(tmp_path):
    accelerator, model, optimizer = small()
    ema, swa = polyak.Average(model, "ema:decay=0.9"), polyak.Averages(model, {"swa": "swa"})
    ema.attach(optimizer)
    swa.attach(optimizer)
    track(accelerator, swa)  # the one that is not lent notices it too
    step(model, optimizer, 2)
    with ema.applied(), pytest.raises(UsageError, match=r"save_state\(\) inside applied"):
        accelerator.save_state(tmp_path)
    assert not list(tmp_path.iterdir())
    accelerator.save_state(tmp_path)
    with swa["swa"].applied(), pytest.raises(UsageError, match=r"load_state_dict\(\) inside app"):
        accelerator.load_state(tmp_path)


def test_loading_before_prepare_is_refused(tmp_path):
    accelerator, model, _ = small()
    with track(accelerator, polyak.Average(model, "swa")):
        accelerator.save_state(tmp_path)
    accelerator.free_memory()
    fresh = nn.Linear(3, 2)
    track(accelerator, polyak.Average(fresh, "swa"))
    with pytest.raises(UsageError, match=r"load_state\(\) before prepare\(\)"):
        accelerator.load_state(tmp_path)
    accelerator.prepare(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1))
    accelerator.load_state(tmp_path)
    assert torch.equal(fresh.weight, model.weight)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("average", "accelerator"), {}, "takes an Accelerator and an Average.*found Average and"),
        (("accelerator", "model"), {}, "found Accelerator and Linear"),
        (("accelerator", "average", ""), {}, "name is ''; expected the name of a file"),
        (("accelerator", "average", "a/b"), {}, "name is 'a/b'"),
        (("accelerator", "average", "a/"), {}, "name is 'a/'"),
        (("accelerator", "average", "a\0"), {}, "name is 'a.x00'"),
        (("accelerator", "average", 3), {}, "name is 3"),
        (("accelerator", "average"), {"missing": "ignore"}, "missing is 'ignore'; expected"),
    ],
)
def test_arguments(arguments, options, message):
    accelerator, model, _ = small()
    names = {"accelerator": accelerator, "model": model, "average": polyak.Average(model, "swa")}
    given = [names.get(a, a) if i < 2 else a for i, a in enumerate(arguments)]
    with pytest.raises(ArgumentError, match=message):
        track(*given, **options)


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("FSDP", r"FSDP1 keeps the weights in forms.*fsdp_version=2.*average_checkpoints"),
        ("MEGATRON_LM", r"Megatron-LM keeps the weights in forms.*average_checkpoints"),
        ("DEEPSPEED", r"average.update\(\) after accelerator.backward.*model.was_step_applied\(\)"),
    ],
)
def test_what_spreads_the_weights_is_refused(kind, advice):
    # Without a GPU Accelerate starts none of them: its own state says what it would have started.
    accelerator, model, _ = small()
    AcceleratorState().distributed_type = DistributedType[kind]
    with pytest.raises(ArgumentError, match=advice):
        track(accelerator, polyak.Average(model, "swa"))


# In company


def test_the_checkpoint_is_still_a_checkpoint(tmp_path):
    naming = ProjectConfiguration(tmp_path, automatic_checkpoint_naming=True)
    accelerator, model, optimizer = small(project_config=naming)
    average = polyak.Average(model, "swa")
    average.attach(optimizer)
    track(accelerator, average)
    weights = []
    for _ in range(2):
        step(model, optimizer)
        accelerator.save_state()
        weights.append(model.weight.detach().clone())
    folders = (tmp_path / "checkpoints").iterdir()
    polyak.average_checkpoints(folders, {tmp_path / "merged.safetensors": "swa"})
    merged = load_file(tmp_path / "merged.safetensors")
    assert torch.allclose(merged["weight"], sum(weights) / 2)
    folder = tmp_path / "checkpoints" / "checkpoint_1"
    with polyak.open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors.keys() == {"weight", "bias"}


def test_save_model_inside_applied_saves_the_average(tmp_path):
    accelerator, model, optimizer = small()
    average = polyak.Average(model, "swa")
    average.attach(optimizer)
    step(model, optimizer, 3)
    with average.applied():
        assert accelerator.unwrap_model(model).weight is model.weight
        accelerator.save_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not differences(saved, average.averaged_tensors())
    assert differences(saved, model.state_dict())


@pytest.mark.parametrize(
    "options",
    [{"mixed_precision": "bf16"}, {"dynamo_plugin": TorchDynamoPlugin(backend="eager")}],
    ids=["bf16", "compiled"],
)
def test_wrappers(options, tmp_path):
    accelerator, model, optimizer = small(**options)
    average = polyak.Average(model, "swa")
    average.attach(optimizer)
    track(accelerator, average)
    step(model, optimizer, 3)
    accelerator.save_state(tmp_path)
    saved = average.averaged_tensors()
    assert saved["weight"].dtype == torch.float32
    assert saved.keys() == {"weight", "bias"}
    with average.applied():
        x = torch.ones(1, 3)
        averaged = nn.functional.linear(x, saved["weight"], saved["bias"])
        assert torch.allclose(model(x).float(), averaged, atol=0.02)
    step(model, optimizer)
    accelerator.load_state(tmp_path)
    assert not differences(average.averaged_tensors(), saved)


def test_attached_before_prepare(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    average = polyak.Average(model, "swa")
    average.attach(optimizer)
    track(accelerator, average)
    model, optimizer = accelerator.prepare(model, optimizer)
    step(model, optimizer, 2)
    accelerator.save_state(tmp_path)
    step(model, optimizer)
    accelerator.load_state(tmp_path)
    step(model, optimizer)
    assert average.count == 3
