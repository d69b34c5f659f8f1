"""A model's metrics as a function of its weights: a `Surface`, measured point by point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyak.batchnorm import norm_layers, update_bn
from polyak.errors import ArgumentError, NonFiniteError, UsageError, check_match
from polyak.tensors.modes import restored_modes

Measure = Callable[[nn.Module], Mapping[str, float]]


class Surface:
    """A model measured at any weights, with the BatchNorm statistics of each point.

    A point is a vector of all P parameters of the model, in the order of `named_parameters()`,
    float64 on the model's device: `vector(weights)` makes one from named tensors. Buffers are not
    interpolated: the running statistics of BatchNorm are measured again at every point (those of
    the end points would be wrong in between), other buffers stay as they are in the model.

    Use it as a context manager: afterwards parameters, buffers and training modes are restored,
    also after an error.

    Args:
        model: measured in place; one copy of its tensors is kept to restore them.
        measure: `measure(model) -> {name: value}`, called in evaluation mode without gradients.
        refresh: batches for `polyak.update_bn` at every point; required, and used, only if the
            model has layers with running statistics. It is iterated at each point, so pass a list
            or a loader, not a generator.

    Raises:
        ArgumentError: the model has such layers and `refresh` is None.

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
        self._saved: list[tuple[Tensor, Tensor]] | None = None  # while the context is entered

    @property
    def size(self) -> int:
        """P, the number of values in all parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def __enter__(self) -> Surface:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
        return self

    def __exit__(self, *exception: object) -> None:
        with torch.no_grad():
            for tensor, before in self._saved or ():
                tensor.copy_(before)
        self._saved = None

    def vector(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The point (P,) of named tensors; names that are not parameters (buffers) are ignored.

        Raises MismatchError, naming every parameter that is missing or of another shape.
        """
        parameters = dict(self.model.named_parameters())
        check_match(
            {name: tuple(weight.shape) for name, weight in weights.items()},
            {name: tuple(parameter.shape) for name, parameter in parameters.items()},
            "These weights are not a point of this model.",
            allow_unexpected=True,
        )
        parts = [
            weights[name].detach().to(parameter.device, torch.float64).reshape(-1)
            for name, parameter in parameters.items()
        ]
        return torch.cat(parts)

    def at(self, point: Tensor) -> dict[str, float]:
        """Measure the model at `point` (P,).

        Raises UsageError outside the context, which restores the model, and NonFiniteError if a
        value is NaN: a surface with missing points cannot be drawn.
        """
        if self._saved is None:
            raise UsageError(
                "The surface was not entered. Measure inside `with surface:`, which restores the "
                "model afterwards."
            )
        self._write(point)
        if self.refresh is not None:  # before eval(): the modes say which layers train
            update_bn(self.model, self.refresh)
        with restored_modes(self.model), torch.no_grad():
            self.model.eval()
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
