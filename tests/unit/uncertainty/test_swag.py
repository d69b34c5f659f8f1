"""SWAG: draws lent to the model, its files, records, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polyak
from polyak.errors import (
    ArgumentError,
    FormatError,
    MismatchError,
    NonFiniteError,
    OutputError,
    PolyakError,
    PolyakWarning,
    StaleStatistics,
    UsageError,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net():
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


@torch.no_grad()
def walk(model, n, update=lambda: None):
    for seed in range(n):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        update()


def captured(model=None, n=5, rank=3, **options):
    torch.manual_seed(0)
    model = model or nn.Linear(3, 2)
    swag = polyak.SWAG(model, rank=rank, **options)
    walk(model, n, swag.update)
    return model, swag


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# The loan.


def test_equal_generators_give_equal_draws_and_others_do_not():
    model, swag = captured()
    drawn = []
    for generator in (seeded(), seeded(), seeded(1)):
        with swag.sample(generator=generator) as lent:
            assert lent is model
            drawn.append(values(model))
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])


@pytest.mark.parametrize("in_place", [False, True])
def test_own_weights_come_back_however_the_block_ends(in_place):
    model, swag = captured()
    before = values(model)
    with pytest.raises(ZeroDivisionError), swag.sample(in_place=in_place):
        assert not same(values(model), before)
        model.eval()
        1 / 0  # noqa: B018
    assert same(values(model), before)
    with swag.sample(in_place=in_place), torch.no_grad():
        model.weight.zero_()
    assert same(values(model), before)
    with swag.sample(scale=0):
        assert torch.equal(model.weight, swag.averaged_tensors()["weight"])


def test_scale_0_is_the_mean_and_the_mean_is_that_of_an_average():
    model = nn.Linear(3, 2)
    swag, average = polyak.SWAG(model, rank=0), polyak.Average(model, polyak.SWA())
    walk(model, 6, lambda: (swag.update(), average.update()))
    with swag.applied():
        mean = values(model)
    with average.applied():
        assert same(mean, values(model))
    average.load_state_dict(swag.state_dict())  # which holds one
    with average.applied():
        assert same(mean, values(model))


def test_what_is_frozen_or_excluded_is_not_drawn():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    _, swag = captured(model, exclude="1.bias")
    before = values(model)
    with swag.sample():
        drawn = values(model)
    changed = {name for name in before if not torch.equal(before[name], drawn[name])}
    assert changed == {"0.bias", "1.weight"}


def test_a_parameter_that_trains_later_has_deviated_by_nothing_before():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swag = polyak.SWAG(model, rank=4)
    swag.attach(optimizer)
    for step in range(6):
        if step == 3:
            model[0].weight.requires_grad_(True)
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    state = swag.state_dict()
    zeros = [bool((one["0.weight"] == 0).all()) for one in state["deviations"]]
    assert zeros == [True, False, False, False]
    assert float(state["variance"]["0.weight"].abs().sum()) > 0


def test_deviations_on_another_device_are_the_same():
    model, swag = captured(device="cpu")
    _, other = captured()
    with swag.sample(generator=seeded()):
        drawn = values(model)
    with other.sample(generator=seeded()) as lent:
        assert same(drawn, values(lent))


def test_the_plan_says_the_bytes():
    _, swag = captured(nn.Linear(1000, 1000, bias=False), n=2, rank=20)
    plan = swag.plan()
    assert plan.nbytes == 22 * 4_000_000
    assert "keeps 83.9 MiB: mean and variance 7.6 MiB, 20 deviations 76.3 MiB" in str(plan)
    assert "2 of them held now" in str(plan)
    assert "on cpu" in str(polyak.SWAG(nn.Linear(2, 2), device="cpu").plan())
    assert polyak.SWAG(nn.Linear(10, 10, bias=False).bfloat16(), rank=0).plan().nbytes == 2 * 400


def test_reset_forgets_the_spread_too():
    model, swag = captured()
    swag.reset()
    assert (swag.count, swag.columns) == (0, 0)
    walk(model, 4, swag.update)
    again = polyak.SWAG(model, rank=3)
    walk(model, 4, again.update)
    assert swag.columns == 3


def test_a_mean_that_begins_again_begins_without_deviations():
    model, swag = captured(n=4)
    swag._member.restart()
    walk(model, 2, swag.update)
    assert (swag.count, swag.columns) == (2, 2)
    first = swag.state_dict()["deviations"][0]
    assert all(float(one.abs().max()) == 0 for one in first.values())
    deviation = swag.state_dict()["deviations"][1]["weight"]
    assert torch.allclose(swag.state_dict()["variance"]["weight"], deviation**2)


# BatchNorm.


def batches(n=4):
    torch.manual_seed(5)
    return [torch.randn(16, 3) * 2 + 1 for _ in range(n)]


def test_statistics_are_measured_for_each_draw_and_for_nothing_else():
    model, swag = captured(net())
    before = values(model)
    found = []
    for seed in (0, 1):
        with swag.sample(generator=seeded(seed), update_bn=batches()):
            found.append(model[1].running_mean.clone())
            inputs = model[0](torch.cat(batches()))
            assert torch.allclose(model[1].running_mean, inputs.mean(0), atol=1e-5)
    assert not torch.allclose(*found)
    assert same(values(model), before)
    assert model.training
    with pytest.warns(StaleStatistics), swag.applied():
        pass  # those of the mean are still not its own


def test_draws_without_them_warn_once():
    model, swag = captured(net())
    with pytest.warns(StaleStatistics, match="update_bn=") as caught:
        swag.predict(batches(), draws=3)
    assert len(caught) == 1
    with swag.sample():
        polyak.update_bn(model, batches())  # a block may measure by itself
    _, other = captured(net())
    with other.sample():
        polyak.update_bn(other.model, batches())


def test_models_without_such_layers_do_not_warn():
    _, swag = captured(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
    swag.predict(batches(), draws=2)


# Files.


def test_a_file_is_one_that_any_reader_opens(tmp_path):
    model, swag = captured(net())
    swag.save(tmp_path / "swag.safetensors")
    found = load_file(tmp_path / "swag.safetensors")
    own = {name: tensor for name, tensor in found.items() if not name.startswith("swag.")}
    fresh = net()
    fresh.load_state_dict(own)
    assert torch.equal(fresh[0].weight, swag.averaged_tensors()["0.weight"])
    assert torch.equal(fresh[1].running_mean, model[1].running_mean)
    assert torch.equal(found["swag.variance.0.weight"], swag.state_dict()["variance"]["0.weight"])
    newest = swag.state_dict()["deviations"][2]["0.weight"]
    assert torch.equal(found["swag.deviations.2.0.weight"], newest)
    with safe_open(tmp_path / "swag.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["swag_rank"], said["swag_columns"], said["count"]) == ("3", "3", "5")


def test_equal_swags_give_equal_files(tmp_path):
    for name in "ab":
        captured()[1].save(tmp_path / f"{name}.safetensors")
    a, b = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_a_saved_state_dict_is_loaded_too(tmp_path):
    _, swag = captured()
    torch.save(swag.state_dict(), tmp_path / "state.pt")
    other = polyak.SWAG(nn.Linear(3, 2), rank=3)
    other.load(tmp_path / "state.pt")
    assert (other.count, other.columns) == (5, 3)


def test_files_that_are_refused(tmp_path):
    model, swag = captured()
    swag.save(tmp_path / "swag.safetensors")
    with pytest.raises(OutputError, match="exists"):
        swag.save(tmp_path / "swag.safetensors")
    with pytest.raises(ArgumentError, match="safetensors"):
        swag.save(tmp_path / "swag.pt")
    with pytest.raises(UsageError, match="nothing to save"):
        polyak.SWAG(model).save(tmp_path / "empty.safetensors")
    average = polyak.Average(model, polyak.SWA())
    average.update()
    average.save(tmp_path / "mean.safetensors")
    with pytest.raises(FormatError, match="swag_rank"):
        swag.load(tmp_path / "mean.safetensors")
    with pytest.raises(FormatError, match="without variance"):
        swag.load_state_dict(average.state_dict())
    with pytest.raises(MismatchError, match="rank=3"):
        polyak.SWAG(model, rank=4).load(tmp_path / "swag.safetensors")
    with pytest.raises(FormatError, match="not in it"):
        polyak.SWAG(nn.Sequential(model), rank=3).load(tmp_path / "swag.safetensors")
    with pytest.raises(MismatchError, match="weight"):
        polyak.SWAG(nn.Linear(3, 4), rank=3).load(tmp_path / "swag.safetensors")
    with pytest.raises(ArgumentError, match="no such file"):
        swag.load(tmp_path / "none.safetensors")
    for call in (
        lambda: swag.load(tmp_path / "mean.safetensors", updates=3),
        lambda: swag.import_state(model.state_dict(), updates=3),
    ):
        with pytest.raises(ArgumentError, match="from_checkpoints"):
            call()
    assert (swag.count, swag.columns) == (5, 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("deviations"),
        lambda state: state["variance"].pop("weight"),
        lambda state: state["variance"].update(weight=torch.zeros(7)),
        lambda state: state["deviations"][0].update(bias=torch.zeros(2).double()),
        lambda state: state.update(variance=3),
        lambda state: state.update(deviations=3),
    ],
)
def test_damaged_states_are_refused_whole(damage):
    model, swag = captured()
    state = captured(n=8)[1].state_dict()
    damage(state)
    before = values(model)
    with pytest.raises(PolyakError):
        swag.load_state_dict(state)
    assert (swag.count, swag.columns) == (5, 3)
    assert same(values(model), before)


# Afterwards.


def test_a_record_of_single_captures_is_the_swag_of_the_run(tmp_path):
    model = net()
    swag = polyak.SWAG(model, rank=4)
    with polyak.Recorder(model, tmp_path, interval=1, captures=1) as recorder:
        walk(model, 7, lambda: (recorder.update(), swag.update()))
    made = polyak.SWAG.from_trajectory(net(), polyak.Trajectory(tmp_path), rank=4)
    own, found = swag.state_dict(), made.state_dict()
    assert made.count == 7
    for key in ("tensors", "variance"):
        for name, tensor in own[key].items():
            assert torch.allclose(tensor, found[key][name], rtol=1e-5, atol=1e-9), (key, name)
    assert torch.allclose(own["deviations"][1]["3.weight"], found["deviations"][1]["3.weight"])
    assert torch.equal(found["statistics"]["1.running_var"], own["statistics"]["1.running_var"])
    late = polyak.SWAG.from_trajectory(net(), polyak.Trajectory(tmp_path), since=3, until=6)
    assert late.count == 3


def test_checkpoints_of_a_run_do_as_well(tmp_path):
    model, swag = nn.Linear(3, 2), None
    files, swag = [], polyak.SWAG(model, rank=4)

    def both():
        swag.update()
        files.append(tmp_path / f"checkpoint-{len(files) + 1}.pt")
        torch.save({"model": model.state_dict(), "step": 10 * len(files)}, files[-1])

    walk(model, 5, both)
    trajectory = polyak.Trajectory.from_checkpoints(files)
    made = polyak.SWAG.from_trajectory(nn.Linear(3, 2), trajectory, rank=4)
    assert torch.allclose(
        made.state_dict()["variance"]["bias"], swag.state_dict()["variance"]["bias"], rtol=1e-5
    )
    with pytest.raises(ArgumentError, match="1 intervals are between"):
        polyak.SWAG.from_trajectory(model, trajectory, since=30, until=40)
    with pytest.raises(MismatchError, match="weight"):
        polyak.SWAG.from_trajectory(nn.Linear(3, 4), trajectory)
    with pytest.raises(ArgumentError, match=r"Trajectory\(folder\)"):
        polyak.SWAG.from_trajectory(model, tmp_path)


# What is refused.


@pytest.mark.parametrize("rank", [1, -1, 2.5, "20"])
def test_ranks_that_are_none(rank):
    with pytest.raises(ArgumentError, match="rank"):
        polyak.SWAG(nn.Linear(2, 2), rank=rank)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_spread_needs_two_captures(n, rank):
    model, swag = captured(n=n, rank=rank)
    before = values(model)
    with pytest.raises(UsageError, match=f"{n} captures?, and"), swag.sample():
        pass
    with pytest.raises(UsageError, match="at least 2"):
        swag.predict([torch.ones(1, 3)])
    assert same(values(model), before)


def test_fewer_captures_than_the_rank_are_said_once_and_used():
    _, swag = captured(n=3, rank=20)
    with pytest.warns(PolyakWarning, match="3 times") as caught:
        swag.predict([torch.ones(1, 3)], draws=4)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": float("inf")}, "scale is inf; expected a finite number"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": "1"}, "scale"),
        ({"generator": 3}, "Generator"),
        ({"update_bn": 3}, "batches"),
        ({"update_bn": []}, "no batches"),
    ],
)
def test_arguments_of_a_draw(options, match):
    model, swag = captured(net())
    before = values(model)
    with pytest.raises(ArgumentError, match=match), swag.sample(**options):
        pass
    assert same(values(model), before)
    assert swag.lent is False


def test_a_nan_that_was_captured_is_named():
    model, swag = captured()
    with torch.no_grad():
        model.bias[0] = float("nan")
    swag.update()
    with pytest.raises(NonFiniteError, match="bias"), swag.sample():
        pass
    _, careful = captured(model, n=0, nonfinite="skip")
    careful.update()
    assert careful.count == 0


def test_training_and_averaging_wait_for_the_end_of_the_block():
    model, swag = captured()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    with swag.sample():
        for call in (optimizer.step, swag.update, lambda: swag.load_state_dict(swag.state_dict())):
            with pytest.raises(UsageError, match=r"SWAG\(Linear, rank=3"):
                call()
        with pytest.raises(UsageError), swag.sample():
            pass
        with pytest.raises(UsageError), swag.applied():
            pass
    with swag.applied(), pytest.raises(UsageError), swag.sample():
        pass
    optimizer.step()


def test_a_changed_model_is_refused():
    model, swag = captured()
    model.weight = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(MismatchError, match="weight"), swag.sample():
        pass


def test_sharded_models_are_refused_before_and_after_sharding(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = nn.Linear(3, 2)
        swag = polyak.SWAG(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for call in (lambda: polyak.SWAG(model), swag.update):
            with pytest.raises(ArgumentError, match="SWAG is not available on sharded"):
                call()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("name", "value"), [("weight", -1e-6), ("bias", -math.inf)])
def test_a_file_with_a_variance_below_zero_is_refused(tmp_path, name, value):
    model = torch.nn.Linear(3, 2)
    swag = polyak.SWAG(model, rank=2)
    for _ in range(3):
        swag.update()
    swag.save(tmp_path / "swag.safetensors")
    tensors = load_file(tmp_path / "swag.safetensors")
    with safe_open(tmp_path / "swag.safetensors", "pt") as opened:
        text = opened.metadata()
    tensors[f"swag.variance.{name}"].view(-1)[1] = value
    save_file(tensors, tmp_path / "bad.safetensors", text)
    before = {name: held.clone() for name, held in model.state_dict().items()}
    with pytest.raises(FormatError, match=f"variance below 0, of {name}: the file is damaged"):
        swag.load(tmp_path / "bad.safetensors")
    assert all(torch.equal(before[name], held) for name, held in model.state_dict().items())
