"""The arithmetic, the cutting, the names and the search for NaN, each on its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polyak.errors import NonFiniteError, UsageError
from polyak.tensors import blend
from polyak.tensors.blend import GroupedTensors, add_, blank_like, lerp_, paired_parts
from polyak.tensors.finite import nonfinite, refuse_nonfinite
from polyak.tensors.names import named_tensors
from polyak.tensors.swap import current_owner, swapped
from polyak.tensors.updates import Update


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(blend, "_GROUP_VALUES", {"cpu": 100})


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    return [
        torch.randn(7, 90).to(dtype),  # larger than a group
        torch.randn(3).to(dtype),
        torch.randn(40, 6).to(dtype).t(),  # permuted, but dense
        torch.randn(20, 20).to(dtype)[:, ::2],  # with gaps
        torch.tensor(1.5).to(dtype),
        torch.empty(0, 4).to(dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("n_averages", [1, 3])
def test_every_value_is_reached_once_however_it_is_cut(small_groups, dtype, n_averages):
    live = tensors(dtype)
    kept = [blank_like(live, None, None) for _ in range(n_averages)]
    grouped = GroupedTensors(live, kept[0], n_averages=n_averages)
    weights = [0.25, 1.0, torch.tensor(0.5, dtype=torch.float64)]
    grouped.blend([Update(grouped.group(k), w) for k, w in zip(kept, weights, strict=False)])
    for index in range(n_averages):
        for found, source in zip(kept[index], live, strict=True):
            torch.testing.assert_close(found, source.to(found.dtype) * float(weights[index]))
    grouped.blend([Update(grouped.group(k), 2.0, adds=True) for k in kept])
    for found, source in zip(kept[0], live, strict=True):
        torch.testing.assert_close(found, source.to(found.dtype) * 2.25)


def test_groups_of_one_average_of_one_dtype_are_whole():
    live = tensors()
    grouped = GroupedTensors(live, blank_like(live, None, None), n_averages=1)
    assert [len(group) for group in grouped.live] == [len(live)]
    assert all(a is b for a, b in zip(grouped.live[0], live, strict=True))


def test_groups_stay_bounded(small_groups):
    live = [torch.randn(n) for n in (30, 30, 30, 30, 250)]
    grouped = GroupedTensors(live, live, n_averages=2)
    assert [sum(map(torch.numel, group)) for group in grouped.live] == [90, 30, 100, 100, 50]


def test_weights_of_one_and_on_a_device():
    source = [torch.tensor([2.0, 3.0])]
    poisoned = [torch.tensor([float("nan"), 1.0])]
    lerp_(poisoned, source, 1.0)
    assert poisoned[0].tolist() == [2.0, 3.0]
    blank = [torch.zeros(2)]
    lerp_(blank, source, torch.tensor(1.0, dtype=torch.float64))
    assert blank[0].tolist() == [2.0, 3.0]
    lerp_(blank, [torch.ones(2)], torch.tensor(0.0, dtype=torch.float64))
    assert blank[0].tolist() == [2.0, 3.0]
    add_(blank, source, torch.tensor(0.5))
    assert blank[0].tolist() == [3.0, 4.5]


def test_parts_of_a_pair_cover_it(small_groups):
    a, b = torch.randn(9, 31).t(), torch.zeros(9, 31).t()
    for x, y in paired_parts(a, b):
        assert x.numel() <= 100
        y.copy_(x)
    assert torch.equal(a, b)


def test_layout_in_memory_is_that_of_the_weights():
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    assert blank_like([weight], None, None)[0].stride() == weight.stride()


def test_nonfinite_names_only_what_holds_one():
    named = [
        ("fine", torch.ones(3)),
        ("sum overflows", torch.full((4,), 3e38)),
        ("opposite infinities", torch.tensor([float("inf"), float("-inf")])),
        ("nan", torch.tensor([1.0, float("nan")]).bfloat16()),
        ("complex", torch.tensor([complex(1, float("inf"))])),
        ("float8", torch.tensor([float("nan")]).to(torch.float8_e5m2)),
        ("float64", torch.tensor([1e300, -1e300], dtype=torch.float64)),
        ("counter", torch.tensor([3])),
        ("empty", torch.empty(0)),
    ]
    bad = ["opposite infinities", "nan", "complex", "float8"]
    assert nonfinite(named) == bad
    with pytest.raises(
        NonFiniteError, match="NaN or infinity in opposite infinities, nan, complex"
    ):
        refuse_nonfinite(named, "save()", "Look.")
    many = [(f"w{i}", torch.tensor(float("nan"))) for i in range(30)]
    with pytest.raises(NonFiniteError, match="w19 and 10 more"):
        refuse_nonfinite(many, "save()", "")


def test_a_loan_that_fails_half_way_is_taken_back():
    live = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    values = [torch.ones(2), torch.ones(3, dtype=torch.int64)]  # no parameter can hold the second
    with pytest.raises(RuntimeError), swapped(live, values, owner="me", in_place=set()):
        pass
    assert live[0].tolist() == [0.0, 0.0]
    assert current_owner(live) is None
    optimizer = torch.optim.SGD(live, lr=1.0)
    optimizer.step()


def test_steps_under_a_loan_name_the_owner():
    live = [nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.SGD(live, lr=1.0)
    with swapped(live, [torch.ones(2)], owner="the average", in_place={id(live[0])}):
        assert current_owner(live) == "the average"
        with pytest.raises(UsageError, match="'the average'"):
            optimizer.step()
    assert live[0].tolist() == [0.0, 0.0]


def test_a_module_that_holds_itself_is_walked_once():
    model = nn.Linear(2, 2)
    model.register_module("again", model)
    assert set(named_tensors(model).slots) == {"weight", "bias"}


def test_names_of_a_shared_module_are_ties():
    layer = nn.BatchNorm1d(2)
    named = named_tensors(nn.Sequential(layer, layer))
    assert named.ties["1.running_mean"] == "0.running_mean"
    assert len(named.slots) == 5
