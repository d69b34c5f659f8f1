"""The training flags of a model's modules, lent and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module


@contextmanager
def lent_modes(model: Module) -> Iterator[None]:
    """Every module's training flag comes back as it was.

    The flags are written one by one: `train()` is sometimes overridden, with effects of its own.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            set_mode(module, training=training)


def set_mode(module: Module, *, training: bool) -> None:
    """Write the flag where it differs: assigning to a module costs as much as a small layer."""
    if module.training is not training:
        module.training = training
