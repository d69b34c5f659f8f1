"""What only a GPU can show: no waiting, few launches, capture in a graph, averages on the host."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import polyak
from polyak import EMA, SWA, Average, Averages, Window
from polyak.errors import UsageError
from polyak.tensors import fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture
def waiting():
    """`with waiting("error"): ...` refuses to wait for the GPU, "warn" warns; never beyond the test."""

    def switch(mode):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that this is a prototype
            torch.cuda.set_sync_debug_mode(mode)

    @contextmanager
    def until_the_end_of_the_block(mode):
        torch.cuda.synchronize()
        switch(mode)
        try:
            yield
        finally:
            switch("default")

    try:
        yield until_the_end_of_the_block
    finally:
        switch("default")


def model_of(count=20, size=1000, dtype=torch.float32):
    return nn.ParameterList(torch.zeros(size, dtype=dtype) for _ in range(count)).cuda()


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("profile", [SWA(), EMA(decay=0.99999, keep_initial=True)])
def test_an_update_waits_for_nothing(profile, dtype, waiting):
    model = model_of(dtype=dtype)
    average = Average(model, profile)
    average.update()
    average.update()
    with waiting("error"):
        for _ in range(3):
            average.update()


LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")  # by torch, by Triton


def launches(call):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in profiler.key_averages() if e.key.startswith(LAUNCHES))


def test_launches_do_not_grow_with_the_number_of_tensors():
    counts = []
    for count in (100, 400):
        average = Average(model_of(count, 64), SWA())
        average.update()
        average.update()
        counts.append(launches(average.update))
    assert counts[1] <= 4 * max(counts[0], 1)
    assert counts[1] < 40


@pytest.mark.skipif(
    not (torch.cuda.is_available() and fused.is_available(torch.device("cuda", 0))),
    reason="needs Triton",
)
def test_several_averages_of_several_dtypes_with_statistics_are_one_launch():
    norms = nn.ModuleList(nn.BatchNorm1d(64) for _ in range(30)).cuda()
    model = nn.ModuleList([model_of(20), model_of(20, dtype=torch.bfloat16), norms])
    averages = Averages(model, {"swa": SWA(), "ema": EMA(decay=0.9), "slow": EMA(decay=0.99)})
    averages.update()
    averages.update()
    assert launches(averages.update) == 1


def waits(call, waiting):
    with warnings.catch_warnings(record=True) as said, waiting("warn"):
        warnings.simplefilter("always")
        call()
    return sum("synchronizing" in str(warning.message) for warning in said)


def test_update_bn_does_not_wait_for_each_layer(waiting):
    counts = []
    for n_layers in (4, 40):
        model = nn.Sequential(*(nn.BatchNorm1d(8) for _ in range(n_layers))).cuda()
        batches = [torch.randn(n, 8, device="cuda") for n in (16, 16, 5)]
        counts.append(waits(lambda m=model, b=batches: polyak.update_bn(m, b), waiting))
    assert counts[1] == counts[0] <= 4


def test_captured_in_a_graph():
    model = model_of()
    average = Average(model, SWA())
    with pytest.raises(polyak.PolyakError):
        _capture(average)  # the time is on the host
    fill(model, 1.0)
    average = Average(model, SWA(), capturable=True)
    average.update()
    average.update()
    graph = _capture(average)
    for value in (4.0, 7.0):
        fill(model, value)
        graph.replay()
    # The capture itself runs nothing.
    assert (average.time, average.count) == (5, 5)
    assert average.averaged_tensors()["0"].unique().item() == pytest.approx((1 + 1 + 1 + 4 + 7) / 5)
    average.update()  # eagerly, between two replays
    fill(model, 15.0)
    graph.replay()
    assert (average.time, average.count) == (7, 7)
    assert average.averaged_tensors()["0"].unique().item() == pytest.approx(36 / 7)
    average.reset()
    for value in (2.0, 4.0):
        fill(model, value)
        graph.replay()
    assert (average.time, average.count) == (2, 2)
    assert average.averaged_tensors()["0"].unique().item() == 3.0


def test_a_graph_outlives_the_tables_of_the_host():
    model = model_of()
    model[1].requires_grad_(False)
    average = Average(model, SWA(), capturable=True)
    average.update()
    graph = _capture(average)
    model[1].requires_grad_(True)
    average._tracker.add_unfrozen()  # the next update makes new tables
    average.update()
    torch.full((1000, 1000), -1, device="cuda")  # where the old ones would have been
    fill(model, 4.0)
    graph.replay()
    assert average.averaged_tensors()["0"].unique().item() == 1.0


@pytest.mark.parametrize(
    ("profile", "options", "updates", "why"),
    [
        (SWA(), {}, 0, "the first update"),
        (Window(3), {}, 1, "a window keeps its snapshots"),
        (SWA(), {"nonfinite": "skip"}, 1, "looks at the weights on the host"),
    ],
)
def test_what_cannot_be_captured_is_refused_and_goes_on(profile, options, updates, why):
    model = model_of()
    average = Average(model, profile, capturable=True, **options)
    for _ in range(updates):
        average.update()
    with pytest.raises(UsageError, match=why):
        _captured(average.update)
    fill(model, 1.0)
    average.update()
    assert average.count == updates + 1
    assert average.averaged_tensors()["0"].unique().item() == 1 / (updates + 1)


def _capture(average):
    average.update()
    return _captured(average.update)


def _captured(call):
    """A graph of this, and of one launch before it: of an empty graph torch warns."""
    anything = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        anything.add_(1)
        call()
    return graph


class Training:
    """A network with BatchNorm, its optimizer and averages: the same steps eagerly and in a graph."""

    def __init__(self):
        torch.manual_seed(0)
        layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1)
        self.model = nn.Sequential(*layers).cuda()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        profiles = {"swa": SWA(), "ema": EMA(decay=0.9), "after": polyak.After(5, SWA())}
        self.averages = Averages(self.model, profiles, capturable=True)
        self.x = torch.randn(32, 8, device="cuda")

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.averages.update()


def test_a_whole_training_step_in_a_graph():
    eager, captured = Training(), Training()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch's documentation has it: warm up beside the main stream
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    captured.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        eager.step()
    for seed in range(6):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
        for training in (eager, captured):
            training.x.copy_(x)
        eager.step()
        graph.replay()
    for name, average in eager.averages.items():
        other = captured.averages[name]
        assert (average.time, average.count) == (other.time, other.count)
        found, expected = other.averaged_tensors(), average.averaged_tensors()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found["1.num_batches_tracked"].item() == 9
    with captured.averages["swa"].applied():
        polyak.update_bn(captured.model, [captured.x])
    graph.replay()
    found = captured.averages["swa"].averaged_tensors()
    assert torch.equal(found["1.running_mean"], captured.model[1].running_mean)


def test_fused_steps_that_a_scaler_skips():
    model = nn.Linear(3, 1).cuda()
    nn.init.constant_(model.weight, 3.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    average = Average(model, SWA())
    average.attach(optimizer)
    for index in range(5):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3, device="cuda")).sum()).backward()
        if index < 2:
            model.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert average.count == 3
    assert average.averaged_tensors()["weight"].unique().item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [4, 60])  # fewer and more than there is room for on the host
def test_averages_on_the_host_see_every_step_as_it_was(count, dtype):
    model = model_of(count, 1_000_000, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averages = Averages(model, {"swa": SWA(), "ema": EMA(decay=0.9)}, device="cpu")
    on_device = Average(model, SWA())
    averages.attach(optimizer)
    on_device.attach(optimizer)
    for _ in range(10):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, -1.0)
        optimizer.step()  # overwrites what is still being read, unless it is ordered after it
    expected = on_device.averaged_tensors()
    found = averages["swa"].averaged_tensors()
    for name, tensor in expected.items():
        assert averages["swa"].state_dict()["tensors"][name].device.type == "cpu"
        assert tensor.device.type == "cuda"
        torch.testing.assert_close(found[name], tensor)
    with averages["swa"].applied():
        assert next(model.parameters()).device.type == "cuda"


def test_an_average_on_the_host_is_not_captured():
    model = model_of()
    average = Average(model, SWA(), device="cpu", capturable=True)
    average.update()
    average.averaged_tensors()
    with pytest.raises(UsageError, match="kept on the host"):
        _captured(average.update)


def test_in_place_keeps_a_captured_forward_right():
    model = nn.Linear(4, 4, bias=False).cuda()
    average = Average(model, SWA())
    for value in (1.0, 3.0):
        fill(model, value)
        average.update()
    x = torch.ones(1, 4, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(x)
    with average.applied(in_place=True):
        graph.replay()
        assert y[0, 0].item() == 8.0
    graph.replay()
    assert y[0, 0].item() == 12.0


def bits(tensors):
    return [tensor.detach().view(torch.int16).clone() for tensor in tensors]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_bfloat16_model_is_lent_in_64_mb_and_comes_back_to_the_bit(in_place):
    torch.manual_seed(0)
    model = nn.ParameterList(torch.randn(30_000_001).bfloat16() for _ in range(3)).cuda()
    average = Average(model, SWA())
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        average.update()
    own, expected = bits(model.parameters()), bits(average.averaged_tensors().values())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with average.applied(in_place=in_place):
        assert torch.cuda.max_memory_allocated() - before <= 64 << 20
        assert all(map(torch.equal, bits(model.parameters()), expected))
    assert all(map(torch.equal, bits(model.parameters()), own))
    assert all(map(torch.equal, bits(average.averaged_tensors().values()), expected))


def test_an_update_where_the_gpu_is_the_default_device():
    with torch.device("cuda"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        average = Average(model, EMA(decay=0.9999, keep_initial=True))
        for _ in range(3):
            average.update()
        polyak.update_bn(model, [torch.randn(n, 3) for n in (16, 5)])
    assert average.count == 3
