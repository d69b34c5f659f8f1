"""What recording costs in a real run, beside an EMA of every step by ema-pytorch.

python benchmarks/record.py [--rounds 30]     # each round trains one interval of 58 steps three times

The reference network (53,866 weights) and one of 4.6 million on its images, SGD, batches of 64. A round of
the recorder takes the weights 20 times and writes one interval. Memory is what is held beside the model.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from ema_pytorch import EMA
from timing import figure, interleaved
from torch import nn
from torch.nn.functional import cross_entropy

import polyak
from polyak.reference_run.data import embedded_data
from polyak.reference_run.models import Net

INTERVAL = 58
MODELS: dict[str, Callable[[], nn.Module]] = {
    "reference": Net,
    "wide": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 1450), nn.ReLU(), nn.Linear(1450, 10)
    ),
}  # fmt: skip


def training(model: nn.Module, after: Callable[[], object]) -> Callable[[], None]:
    """One interval of steps."""
    data = embedded_data().train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def run() -> None:
        for _ in range(INTERVAL):
            picked = torch.randint(len(data), (64,))
            loss = cross_entropy(model(data.images[picked]), data.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after()

    return run


def measure(name: str, rounds: int, folder: Path) -> None:
    """Train the three side by side."""
    bare, recorded, followed = (MODELS[name]() for _ in range(3))
    recorder = polyak.Recorder(recorded, folder / name, interval=INTERVAL)
    ema = EMA(followed, beta=0.999, update_after_step=0, update_every=1)
    times = interleaved(
        {
            "bare": training(bare, lambda: None),
            "record": training(recorded, recorder.update),
            "ema-pytorch": training(followed, ema.update),
        },
        rounds=rounds,
    )
    recorder.close()
    trajectory = polyak.Trajectory(folder / name)
    assert len(trajectory.intervals) == rounds + 1
    assert trajectory.intervals[0].captures == 20
    weights = sum(p.numel() * 4 for p in bare.parameters())
    held = sum(t.nbytes for ts in recorder._member.accumulator.tensors_held() for t in ts)
    others = sum(t.nbytes for t in ema.ema_model.state_dict().values())
    for other, memory in (("record", held), ("ema-pytorch", others)):
        figure(
            "recording",
            model=name,
            what=other,
            overhead_percent=100 * (times.ratio(other, "bare") - 1),
            sets_of_weights=memory / weights,
            milliseconds_a_step=1000 * times.median("bare") / INTERVAL,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    folder = Path(tempfile.mkdtemp())
    try:
        for name in MODELS:
            measure(name, rounds, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
