"""Lightning's EMAWeightAveraging, in a Trainer: it owns the loop, so each check is a short run."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from peers import NotOffered, Peer


class _Counting(LightningModule):
    """One weight that starts at 0 and is 1 after the first step, for good; or grows by 1 a step."""

    def __init__(self, *, fails: bool = False, grows: bool = False) -> None:
        super().__init__()
        self.grows = grows
        self.weight = nn.Parameter(torch.zeros(1))
        self.fails = fails
        self.seen: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        if self.grows:
            return -self.weight.sum()
        return 0.5 * (self.weight - 1).square().sum()

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.seen.append(self.weight.item())
        if self.fails:
            raise KeyError("a failing evaluation")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def _run(module: _Counting, callback: Any, n_steps: int, *, validates: bool) -> None:
    data = DataLoader(TensorDataset(torch.zeros(n_steps, 1)))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            module, data, DataLoader(TensorDataset(torch.zeros(1, 1))) if validates else None
        )


class Lightning(Peer):
    name = "lightning"

    def trains(self, check: str) -> float:
        late = EMAWeightAveraging(decay=0.9, update_starting_at_step=10_000)
        if check == "validation before the first update":
            module = _Counting()
            _run(module, late, 4, validates=True)
            return module.seen[-1]
        if check == "a run without any update":
            module = _Counting()
            _run(module, late, 4, validates=False)
            return module.weight.item()
        if check == "an evaluation that fails":
            module = _Counting(fails=True, grows=True)
            try:
                _run(module, EMAWeightAveraging(decay=0.9), 4, validates=True)
            except KeyError:
                return module.weight.item() / 4
        raise NotOffered
