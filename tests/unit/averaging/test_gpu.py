"""What only a GPU can show: no waiting, few launches, capture in a graph, averages on the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyak
from polyak import EMA, SWA, Average, Averages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def model_of(count=20, size=1000, dtype=torch.float32):
    return nn.ParameterList(torch.zeros(size, dtype=dtype) for _ in range(count)).cuda()


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("profile", [SWA(), EMA(decay=0.99999, keep_initial=True)])
def test_an_update_waits_for_nothing(profile, dtype):
    model = model_of(dtype=dtype)
    average = Average(model, profile)
    average.update()
    average.update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            average.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(call):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in profiler.key_averages() if e.key.startswith("cudaLaunchKernel"))


def test_launches_do_not_grow_with_the_number_of_tensors():
    counts = []
    for count in (100, 400):
        average = Average(model_of(count, 64), SWA())
        average.update()
        average.update()
        counts.append(launches(average.update))
    assert counts[1] <= 4 * max(counts[0], 1)
    assert counts[1] < 40


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


def _capture(average):
    average.update()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        average.update()
    return graph


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
def test_averages_on_the_host_see_every_step_as_it_was(dtype):
    model = model_of(4, 1_000_000, dtype)
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
