"""Curves of low loss between two checkpoints, trained: quadratic Bezier curves (Garipov et al. 2018)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from polyak.batchnorm.update import restored_rng
from polyak.errors import ArgumentError, NonFiniteError, require
from polyak.maths.arguments import at_least_one, number
from polyak.study.filling import Weights, own_weights
from polyak.study.frame import Anchor, Frame, anchors_of, content_of, counted
from polyak.study.losses import Loss, check_loss, loss_of
from polyak.tensors.modes import restored_modes
from polyak.tensors.names import named_tensors, require_module

_NUDGE = 1e-3  # of the distance: the middle of a symmetric barrier is a saddle, where nothing pulls


@dataclass(frozen=True)
class Curve:
    r"""A quadratic Bezier curve from one checkpoint to another.

    $$\varphi(t) = (1 - t)^2 w_1 + 2 t (1 - t) \theta + t^2 w_2, \quad 0 \le t \le 1$$

    names: of the two ends. start, control, end: $w_1$, $\theta$, $w_2$, state dicts. losses: the mean training
    loss on the curve in each epoch. `scan_line(curve, ...)` measures it. Source: Garipov et al. 2018, arXiv
    1802.10026.
    """

    names: tuple[str, str]
    start: Mapping[str, Tensor]
    control: Mapping[str, Tensor]
    end: Mapping[str, Tensor]
    losses: tuple[float, ...]

    def at(self, t: float) -> dict[str, Tensor]:
        """The state dict at `t`: floating tensors combined in float64, others those of the nearest."""
        number("t", t)
        return dict(Frame(self.anchors).tensors(bezier(float(t))))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the control point, for `polyak landscape line START END --curve FILE`.

        Raises what `save` of an average raises for a path that cannot be written.
        """
        from polyak.checkpoints.writing.save import write_checkpoint

        ends = " ".join(content_of(one) for one in (self.start, self.end))
        write_checkpoint(path, self.control, metadata={"curve_between": ends}, overwrite=overwrite)

    @property
    def anchors(self) -> list[Anchor]:
        """Its three points."""
        parts = zip(
            (self.names[0], "the control point", self.names[1]),
            (self.start, self.control, self.end),
            strict=True,
        )
        return [Anchor(name, state, content_of(state)) for name, state in parts]


def bezier(t: float) -> list[float]:
    """The shares of start, control point and end."""
    return [(1 - t) ** 2, 2 * t * (1 - t), t**2]


def connect(  # noqa: PLR0913 - keyword-only arguments do not count
    inputs: Mapping[str, Weights] | Sequence[Weights],
    model: Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    epochs: int = 10,
    rate: float = 0.05,
    optimizer: Callable[[list[Tensor]], Optimizer] | None = None,
    generator: torch.Generator | None = None,
    key: str | None = None,
) -> Curve:
    r"""Train a curve of low loss between two checkpoints: the mode connection of Garipov et al. 2018.

    Minimises $E_{t \sim U(0, 1)} L(\varphi(t))$ over the control point $\theta$ by one $t$ for each batch:
    the model holds $\varphi(t)$ in training mode, and its gradient times $2 t (1 - t)$ is that of $\theta$. The
    control point begins in the middle, nudged at random by a thousandth of the distance. The rate is constant for
    the first half of the epochs, falls to a hundredth until nine tenths, and stays, as in the authors' code.

    Args:
        inputs: Two checkpoints of `model`, paths or state dicts, in a list or by name.
        model: Where points are tried out; it has its own weights again afterwards.
        loss: `loss(model, batch)`, a scalar or one value for each example. Weight decay is that of the points on
            the curve if the loss has it, of the control point if the optimizer has it.
        batches: Training data that can be read again: a list or a DataLoader.
        epochs: How often.
        rate: Of SGD with momentum 0.9.
        optimizer: Another one, as a function of a list of tensors; the rates are its own, and change alike.
        generator: Of the positions and the nudge, on the CPU; by default one with seed 0.
        key: Where the weights are inside the files, as for `open_checkpoint`.

    Raises:
        ArgumentError: Not two checkpoints, the same one twice, an option outside its domain.
        MismatchError: Tensors that do not line up, or are not those of `model`.
        NonFiniteError: The loss became NaN or infinite.
        UsageError: The loss failed.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> ends = [{"weight": torch.tensor([[x, 0.0]])} for x in (-1.0, 1.0)]
    >>> def ring(model, batch):
    ...     return (model.weight.square().sum() - 1).square()
    >>> curve = connect(ends, model, ring, [torch.zeros(1)] * 200, epochs=4)
    >>> half = curve.at(0.5)["weight"].norm()  # around the hill in the middle, where it would be 0
    >>> 0.9 < float(half) < 1.1
    True

    """
    require_module(model, "connect")
    check_loss(loss, batches)
    at_least_one("epochs", epochs)
    require(number("rate", rate) > 0, f"rate is {rate:g}; expected a positive learning rate.")
    ends = anchors_of(inputs, key=key, model=model)
    if len(ends) != 2:
        raise ArgumentError(f"{counted(ends)}; a curve connects two.")
    frame = Frame(ends, model)
    if frame.gram()[1, 1] == 0:
        raise ArgumentError(f"{ends[0].name} and {ends[1].name} are the same weights.")
    draws = generator or torch.Generator().manual_seed(0)
    with own_weights(model), restored_modes(model), restored_rng(model), torch.enable_grad():
        bend = _Bend(frame, model, draws)
        made = optimizer(bend.trained) if optimizer else _sgd(bend.trained, rate)
        require(
            isinstance(made, Optimizer),
            f"optimizer returned a {type(made).__name__}; expected a torch optimizer of the tensors it is given.",
        )
        losses = _train(bend, made, loss, batches, epochs, draws)
        control = bend.control()
    first, last = ends
    return Curve((first.name, last.name), first.tensors, control, last.tensors, tuple(losses))


class _Bend:
    """The control point in training, and the model that holds points of the curve."""

    def __init__(self, frame: Frame, model: Module, generator: torch.Generator) -> None:
        self.model = model
        named = named_tensors(model)
        self._first = frame.anchors[0]
        slots = {name: named.slots[named.ties.get(name, name)] for name in frame.moving}
        self._held = {name: slot.tensor for name, slot in slots.items()}
        self.device = next(iter(self._held.values())).device
        self._trains = [
            name for name, slot in slots.items() if slot.is_parameter and slot.tensor.requires_grad
        ]
        require(bool(self._trains), "The model has no parameters that train, so nothing can bend.")
        self._ends = [{n: self._placed(a.tensors[n], n) for n in self._held} for a in frame.anchors]
        self._control = {n: (self._ends[0][n] + self._ends[1][n]) / 2 for n in self._held}
        size = sum(self._control[name].numel() for name in self._trains)
        nudge = _NUDGE * float(frame.gram()[1, 1]) ** 0.5 / size**0.5
        for name in self._trains:
            held = self._control[name]
            noise = torch.randn(held.shape, generator=generator, dtype=torch.float64)
            self._control[name] = (held + nudge * noise.to(held)).requires_grad_()

    @property
    def trained(self) -> list[Tensor]:
        """What the optimizer changes."""
        return [self._control[name] for name in self._trains]

    @torch.no_grad()
    def move_to(self, t: float) -> None:
        """The model at this point of the curve."""
        first, middle, last = bezier(t)
        for name, tensor in self._held.items():
            start, end = (ends[name] for ends in self._ends)
            tensor.copy_(first * start + middle * self._control[name] + last * end)

    def pull(self, loss: Tensor, t: float) -> None:
        """The gradient of the control point."""
        parameters = [self._held[name] for name in self._trains]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for control, gradient in zip(self.trained, gradients, strict=True):
            control.grad = (2 * t * (1 - t) * gradient).to(control)

    def control(self) -> dict[str, Tensor]:
        """As a state dict; what does not move is the first checkpoint's."""
        found = {name: tensor.clone() for name, tensor in self._first.tensors.items()}
        return found | {
            n: t.detach().to(found[n].device, copy=True) for n, t in self._control.items()
        }

    def _placed(self, tensor: Tensor, name: str) -> Tensor:
        wide = torch.promote_types(self._held[name].dtype, torch.float32)
        return tensor.detach().to(self._held[name].device, wide)


def _train(
    bend: _Bend,
    optimizer: Optimizer,
    loss: Loss,
    batches: Iterable[Any],
    epochs: int,
    generator: torch.Generator,
) -> list[float]:
    """The mean loss of each epoch."""
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: _share(epoch / epochs))
    losses = []
    for epoch in range(epochs):
        total, count = 0.0, 0
        for batch in batches:
            t = float(torch.rand((), generator=generator, dtype=torch.float64))
            bend.move_to(t)
            bend.model.train()
            with _placed_in(epoch, t):
                summed, size = loss_of(loss, bend.model, batch, bend.device)
            bend.pull(summed / size, t)
            optimizer.step()
            total, count = total + float(summed.detach()), count + size
        require(count > 0, "The data has no batches; expected some to train on.")
        losses.append(total / count)
        rates.step()
    return losses


@contextmanager
def _placed_in(epoch: int, t: float) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error} This was epoch {epoch + 1}, at {t:.3g} of the curve: a lower rate may help."
        ) from None


def _share(done: float) -> float:
    """Of the rate, after this fraction of the epochs (Garipov's `learning_rate_schedule`)."""
    return 1.0 if done <= 0.5 else max(0.01, 1 - 0.99 * (done - 0.5) / 0.4)


def _sgd(tensors: list[Tensor], rate: float) -> Optimizer:
    return torch.optim.SGD(tensors, lr=rate, momentum=0.9)


def control_point(curve: Weights, ends: Sequence[Anchor], key: str | None, model: object) -> Anchor:
    """The control point of a curve between these ends.

    Raises ArgumentError for a file of `Curve.save` that belongs to other ends.
    """
    from polyak.checkpoints.reading.opening import open_checkpoint

    if isinstance(curve, str | Path):
        with open_checkpoint(curve, key=key) as opened:
            said = (opened.metadata or {}).get("curve_between")
        if said is not None and set(said.split()) != {one.content for one in ends}:
            raise ArgumentError(
                f"{curve} is of a curve between other checkpoints than {ends[0].name} and {ends[1].name}. Name "
                "the two that it was trained between."
            )
    return anchors_of({"the control point": curve}, key=key, model=model)[0]
