"""What a model is worth as a function of its weights: a `Surface`, asked point by point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from polyak.batchnorm import norm_layers, update_bn
from polyak.errors import ArgumentError, MismatchError, NonFiniteError, UsageError

Measure = Callable[[nn.Module], Mapping[str, float]]


class Surface:
    """A model measured at any weights, with the BatchNorm statistics of each point.

    A point is a vector of all P parameters of the model, in the order of `named_parameters()`,
    float64 on the model's device: `vector(weights)` makes one from named tensors. Buffers do not
    move along a line: the running statistics of BatchNorm are measured anew at every point (those
    of the end points would be wrong in between), other buffers stay as they are in the model.

    It is a context: inside, the model is borrowed and in evaluation mode; afterwards parameters,
    buffers and training modes are as they were, also after an error.

    Args:
        model: Measured in place; nothing is copied but one set of its tensors.
        measure: `measure(model) -> {name: value}`, called without gradients.
        refresh: Batches for `polyak.batchnorm.update_bn` at every point; needed, and used, only
            where the model has layers with running statistics. Iterated anew at each point, so a
            list or a loader, no generator.

    Raises:
        ArgumentError: The model has such layers and `refresh` is None.

    >>> from torch import nn
    >>> line = nn.Linear(2, 1)
    >>> with Surface(line, lambda model: {"size": float(model.weight.square().sum())}) as surface:
    ...     surface.at(torch.tensor([3.0, 4.0, 0.0]))
    {'size': 25.0}

    """

    def __init__(
        self, model: nn.Module, measure: Measure, *, refresh: Iterable[Any] | None = None
    ) -> None:
        if refresh is None and (layers := norm_layers(model)):
            raise ArgumentError(
                f"The model has {len(layers)} layers with running statistics (the first: "
                f"{next(iter(layers))}), which belong to one point only. Pass refresh=batches of "
                "training data, so that they are measured at every point."
            )
        self.model = model
        self.measure = measure
        self.refresh = refresh if norm_layers(model) else None
        self._borrowed: list[tuple[Tensor, Tensor]] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    def size(self) -> int:
        """P, the number of values in all parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def __enter__(self) -> Surface:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self._borrowed = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with torch.no_grad():
            for tensor, before in self._borrowed:
                tensor.copy_(before)
        self._restore_modes()
        self._borrowed, self._modes = [], []

    def vector(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The point (P,) of named tensors; those that are no parameters (buffers) are left out.

        Raises MismatchError naming every parameter that is missing or of another shape.
        """
        parameters = dict(self.model.named_parameters())
        missing = [name for name in parameters if name not in weights]
        changed = {
            name: f"shape {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}"
            for name, parameter in parameters.items()
            if name in weights and weights[name].shape != parameter.shape
        }
        if missing or changed:
            raise MismatchError.of(
                "These weights are not a point of this model.", missing=missing, changed=changed
            )
        parts = [
            weights[name].detach().to(parameter.device, torch.float64).reshape(-1)
            for name, parameter in parameters.items()
        ]
        return torch.cat(parts)

    def at(self, point: Tensor) -> dict[str, float]:
        """Measure the model at `point` (P,).

        Raises UsageError outside the context, which gives the model back, and NonFiniteError where
        a value is NaN: a picture with holes helps nobody.
        """
        if not self._modes:
            raise UsageError(
                "A surface is measured inside `with surface:`, which borrows the model."
            )
        self._write(point)
        if self.refresh is not None:
            self._restore_modes()  # layers that do not train are told by their modes
            update_bn(self.model, self.refresh)
            self.model.eval()
        with torch.no_grad():
            values = {name: float(value) for name, value in self.measure(self.model).items()}
        if bad := [name for name, value in values.items() if math.isnan(value)]:
            raise NonFiniteError(
                f"{', '.join(bad)} is NaN at a point {float(point.norm()):.3g} from the origin. "
                "Check the data and the weights, or stay closer to them."
            )
        return values

    def _write(self, point: Tensor) -> None:
        start = 0
        with torch.no_grad():
            for parameter in self.model.parameters():
                end = start + parameter.numel()
                parameter.copy_(point[start:end].view(parameter.shape))
                start = end

    def _restore_modes(self) -> None:
        for module, training in self._modes:
            module.training = training
