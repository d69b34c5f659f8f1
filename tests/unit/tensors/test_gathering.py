"""Many small tensors in one copy for each kind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from polyak import EMA, SWA, Average, Averages
from polyak.tensors.gathering import Gathered


def small_tensors():
    torch.manual_seed(0)
    return [
        torch.tensor(3),
        torch.randn(4),
        torch.randn(5).bfloat16(),
        torch.tensor(7),
        torch.randn(12)[::3],
        torch.randn(3, 2).t(),
        torch.empty(0),
        torch.randn(2, 2),
        torch.tensor(0.5),
        torch.randn(1, 4)[0],
    ]


def test_every_kind_comes_back_as_it_was_taken():
    live = small_tensors()
    taken = Gathered(live).take()
    expected = [tensor.clone() for tensor in live]
    for tensor in live:
        tensor.fill_(9)
    targets = [torch.full_like(tensor, 5) for tensor in live]
    taken.spread(targets)
    for target, value in zip(targets, expected, strict=True):
        assert torch.equal(target, value)


def test_an_update_does_not_copy_them_one_by_one():
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(40)))
    average = Average(model, SWA())
    average.update()
    with torch.profiler.profile() as profiler:
        average.update()
    assert [event.name for event in profiler.events()].count("aten::copy_") < 40


class Norm(nn.BatchNorm1d):
    """A statistic of two dimensions, beside those that all have."""

    def __init__(self):
        super().__init__(3)
        self.register_buffer("running_table", torch.zeros(2, 3))


@pytest.mark.parametrize("capturable", [False, True])
def test_statistics_are_those_of_the_last_update_whenever_they_are_read(capturable):
    model = nn.Sequential(nn.Linear(3, 3), Norm())
    averages = Averages(model, {"one": SWA(), "late": "swa:start=3"}, capturable=capturable)
    seen = []
    for _ in range(4):
        model(torch.randn(5, 3))
        averages.update()
        seen.append(copy.deepcopy(dict(model.named_buffers())))
    model(torch.randn(5, 3))
    for average in averages.values():
        found = average.averaged_tensors()
        for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
            assert torch.equal(found[name], seen[-1][name])


def test_a_member_that_took_nothing_keeps_what_it_has():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    averages = Averages(model, {"each": EMA(decay=0.5), "second": SWA()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages["second"].attach(optimizer, every=2)
    averages.attach(optimizer)
    means = []
    for _ in range(3):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        means.append(model[1].running_mean.clone())
    assert torch.equal(averages["each"].averaged_tensors()["1.running_mean"], means[2])
    assert torch.equal(averages["second"].averaged_tensors()["1.running_mean"], means[1])
    state = averages["second"].state_dict()
    assert torch.equal(state["statistics"]["1.running_mean"], means[1])


def test_what_was_measured_is_not_overwritten_by_what_was_taken_before():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = Average(model, SWA())
    model(torch.randn(5, 3))
    average.update()
    average.update_bn([torch.randn(50, 3) + 5])
    measured = average.averaged_tensors()["1.running_mean"]
    assert not torch.equal(measured, model[1].running_mean)
    again = Average(model, SWA())
    again.update()
    again.load_state_dict(copy.deepcopy(average.state_dict()))
    assert torch.equal(again.averaged_tensors()["1.running_mean"], measured)
