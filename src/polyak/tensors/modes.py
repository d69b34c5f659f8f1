"""The training flags of a model's modules, restored after a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module


@contextmanager
def restored_modes(model: Module) -> Iterator[None]:
    """After the block every module's training flag is as it was, also after an error.

    The flags are written one by one, because an overridden `train()` may do more than set them.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            set_mode(module, training=training)


def set_mode(module: Module, *, training: bool) -> None:
    """Write the flag if it differs: assigning to a module costs as much as running a small layer."""
    if module.training is not training:
        module.training = training
