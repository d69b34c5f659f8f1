"""BatchNorm statistics of the averaged weights."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from checks import Result, below, check, near


def _errors(peer: Any, values: torch.Tensor, sizes: list[int]) -> Result:
    layer = nn.BatchNorm1d(values.shape[1])
    peer.update_bn(nn.Sequential(layer), list(values.split(sizes)))
    exact = values.double()
    errors = [
        ((layer.running_mean - exact.mean(0)) / exact.std(0)).abs().max().item(),
        (layer.running_var / exact.var(0) - 1).abs().max().item(),
    ]
    return below(max(errors), 1e-5, "relative error")


@check("BatchNorm", "uneven batches (128, 128, 2): the statistics of all the data, within 1e-5")
def uneven(peer: Any) -> Result:
    torch.manual_seed(0)
    values = torch.randn(258, 4)
    values[256:] += 10
    return _errors(peer, values, [128, 128, 2])


@check("BatchNorm", "ordered data: the same, within 1e-5")
def ordered(peer: Any) -> Result:
    torch.manual_seed(0)
    return _errors(peer, torch.randn(256, 4).sort(0).values, [64] * 4)


@check("BatchNorm", "a last batch of one sample: the same, within 1e-5")
def single(peer: Any) -> Result:
    torch.manual_seed(0)
    return _errors(peer, torch.randn(65, 4), [64, 1])


@check("BatchNorm", "200,704 values a channel in channels-last layout: the same, within 1e-5")
def channels_last(peer: Any) -> Result:
    torch.manual_seed(0)
    values = torch.randn(64, 4, 56, 56).contiguous(memory_format=torch.channels_last)
    layer = nn.BatchNorm2d(4)
    peer.update_bn(nn.Sequential(layer), [values])
    exact = values.double().transpose(0, 1).flatten(1).var(1)
    return below((layer.running_var / exact - 1).abs().max().item(), 1e-5, "relative error")


@check("BatchNorm", "a frozen layer keeps its statistics (mean 5)")
def frozen(peer: Any) -> Result:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    model[0].running_mean.fill_(5.0)
    model[0].eval()
    peer.update_bn(model, [torch.randn(64, 1)])
    return near(model[0].running_mean.item(), 5.0, 1e-6)


@check("BatchNorm", "dropout is off during the pass (variance 1)")
def dropout(peer: Any) -> Result:
    torch.manual_seed(0)
    values = torch.randn(4096, 1)
    values /= values.std()
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1))
    peer.update_bn(model, [values])
    return near(model[1].running_var.item(), 1.0, 1e-3)


@check("BatchNorm", "a loader that fails leaves model and statistics as they were")
def failing_loader(peer: Any) -> Result:
    def batches() -> Any:
        yield torch.randn(8, 1)
        raise KeyError

    model = nn.Sequential(nn.BatchNorm1d(1)).eval()
    model[0].running_mean.fill_(5.0)
    with contextlib.suppress(KeyError):
        peer.update_bn(model, batches())
    found = (model[0].running_mean.item(), model[0].momentum, model.training)
    return Result(
        found == (5.0, 0.1, False), f"mean {found[0]:.2g}, momentum {found[1]}, training {found[2]}"
    )


@check("BatchNorm", "submodules keep their training modes")
def modes(peer: Any) -> Result:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.5))
    model[1].eval()
    peer.update_bn(model, [torch.randn(8, 1)])
    return Result(not model[1].training, "all set to training")


@check("BatchNorm", "batches that are dicts")
def mappings(peer: Any) -> Result:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(1)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.bn(pixels)

    model = Keywords()
    peer.update_bn(model, [{"pixels": torch.tensor([[1.0], [3.0]])}])
    return near(model.bn.running_mean.item(), 2.0, 1e-6)
