"""A small run under Accelerate, alone or as one process of several: `torchrun accelerate_run.py FOLDER`.

Each process has data of its own, so BatchNorm statistics differ from process to process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import polyak
from polyak.integrations.accelerate import track

BATCHES = 12


class Run:
    """Model, optimizer, data and averages, prepared in the order that Accelerate documents."""

    def __init__(self, accumulation: int = 2, *, missing: str = "raise", **options: Any) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=accumulation, **options
        )
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        schedule = polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=2)
        count = BATCHES * self.accelerator.num_processes
        data = TensorDataset(torch.randn(4 * count, 4).sort(0).values, torch.randn(4 * count, 1))
        self.model, self.optimizer, self.lr, self.data = self.accelerator.prepare(
            model, optimizer, polyak.LRSchedule(optimizer, schedule), DataLoader(data, 4)
        )
        self.ema = polyak.Average(self.model, polyak.EMA(decay=0.8))
        self.ema.attach(self.optimizer, every=2)
        self.several = polyak.Averages(self.model, {"swa": "swa", "window": polyak.Window(2)})
        self.several["swa"].attach(self.optimizer, at=self.lr)
        self.several.attach(self.optimizer)
        track(self.accelerator, self.ema, missing=missing)
        track(self.accelerator, self.several, "several", missing=missing)

    def train(self, first: int = 0, last: int = BATCHES) -> Run:
        """The batches from `first` up to `last` of one epoch."""
        self.model.train()
        batches = self.accelerator.skip_first_batches(self.data, first) if first else self.data
        for index, (x, y) in enumerate(batches, start=first):
            if index == last:
                break
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(nn.functional.mse_loss(self.model(x), y))
                self.optimizer.step()
                self.lr.step()
                self.optimizer.zero_grad()
        return self

    def values(self) -> dict[str, Any]:
        """Everything that must be equal."""
        averages = {"ema": self.ema, **self.several}
        found: dict[str, Any] = {f"live.{n}": t for n, t in self._raw().items()}
        for name, average in averages.items():
            found |= {f"{name}.{n}": t for n, t in average.averaged_tensors().items()}
            found |= {f"{name}.count": average.count, f"{name}.time": average.time}
        return found

    def _raw(self) -> dict[str, torch.Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of what is not equal, bit for bit."""
    assert a.keys() == b.keys()
    return [
        name for name in a if not torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name]))
    ]


def main(folder: Path) -> None:
    """Save and resume on as many processes as there are; then load what one process has saved."""
    saving = Run().train(last=8)
    saving.accelerator.save_state(folder / "both")
    saved = saving.ema.averaged_tensors()
    whole = saving.train(first=8).values()
    resumed = Run()
    resumed.accelerator.load_state(folder / "both")
    loaded = differences(saved, resumed.ema.averaged_tensors())
    found = {"loaded": loaded, "resumed": differences(whole, resumed.train(first=8).values())}
    alone = Run()
    alone.accelerator.load_state(folder / "alone")
    found["counts from one process"] = {n: a.count for n, a in alone.several.items()}
    found["ema from one process"] = alone.ema.averaged_tensors()
    rank = saving.accelerator.process_index
    torch.save({"whole": whole, **found}, folder / f"found-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
