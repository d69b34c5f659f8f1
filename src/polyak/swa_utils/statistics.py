"""`update_bn` with torch's arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn import Module

from polyak.batchnorm import update_bn as pooled_update_bn
from polyak.batchnorm.feeding import moved


def update_bn(
    loader: Iterable[Any], model: Module, device: int | torch.device | str | None = None
) -> None:
    """Set the running statistics of the model's normalisation layers to those of the data.

    Takes what torch's takes: each batch is what the model takes, or a list or tuple of which it
    takes the first entry. The statistics are `polyak.update_bn`'s: exact over any split into
    batches, with frozen layers and everything else left as they were.

    Args:
        loader: the batches.
        model: the model, or an `AveragedModel`.
        device: where the batches go; the model's device by default.

    """
    batches = loader if device is None else _on(loader, torch.device(device))
    pooled_update_bn(model, batches, forward=_forward)


def _forward(model: Module, batch: Any) -> object:
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _on(loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    return (moved(batch, device) for batch in loader)
