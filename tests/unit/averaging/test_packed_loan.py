"""Averages of bfloat16 weights are lent without a copy, and shown, saved and copied alike."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import polyak
from polyak import EMA, SWA, Average, Averages, Window
from polyak.averaging import packing
from polyak.errors import NonFiniteError, PolyakWarning, UsageError
from polyak.tensors.memory import address


@pytest.fixture(autouse=True)
def all_are_packed(monkeypatch):
    monkeypatch.setattr(packing, "_COPIED_BYTES", {"cpu": 0})


def make():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(8 * 4, 5), nn.LayerNorm(5)).bfloat16()


def moved(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))


def averaged(model, profile=None, updates=2, **options):
    average = Average(model, profile or SWA(), **options)
    for seed in range(updates):
        moved(model, seed)
        average.update()
    return average


def bits(tensors):
    return {n: t.detach().clone().view(torch.int16) for n, t in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def exact(average):
    return copy.deepcopy(average.state_dict()["tensors"])


def test_nothing_is_copied_and_every_bit_comes_back():
    model = make()
    average = averaged(model)
    own, before, shown = bits(model.state_dict()), exact(average), average.averaged_tensors()
    addresses = [address(p) for p in model.parameters()]
    kept = [address(t) for t in average.state_dict()["tensors"].values()]
    for _ in range(3):
        with average.applied():
            assert [address(p) for p in model.parameters()] == addresses
            assert same(bits(model.state_dict()), bits(shown))
            model(torch.randn(2, 3, 4, 4).bfloat16())
            assert [address(p) for p in model.parameters()] == addresses
        assert [address(p) for p in model.parameters()] == addresses
        assert [address(t) for t in average.state_dict()["tensors"].values()] == kept
        assert same(bits(model.state_dict()), own)
        assert same(exact(average), before)


def allocated(call):
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    out = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            out += event.nbytes()
            most = max(most, out)
    return most


def lend(average, **options):
    with average.applied(**options):
        pass


@pytest.mark.parametrize("options", [{}, {"in_place": True}])
def test_it_takes_64_megabytes_however_large_the_model(monkeypatch, options):
    monkeypatch.undo()
    model = nn.ParameterList([torch.ones(4_000_000) for _ in range(12)]).bfloat16()  # 96 MB
    average = averaged(model, updates=1)
    assert allocated(lambda: lend(average, **options)) <= 64_000_000


def test_an_error_gives_everything_back():
    model = make()
    average = averaged(model)
    own, before = bits(model.state_dict()), exact(average)
    with pytest.raises(ZeroDivisionError), average.applied():
        moved(model, 9)
        1 / 0  # noqa: B018
    assert same(bits(model.state_dict()), own)
    assert same(exact(average), before)


def test_what_is_written_in_the_block_is_undone():
    model = make()
    average = averaged(model)
    own, before, shown = bits(model.state_dict()), exact(average), average.averaged_tensors()
    with average.applied():
        for parameter in model.parameters():
            parameter.data.zero_()
        with torch.no_grad():
            model[2].weight.fill_(float("nan"))
        assert same(bits(average.averaged_tensors()), bits(shown))
        assert same(exact(average), before)
    assert same(bits(model.state_dict()), own)
    assert same(exact(average), before)


@pytest.mark.parametrize("options", [{}, {"in_place": True}])
def test_reads_inside_see_the_average(tmp_path, options):
    model = make()
    average = averaged(model)
    state, shown = copy.deepcopy(average.state_dict()), average.averaged_tensors()
    average.save(tmp_path / "outside.safetensors")
    with average.applied(**options):
        inside = copy.deepcopy(average.state_dict())
        average.save(tmp_path / "inside.safetensors")
        assert same(bits(average.averaged_tensors()), bits(shown))
        twin = copy.deepcopy(model).float()
        average.follower(twin).remove()
        assert (average.count, average.time, average.lent) == (2, 2.0, True)
    assert same(state["tensors"], inside["tensors"])
    assert {k: v for k, v in state.items() if k != "tensors"} == {
        k: v for k, v in inside.items() if k != "tensors"
    }
    assert same(dict(twin.named_parameters()), state["tensors"])
    files = [load_file(tmp_path / f"{name}.safetensors") for name in ("outside", "inside")]
    assert same(bits(files[0]), bits(files[1]))
    assert same(bits(files[0]), bits(shown))


@pytest.mark.parametrize(
    ("profile", "options"),
    [
        (SWA(), {}),
        (SWA(), {"dtype": torch.float64}),
        (Window(length=2), {}),
        (EMA(decay=0.9999, keep_initial=True), {}),
        (EMA(decay=0.5), {"device": "cpu"}),
    ],
)
def test_evaluated_saved_copied_and_written_back_are_the_same(tmp_path, profile, options):
    model = make()
    average = averaged(model, profile, **options)
    state = average._member.accumulator
    values = [state.value(i, average._member.clock).float() for i in range(6)]
    ties = [(v.view(torch.int32) & 0x1FFFF) == 0x8000 for v in values]  # rounded to even: down
    if not isinstance(profile, EMA):
        assert sum(int(t.sum()) for t in ties) > 20
    with average.applied():
        lent = bits(model.state_dict())
    average.save(tmp_path / "a.safetensors")
    other, back = make(), copy.deepcopy(model)
    average.copy_to(other)
    assert same(lent, bits(load_file(tmp_path / "a.safetensors")))
    assert same(lent, bits(other.state_dict()))
    assert same(lent, bits(average.averaged_tensors()))
    average.follower(back)
    assert same(lent, bits(back.state_dict()))
    for name, value, tie in zip(model.state_dict(), values, ties, strict=True):
        away = lent[name].view(torch.bfloat16).float().abs() > value.abs()
        assert away[tie].all()
    average.copy_to(wide := make().float())
    assert wide[2].weight.dtype is torch.float32


def test_a_float32_average_is_rounded_alike_where_a_copy_is_narrower():
    model = nn.Linear(2, 1, bias=False)
    average = Average(model, SWA())
    nn.init.constant_(model.weight, 1.00390625)
    average.update()
    other = nn.Linear(2, 1, bias=False).bfloat16()
    average.copy_to(other)
    assert other.weight.tolist() == [[1.0078125, 1.0078125]]


def test_write_back_rounds_alike():
    model = make()
    average = Average(model, SWA())
    average.write_back(every=2)
    for seed in range(2):
        moved(model, seed)
        average.update()
    assert same(bits(model.state_dict()), bits(average.averaged_tensors()))


def test_a_nan_is_copied_and_the_rest_is_not():
    model = make()
    average = averaged(model)
    average._member.accumulator.tensors[2][0, 0] = float("nan")
    average._member.accumulator.tensors[0][0, 0, 0, 0] = float("inf")
    own, addresses = bits(model.state_dict()), [address(p) for p in model.parameters()]
    before = {n: t.view(torch.int32) for n, t in exact(average).items()}
    with average.applied():
        assert model[2].weight[0, 0].isnan()
        assert model[2].weight.isnan().sum() == 1
        assert model[0].weight[0, 0, 0, 0] == float("inf")
        assert [address(p) == a for p, a in zip(model.parameters(), addresses, strict=True)] == [
            True, True, False, True, True, True,
        ]  # fmt: skip
        with pytest.raises(NonFiniteError, match=r"0\.weight, 2\.weight"):
            average.save("never.safetensors")
    assert same(bits(model.state_dict()), own)
    assert same({n: t.view(torch.int32) for n, t in exact(average).items()}, before)


def test_a_value_that_rounds_to_infinity_is_finite_for_every_check(tmp_path):
    model = nn.Linear(4, 4, bias=False).bfloat16()
    average = averaged(model)
    average._member.accumulator.tensors[0].fill_(3.4e38)
    with average.applied(check=True):
        assert model.weight.isinf().all()
        average.save(tmp_path / "inside.safetensors")
    average.save(tmp_path / "outside.safetensors")


def test_several_averages_of_one_model():
    model = make()
    averages = Averages(model, {"swa": SWA(), "ema": EMA(decay=0.5), "window": Window(length=2)})
    for seed in range(3):
        moved(model, seed)
        averages.update()
    own, states = bits(model.state_dict()), copy.deepcopy(averages.state_dict())
    for name, average in averages.items():
        shown = average.averaged_tensors()
        with average.applied():
            assert same(bits(model.state_dict()), bits(shown))
            for other, state in averages.state_dict().items():
                assert same(state["tensors"], states[other]["tensors"]), (name, other)
        assert same(bits(model.state_dict()), own)
    assert same(averages.state_dict()["swa"]["tensors"], states["swa"]["tensors"])


def test_training_goes_on_as_if_nothing_had_been_lent():
    ends = []
    for lends in (False, True):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        average = Average(model, SWA())
        average.attach(optimizer)
        for seed in range(4):
            torch.manual_seed(seed)
            loss = model(torch.randn(6, 3, 4, 4).bfloat16()).square().sum()
            optimizer.zero_grad()
            if lends and seed:  # between a forward pass and its backward pass, too
                lend(average)
            loss.backward()
            optimizer.step()
        ends.append((bits(model.state_dict()), exact(average)))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


def test_views_of_one_storage_and_writes_to_them():
    flat = torch.randn(60).bfloat16()
    model = nn.Module()
    model.a = nn.Parameter(flat[1:31].view(5, 6))
    model.b = nn.Parameter(flat[31:59].view(4, 7).t())
    average = averaged(model)
    own, before, shown = flat.clone(), exact(average), average.averaged_tensors()
    with average.applied():
        assert torch.equal(flat[1:31], shown["a"].flatten())
        assert same(exact(average), before)
    assert torch.equal(flat, own)
    assert same(exact(average), before)
    with pytest.warns(PolyakWarning, match="written to"), average.applied(), torch.no_grad():
        model.a.fill_(3.0)
    assert torch.equal(flat, own)
    assert (average.averaged_tensors()["a"] == 3.0).all()
    assert torch.equal(exact(average)["b"], before["b"])


def test_views_that_overlap_are_copied():
    flat = torch.randn(40).bfloat16()
    model = nn.Module()
    model.a, model.b = nn.Parameter(flat[:30]), nn.Parameter(flat[20:])
    average = averaged(model, updates=1)
    own, before = flat.clone(), exact(average)
    with average.applied():
        assert same(exact(average), before)
    assert torch.equal(flat, own)
    assert same(exact(average), before)


def test_a_state_dict_taken_inside_keeps_its_values():
    model = make()
    average = averaged(model)
    shown, own = average.averaged_tensors(), bits(model.state_dict())
    with average.applied():
        taken = model.state_dict()
    assert same(bits(model.state_dict()), own)
    moved(model, 5)
    average.update()
    assert same(bits(taken), bits(shown))
    with average.applied():
        assert same(bits(model.state_dict()), bits(average.averaged_tensors()))


def test_statistics_that_are_averaged_by_name_are_not_packed():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).bfloat16()
    average = Average(model, SWA(), average_buffers="*running_*")
    for _ in range(2):
        model(torch.randn(8, 3).bfloat16())
        average.update()
    before = exact(average)
    with average.applied():
        polyak.update_bn(model, [torch.randn(16, 3).bfloat16()])
    assert torch.equal(exact(average)["1.running_mean"], before["1.running_mean"])
    with pytest.warns(PolyakWarning, match="written to"), average.applied(in_place=True):
        polyak.update_bn(model, [torch.randn(16, 3).bfloat16()])
    assert torch.equal(exact(average)["1.running_mean"], before["1.running_mean"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_other_narrow_weights_are_copied(dtype):
    model = nn.Linear(3, 3)
    model.weight.data = model.weight.data.to(dtype)
    average = Average(model, SWA())
    average.update()
    own, where = model.weight.detach().float(), address(model.weight)
    with average.applied():
        assert address(model.weight) != where
        assert model.weight.dtype is dtype
    assert torch.equal(model.weight.float(), own)


def test_inside_and_outside_of_inference_mode():
    model = make()
    average = averaged(model)
    own, before = bits(model.state_dict()), exact(average)
    with torch.inference_mode(), average.applied():
        model(torch.randn(2, 3, 4, 4).bfloat16())
        inside = average.state_dict()["tensors"]
        assert same(inside, before)
    loan = average.lend()
    with torch.inference_mode():
        loan.give_back()
    assert same(bits(model.state_dict()), own)
    assert same(exact(average), before)
    average.update()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("profile", [SWA(), Window(3), EMA(decay=0.99999)])
def test_figures_inside_a_loan_are_those_of_outside(profile, in_place, dtype):
    # The last profile has an open block; a window is computed; the rest is swapped or packed.
    model = make().to(dtype)
    averages = Averages(model, {"lent": profile, "other": EMA(decay=0.5)}, unit="steps")
    for seed in range(4):
        moved(model, seed)
        averages.update()
    expected = {name: average.metrics() for name, average in averages.items()}
    assert all(figures["distance"] > 0 for figures in expected.values())
    with averages["lent"].applied(in_place=in_place):
        model(torch.ones(2, 3, 4, 4, dtype=dtype))
        assert {name: average.metrics() for name, average in averages.items()} == expected
    assert {name: average.metrics() for name, average in averages.items()} == expected


def test_figures_of_another_average_are_refused_inside_a_loan():
    model = make()
    average, other = averaged(model), averaged(model)
    with average.applied(), pytest.raises(UsageError, match=r"metrics\(\) inside applied"):
        other.metrics()
