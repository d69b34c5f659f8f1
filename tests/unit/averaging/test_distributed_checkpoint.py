"""States in a `torch.distributed.checkpoint`, which loads only the entries that the given state has."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import polyak
from polyak import EMA, SWA, After, Average, Averages, Window
from polyak.errors import FormatError, MismatchError

# torch's, on saving and loading without a process group
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

PROFILES = {
    "swa": SWA(),
    "ema": EMA(0.9),
    "an open block": EMA.from_half_life(5000, keep_initial=True),
    "window": Window(3),
    "begun": After(2, SWA()),
    "not begun": After(100, EMA(0.9)),
    "keeps its first weights": EMA(0.9, keep_initial=True),
}


def model_of(*, norm=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *([nn.BatchNorm1d(4)] if norm else []), nn.Linear(4, 1))


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def make(profile, **options):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = Average(model, profile, **options)
    average.attach(optimizer, every=2)
    return model, optimizer, average


def flat(value, name=""):
    if isinstance(value, torch.Tensor):
        return {name: value.tolist()}
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}").items()
        }
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), name) or {name: []}
    return {name: value}


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("name", PROFILES)
def test_a_fresh_average_resumes(name, stateful, tmp_path):
    model, optimizer, average = make(PROFILES[name])
    train(model, optimizer, 9, 1)
    if not average.empty:
        average.update_bn([torch.randn(8, 3)])
    assert bool(average.state_dict().get("block")) == (name == "an open block")
    held = {"model": model.state_dict(), "average": average if stateful else average.state_dict()}
    dcp.save(held, checkpoint_id=tmp_path)

    again, second, fresh = make(PROFILES[name])
    state = {"model": again.state_dict(), "average": fresh if stateful else fresh.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    again.load_state_dict(state["model"])
    if not stateful:
        fresh.load_state_dict(state["average"])
    assert flat(fresh.state_dict()) == flat(average.state_dict())

    for one, steps in ((model, optimizer), (again, second)):
        train(one, steps, 7, 2)
    assert flat(fresh.state_dict()) == flat(average.state_dict())
    assert fresh.count > 0 or name == "not begun"


def test_measured_buffers_that_are_averaged(tmp_path):
    _, _, average = make(SWA(), average_buffers="*running*")
    average.update()
    average.update_bn([torch.randn(8, 3)])
    dcp.save(average.state_dict(), checkpoint_id=tmp_path)
    _, _, fresh = make(SWA(), average_buffers="*running*")
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    fresh.load_state_dict(state)
    expected = average.averaged_tensors()["1.running_mean"]
    assert torch.equal(fresh.averaged_tensors()["1.running_mean"], expected)


def test_several_averages(tmp_path):
    def several():
        model = model_of(norm=False)
        return model, Averages(model, {"a": SWA(), "b": Window(2), "c": EMA(0.9999)})

    model, averages = several()
    for value in (1.0, 2.0, 4.0):
        nn.init.constant_(model[0].weight, value)
        averages.update()
    dcp.save({"averages": averages.state_dict()}, checkpoint_id=tmp_path)
    _, fresh = several()
    state = {"averages": fresh.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    fresh.load_state_dict(state["averages"])
    assert flat(fresh.state_dict()) == flat(averages.state_dict())


def test_a_half_made_model_is_told_to_be_made_first(tmp_path):
    _, _, average = make(SWA())
    average.update()
    dcp.save(average.state_dict(), checkpoint_id=tmp_path)
    lazy = nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    fresh = Average(lazy, SWA())
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    with pytest.raises(FormatError, match=r"1 updates, but holds no tensors.*state_dict\(\) again"):
        fresh.load_state_dict(state)
    assert fresh.empty
    lazy(torch.randn(2, 3))
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    fresh.load_state_dict(state)
    assert fresh.count == 1


def test_another_profile_is_refused(tmp_path):
    _, _, average = make(SWA())
    average.update()
    dcp.save(average.state_dict(), checkpoint_id=tmp_path)
    _, _, fresh = make(EMA(0.5))
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    with pytest.raises(MismatchError, match="'swa', but this average has"):
        fresh.load_state_dict(state)


def test_an_empty_state_has_room_and_binds_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(model, polyak.SWA())
    state = average.state_dict()
    assert set(state["tensors"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert set(state["statistics"]) == {
        f"1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    }
    model.append(nn.Linear(2, 2))
    average.update()
    assert "2.weight" in average.state_dict()["tensors"]
