"""States and files: plain, whole, and refused when they are another's."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import polyak
from polyak import EMA, SWA, Average, Averages, Window
from polyak.errors import (
    FormatError,
    MismatchError,
    NonFiniteError,
    OutputError,
    StaleStatistics,
    UsageError,
)


def updated(model, profile=None, n_updates=3, **options):
    average = Average(model, profile or SWA(), **options)
    for _ in range(n_updates):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        average.update()
    return average


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), set(file.keys())


class TestState:
    def test_it_is_plain(self):
        average = updated(
            nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), EMA.from_half_life(500)
        )
        file = io.BytesIO()
        torch.save(average.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert state["version"] == 2
        assert state["profile"] == "ema:half_life=500"
        assert (state["time"], state["count"], state["unit"]) == (3.0, 3, None)
        assert set(state["tensors"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
        assert json.dumps(
            {k: v for k, v in state.items() if k not in ("tensors", "statistics", "block")}
        )

    def test_it_stays_right_inside_applied(self):
        model = nn.Linear(3, 2)
        average = updated(model, SWA())
        expected = average.state_dict()["tensors"]["weight"].clone()
        for in_place in (False, True):
            with average.applied(in_place=in_place):
                assert torch.equal(average.state_dict()["tensors"]["weight"], expected)

    def test_an_empty_state_is_a_state(self):
        average = updated(nn.Linear(3, 2))
        average.load_state_dict(Average(nn.Linear(3, 2), SWA()).state_dict())
        assert (average.count, average.time) == (0, 0)
        average.update()
        assert average.count == 1

    @pytest.mark.parametrize("name", ["plain", "window"])
    def test_another_model_is_refused_whole(self, name):
        profile = {"plain": SWA(), "window": Window(2)}[name]
        state = updated(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), profile).state_dict()
        model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        average = Average(model, profile)
        with pytest.raises(MismatchError) as caught:
            average.load_state_dict(state)
        for text in (
            "1.running_mean",
            r"0.weight: (2, 3)",
            "1.weight: (2, 2)",
            "Nothing was loaded",
        ):
            assert text in str(caught.value)
        assert average.count == 0
        model.append(nn.Linear(2, 2))  # it is not bound either
        average.update()

    def test_another_profile_or_unit_is_refused(self):
        state = updated(nn.Linear(3, 2), EMA(decay=0.9), unit="samples").state_dict()
        average = updated(nn.Linear(3, 2), EMA(decay=0.99), unit="steps")
        with pytest.raises(
            MismatchError, match=r"profile: 'ema:decay=0.9'.*(.|\n)*unit: 'samples'"
        ):
            average.load_state_dict(state)
        assert average.count == 3

    def test_another_dtype_is_refused(self):
        state = updated(nn.Linear(3, 2), dtype=torch.float64).state_dict()
        with pytest.raises(MismatchError, match=r"float64, but this model's is .*float32"):
            Average(nn.Linear(3, 2), SWA()).load_state_dict(state)

    @pytest.mark.parametrize("state", [{}, {"module.weight": torch.ones(2)}, [1], None])
    def test_what_is_no_state_is_refused(self, state):
        with pytest.raises(FormatError, match="not the state of a polyak average"):
            Average(nn.Linear(3, 2), SWA()).load_state_dict(state)

    @pytest.mark.parametrize("version", [1, 3, None])
    def test_another_version_is_refused(self, version):
        state = updated(nn.Linear(3, 2)).state_dict() | {"version": version}
        with pytest.raises(FormatError, match=f"version {version}.*reads version 2"):
            Average(nn.Linear(3, 2), SWA()).load_state_dict(state)

    def test_not_inside_applied(self):
        average = updated(nn.Linear(3, 2))
        state = average.state_dict()
        with average.applied(), pytest.raises(UsageError, match="load_state_dict"):
            average.load_state_dict(state)

    def test_several_are_checked_before_the_first_changes(self):
        model = nn.Linear(3, 2)
        profiles = {"a": SWA(), "b": EMA(decay=0.9)}
        averages = Averages(model, profiles)
        averages.update()
        states = averages.state_dict()
        again = Averages(model, profiles)
        with pytest.raises(MismatchError, match="profile"):
            again.load_state_dict(states | {"b": states["b"] | {"profile": "swa"}})
        assert again["a"].count == 0
        with pytest.raises(MismatchError, match="missing"):
            again.load_state_dict({"a": states["a"]})
        again.load_state_dict(states)
        assert {n: a.count for n, a in again.items()} == {"a": 1, "b": 1}

    def test_a_block_is_part_of_it(self):
        model = nn.Linear(3, 2)
        average = updated(model, EMA(decay=0.99999, keep_initial=True), n_updates=5)
        state = average.state_dict()
        assert state["block"][0]["updates"] == 4
        other = Average(model, EMA(decay=0.99999, keep_initial=True))
        other.load_state_dict(state)
        torch.testing.assert_close(
            other.averaged_tensors(), average.averaged_tensors(), rtol=0, atol=0
        )


class TestSave:
    def test_what_it_is_made_of_stands_in_it(self, tmp_path):
        model = nn.Linear(3, 2)
        average = updated(model, EMA(decay=0.5), unit="epochs")
        average.save(tmp_path / "a.safetensors")
        metadata, names = metadata_of(tmp_path / "a.safetensors")
        assert metadata == {
            "format": "pt",
            "polyak": polyak.__version__,
            "profile": "ema:half_life=1",
            "unit": "epochs",
            "time": "3.0",
            "count": "3",
            "sum_squared_shares": repr(average.state_dict()["sum_squared_shares"]),
            "batchnorm": "none",
        }
        assert names == {"weight", "bias"}
        model.load_state_dict(load_file(tmp_path / "a.safetensors"))
        torch.testing.assert_close(
            dict(model.state_dict()), average.averaged_tensors(), rtol=0, atol=0
        )

    def test_equal_averages_give_equal_files(self, tmp_path):
        average = updated(nn.Linear(3, 2))
        for name in "ab":
            average.save(tmp_path / f"{name}.safetensors")
        assert (tmp_path / "a.safetensors").read_bytes() == (
            tmp_path / "b.safetensors"
        ).read_bytes()

    def test_ties_are_written_once_and_recorded(self, tmp_path):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        updated(model).save(tmp_path / "tied.safetensors")
        metadata, names = metadata_of(tmp_path / "tied.safetensors")
        assert names == {"0.weight"}
        assert json.loads(metadata["ties"]) == {"1.weight": "0.weight"}
        load_model(model, tmp_path / "tied.safetensors")

    def test_stale_statistics_warn_and_are_recorded(self, tmp_path):
        average = updated(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
        with pytest.warns(StaleStatistics, match="update_bn") as caught:
            average.save(tmp_path / "stale.safetensors")
        assert caught[0].filename == __file__
        assert metadata_of(tmp_path / "stale.safetensors")[0]["batchnorm"] == "stale"
        average.update_bn(torch.randn(32, 3).split(8))
        average.save(tmp_path / "fresh.safetensors")
        assert metadata_of(tmp_path / "fresh.safetensors")[0]["batchnorm"] == "refreshed"

    def test_an_update_makes_fresh_statistics_stale(self, tmp_path):
        average = updated(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
        average.update_bn(torch.randn(32, 3).split(8))
        average.update()
        with pytest.warns(StaleStatistics):
            average.save(tmp_path / "stale.safetensors")

    def test_frozen_statistics_are_never_stale(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        model[1].eval()
        updated(model).save(tmp_path / "frozen.safetensors")

    def test_it_never_overwrites_unasked(self, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_text("mine")
        average = updated(nn.Linear(3, 2))
        with pytest.raises(OutputError, match="exists"):
            average.save(path)
        assert path.read_text() == "mine"
        average.save(path, overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

    def test_nonfinite_is_refused_by_name(self, tmp_path):
        model = nn.Linear(3, 2)
        average = updated(model)
        with torch.no_grad():
            model.bias[0] = float("nan")
        average.update()
        with pytest.raises(NonFiniteError, match=r"NaN or infinity in bias\."):
            average.save(tmp_path / "a.safetensors")
        assert not list(tmp_path.iterdir())

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(OutputError, match=r"There is no folder .*none for"):
            updated(nn.Linear(3, 2)).save(tmp_path / "none" / "a.safetensors")

    @pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
    def test_files_hold_the_dtype_of_the_weights(self, tmp_path, dtype):
        model = nn.Linear(3, 2).to(dtype)
        updated(model).save(tmp_path / "a.safetensors")
        assert load_file(tmp_path / "a.safetensors")["weight"].dtype is dtype

    def test_channels_last_weights_are_written_in_order(self, tmp_path):
        model = nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last)
        average = updated(model)
        average.save(tmp_path / "a.safetensors")
        saved = load_file(tmp_path / "a.safetensors")["weight"]
        assert torch.equal(saved, average.averaged_tensors()["weight"])


def test_repr_shows_the_unit():
    average = updated(nn.Linear(3, 2), EMA(decay=0.9), unit="captures")
    assert repr(average) == "Average(Linear, ema:decay=0.9, time=3 captures, count=3)"
    assert "a: Average" in repr(Averages(nn.Linear(3, 2), {"a": SWA()}))


DAMAGES = {
    "no statistics": lambda s: s.pop("statistics"),
    "time is text": lambda s: s.update(time="x"),
    "time runs backwards": lambda s: s.update(time=-1.0),
    "not a number": lambda s: s.update(sum_squared_shares=float("nan")),
    "tensors are gone": lambda s: s.update(tensors={}),
    "tensors are none": lambda s: s.update(tensors=None),
    "a tensor is a number": lambda s: s["tensors"].update(weight=1),
    "pending is none": lambda s: s.update(pending=None),
    "block is a number": lambda s: s.update(block=3),
    "no modes": lambda s: s.pop("layer_modes"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_changes_nothing(damage):
    state = updated(nn.Linear(2, 1)).state_dict()
    damage(state)
    average = updated(nn.Linear(2, 1))
    before = {n: t.clone() for n, t in average.averaged_tensors().items()}
    with pytest.raises(FormatError):
        average.load_state_dict(state)
    assert (average.time, average.count) == (3.0, 3)
    for name, tensor in average.averaged_tensors().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("profile", ["swa", "ema:decay=0.9", "window:length=5"])
@pytest.mark.parametrize("several", [True, False])
def test_a_state_loads_while_what_was_thawed_is_still_frozen(profile, several):
    def built():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        names = {"one": profile, "two": "swa"}
        average = polyak.Averages(model, names) if several else polyak.Average(model, profile)
        average.attach(optimizer)
        return model, optimizer, average

    def train(model, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    model, optimizer, average = built()
    train(model, optimizer, range(4))
    model[0].requires_grad_(True)
    train(model, optimizer, range(4, 9))
    state, weights = copy.deepcopy((average.state_dict(), model.state_dict()))
    train(model, optimizer, range(9, 14))
    again, optimizer, resumed = built()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    again[0].requires_grad_(True)
    train(again, optimizer, range(9, 14))
    for one, other in zip(
        average.values() if several else [average],
        resumed.values() if several else [resumed],
        strict=True,
    ):
        expected, found = one.averaged_tensors(), other.averaged_tensors()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("profile", ["swa", "ema:half_life=3", polyak.Window(3)])
def test_reset_begins_anew_as_a_new_average_would(profile):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = polyak.Average(model, profile)
    average.attach(optimizer, every=2)

    def train(steps):
        for _ in range(steps):
            model(torch.randn(4, 2)).square().mean().backward()
            optimizer.step()

    train(5)  # one is pending
    average.update_bn([torch.randn(4, 2)])
    average.reset()
    assert average.empty
    assert (average.time, average.count) == (0, 0)
    fresh = polyak.Average(model, profile)
    fresh.attach(optimizer, every=2)
    train(5)
    assert average.count == fresh.count == 2
    new = fresh.averaged_tensors()
    assert all(torch.equal(t, new[name]) for name, t in average.averaged_tensors().items())


def test_reset_of_several_and_during_a_loan():
    model = nn.Linear(2, 1)
    averages = polyak.Averages(model, {"swa": "swa", "ema": "ema:decay=0.5"})
    other = polyak.Average(model, "swa")
    averages.update()
    other.update()
    assert not averages.lent
    with other.applied():
        assert averages.lent
        assert averages["ema"].lent
        assert other.lent
        with pytest.raises(UsageError, match=r"reset\(\) inside applied"):
            averages.reset()
    averages.reset()
    assert averages.empty
    assert not other.lent
    assert not other.empty
