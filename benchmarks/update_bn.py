"""update_bn against torch's, in the same run: `python benchmarks/update_bn.py [--rounds N]`.

Each model runs over the same batches; the result is checked against float64 before it is timed.
The bounds: 1.05 of torch's time, 1.25 on a network so small that the bookkeeping shows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import swa_utils as torchs

sys.path.insert(0, str(Path(__file__).parent))
from timing import figure, interleaved

import polyak


def tiny() -> nn.Sequential:
    """Two normalised layers of a few values: all bookkeeping."""
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16)
    )


def small_images() -> nn.Sequential:
    """The reference run's size: two convolutions on images of 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def deep() -> nn.Sequential:
    """Twelve convolutions of 32 channels on images of 32 x 32."""
    layers: list[nn.Module] = []
    for channels in [3, *[32] * 11]:
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers)


def check(model: nn.Module, batches: list[Tensor]) -> None:
    """The first layer's statistics are those of all its inputs."""
    place = next(i for i, layer in enumerate(model) if hasattr(layer, "running_mean"))
    with torch.no_grad():
        seen = torch.cat([model[:place](batch) for batch in batches]).double()
    values = seen.transpose(0, 1).flatten(1)
    polyak.update_bn(model, batches)
    for found, exact in (
        (model[place].running_mean, values.mean(1)),
        (model[place].running_var, values.var(1)),
    ):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def measure(
    name: str, model: nn.Module, batches: list[Tensor], options: argparse.Namespace
) -> None:
    model.to(options.device)
    batches = [batch.to(options.device) for batch in batches]
    check(model, batches)
    times = interleaved(
        {
            "polyak": lambda: polyak.update_bn(model, batches),
            "torch": lambda: torchs.update_bn(batches, model),
        },
        rounds=options.rounds,
        device=options.device,
    )
    figure(
        "update_bn",
        model=name,
        ratio_to_torch=times.ratio("polyak", "torch"),
        polyak_ms=1e3 * times.median("polyak"),
        torch_ms=1e3 * times.median("torch"),
        batches=len(batches),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    measure("tiny", tiny(), [torch.randn(64, 8) for _ in range(200)], options)
    measure(
        "small images", small_images(), [torch.randn(64, 1, 28, 28) for _ in range(20)], options
    )
    images = [torch.randn(32, 3, 32, 32) for _ in range(6)]
    measure("deep", deep(), images, options)
    last = [image.contiguous(memory_format=torch.channels_last) for image in images]
    measure("deep, channels last", deep().to(memory_format=torch.channels_last), last, options)


if __name__ == "__main__":
    main()
