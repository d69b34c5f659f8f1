"""The loss of a model over batches, to be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from polyak.batchnorm.batches import moved
from polyak.errors import ArgumentError, NonFiniteError, PolyakError, UsageError, require
from polyak.study.evaluations import place_of

Loss = Callable[[Module, Any], Tensor]


def check_loss(loss: object, batches: object) -> None:
    """Refuse what is no loss, and data that cannot be read more than once."""
    require(
        callable(loss) and not isinstance(loss, Module | type),
        f"loss is {loss!r}; expected a function of the model and a batch that returns a tensor.",
    )
    if isinstance(batches, Iterator | Tensor | str) or not isinstance(batches, Iterable):
        raise ArgumentError(
            f"batches is a {type(batches).__name__}; expected batches that can be read again: a list or a "
            "DataLoader."
        )


def loss_of(loss: Loss, model: Module, batch: Any, device: torch.device) -> tuple[Tensor, int]:
    """The sum of a batch's losses, and how many examples it has.

    Raises ArgumentError unless the loss is a scalar (the mean of the batch) or one value for each example, and
    NonFiniteError if it is not finite, UsageError where it fails.
    """
    try:
        found: Any = loss(model, moved(batch, device))
    except PolyakError:
        raise
    except Exception as error:
        raise UsageError(
            f"The loss failed: {type(error).__name__}: {error} ({place_of(error)}). Expected loss(model, batch)."
        ) from error
    if not isinstance(found, Tensor) or found.ndim > 1 or not found.numel():
        said = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ArgumentError(
            f"The loss returned {said}; expected a scalar tensor, the mean over the batch, or a 1-D tensor with "
            "one value for each example."
        )
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError("The loss of a batch is not finite. Check the data and the weights.")
    if not found.requires_grad:
        raise UsageError(
            "The loss does not depend on the model's weights: it was detached, or computed under no_grad or "
            "inference_mode. Return it as backward() would take it."
        )
    size = len(found) if found.ndim else _size(batch)
    return (found.sum() if found.ndim else found * size), size


def _size(batch: Any) -> int:
    """The first dimension of the first tensor in it; 1 where there is none."""
    return next((len(one) if one.ndim else 1 for one in _tensors_in(batch)), 1)


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors_in(part)
