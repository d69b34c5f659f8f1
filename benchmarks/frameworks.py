"""What averaging adds to a real run in a framework, beside the framework's own: time and memory.

    python benchmarks/frameworks.py [--only lightning] [--steps 100] [--rounds 5] [--width 1024]

Each arm runs the same training without an average, with polyak's adapter and with what the framework
offers. Time is what a step takes longer than without; memory is what is allocated more while the run lasts,
as a multiple of the weights.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timing import figure, interleaved
from torch import nn

# The arms: a framework, and a function that gives candidates by name, each of which runs `steps` steps and
# returns whatever must stay alive for the average to be in memory. "none" is the run without an average.
ARMS: dict[str, Callable[[int, int], dict[str, Callable[[], Any]]]] = {}


def arm(function):
    ARMS[function.__name__] = function
    return function


def network(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(8)))


@arm
def lightning(steps: int, width: int) -> dict[str, Callable[[], Any]]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
    from torch.utils.data import DataLoader, TensorDataset

    from polyak.integrations.lightning import WeightAveraging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(width)

        def training_step(self, batch, _):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Held(Callback):
        """Counts the values in memory that are alive at the end of training."""

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if batch_idx == steps - 1:
                held.append(alive())

    held: list[int] = []

    def run(*callbacks) -> Callable[[], int]:
        def call() -> int:
            module = Module()
            trainer = Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=False,
                callbacks=[*(make() for make in callbacks), Held()],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, DataLoader(TensorDataset(torch.zeros(steps, width))))
            return held.pop()

        return call

    return {
        "none": run(),
        "polyak": run(lambda: WeightAveraging("ema:decay=0.999")),
        "own": run(lambda: EMAWeightAveraging(decay=0.999)),
    }


def alive() -> int:
    """Bytes of the storages of all tensors that are alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(ARMS), action="append")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    weights = sum(p.numel() * p.element_size() for p in network(options.width).parameters())
    for name in options.only or ARMS:
        candidates = ARMS[name](options.steps, options.width)
        held = {key: call() for key, call in candidates.items()}
        times = interleaved(candidates, rounds=options.rounds)
        rounds = range(options.rounds)
        added = {
            key: statistics.median(times.seconds[key][i] - times.seconds["none"][i] for i in rounds)
            / options.steps
            for key in candidates
            if key != "none"
        }
        figure(
            name,
            steps=options.steps,
            weights_mib=weights / 2**20,
            none_ms_per_step=times.median("none") / options.steps * 1e3,
            **{f"{key}_adds_ms_per_step": seconds * 1e3 for key, seconds in added.items()},
            **{f"{key}_adds_memory": (held[key] - held["none"]) / weights for key in added},
        )


if __name__ == "__main__":
    main()
