"""`update_bn`: sets the running statistics of a model to those of the data under its weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from polyak.batchnorm.batches import Forward, checked, one_pass, run
from polyak.batchnorm.collector import Buffers, StatisticsCollector, merge_ranks
from polyak.batchnorm.in_step import in_step, sees_data_of_its_own
from polyak.batchnorm.layers import chosen_layers, norm_layers, unsupported_norm_layers
from polyak.batchnorm.moments import Moments
from polyak.batchnorm.record import note_measured
from polyak.errors import ArgumentError, NonFiniteError, StaleStatistics, UsageError, require, warn
from polyak.tensors.finite import nonfinite
from polyak.tensors.modes import restored_modes, set_mode
from polyak.tensors.names import named_tensors
from polyak.tensors.policy import RUNNING_STATISTICS

Estimator = Literal["pooled", "torch"]

_NO_BATCHES = (
    "There were no batches, so the statistics were not updated. Check that the iterator was not "
    "used up before."
)

_UNSUPPORTED = (
    "{} are not torch BatchNorm or InstanceNorm layers (or are scripted); their statistics were "
    "not updated. Update them yourself inside average.applied(), in evaluation mode."
)

_MISSED = (
    "{} was never called in {} batches; the statistics there were not updated. Pass data that reaches "
    "every branch, or name the layers to update in layers=."
)


def update_bn(  # noqa: PLR0913 - one job, each argument a fact about the data or the model
    model: Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    limit: int | None = None,
    passes: int = 1,
    progress: bool = False,
    layers: Iterable[str | Module] | None = None,
    estimator: Estimator = "pooled",
) -> None:
    r"""Set the running statistics of normalisation layers to those of the data.

    With n_b values per channel in batch b, their mean m_b and biased variance s_b^2, a layer gets

    .. math:: \mu = \sum_b n_b m_b / N, \qquad
              \sigma^2 = \sum_b n_b (s_b^2 + (m_b - \mu)^2) / (N - 1), \qquad N = \sum_b n_b,

    the moments of all its values, however they are split into batches, merged in float64. During
    the pass layers normalise by the statistics of the batch, as in training, so a deep layer sees
    inputs that depend slightly on the split; each further pass runs with the statistics found so
    far and makes one more layer exact. InstanceNorm keeps its own definition: the means over all
    instances of their means and unbiased variances.

    Only layers that train are updated (see `trained_layers`), dropout is off, and everything else
    is restored: modes, momenta, torch's random state; after an error the statistics as well. A
    layer that the data never reaches keeps its statistics, and a warning names it; for a model without
    such layers nothing is run. Under a process group every rank must call this, and all end with the statistics of the
    data of all ranks together.

    The arguments of `torch.optim.swa_utils.update_bn` are in the opposite order.

    Args:
        model: the model; its buffers are changed in place, in their own dtype.
        batches: an iterable of batches. A tensor is passed to the model as it is, a tuple or list
            by its first entry, a mapping as keyword arguments; tensors are moved to the model's
            device.
        forward: ``forward(model, batch)`` runs the model on any other kind of batch.
        limit: use at most this many batches in each pass; all of them by default.
        passes: the number of passes over the batches.
        progress: write a line of progress to stderr now and then.
        layers: the layers to update, by name or as modules, instead of those that train.
        estimator: "torch" gives what `torch.optim.swa_utils.update_bn` gives, for comparison:
            each batch counts the same whatever its size, the variance between batches is dropped,
            dropout is on, and frozen layers are changed.

    Raises:
        ArgumentError: no batches at all; one value per channel in all of the data; an argument
            outside its domain.
        MismatchError: `layers` names layers that keep no running statistics.
        NonFiniteError: a layer's input held a NaN or an infinity.
        UsageError: the model does not take the batches, or its layers were never called.

    Source: Wu and Johnson 2021 (arXiv 2105.07576), section 3; Chan, Golub and LeVeque 1979.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> update_bn(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
        >>> model[0].running_mean, model[0].running_var
        (tensor([3.]), tensor([7.]))

    """
    batches = checked(batches, forward=forward, limit=limit, passes=passes)
    require(
        isinstance(model, Module), f"model is a {type(model).__name__}; expected a torch.nn.Module."
    )
    if estimator not in ("pooled", "torch"):
        raise ArgumentError(f"estimator is {estimator!r}; expected 'pooled' or 'torch'.")
    if estimator == "torch" and (passes > 1 or layers is not None):
        raise ArgumentError(
            "estimator='torch' makes one pass over all BatchNorm layers, as torch does; "
            "leave out passes= and layers=."
        )
    _refuse_without_values(model)
    if layers is None:
        warn_unsupported(model)
    batches = in_step(model, batches, limit)
    titles = [f"update_bn, pass {n} of {passes}" for n in range(1, passes + 1)]
    feeds = [one_pass(batches, limit=limit, title=title if progress else None) for title in titles]
    if estimator == "torch":
        _as_torch_does(model, feeds[0], forward)
    elif chosen := chosen_layers(model, layers):
        _pool(model, chosen, feeds, forward)


def _refuse_without_values(model: Module) -> None:
    slots = named_tensors(model).slots.values()
    parameters = [slot for slot in slots if slot.is_parameter]
    if parameters and all(slot.tensor.is_meta for slot in parameters):
        raise UsageError(
            f"The parameters of {type(model).__name__} are on the meta device: there are no weights to "
            "run it with. Give the model its weights first."
        )


def warn_unsupported(model: Module) -> None:
    """Name the layers whose statistics `update_bn` cannot measure."""
    if unsupported := unsupported_norm_layers(model):
        warn(_UNSUPPORTED.format(", ".join(unsupported)), StaleStatistics)


def _pool(
    model: Module,
    chosen: Mapping[str, _NormBase],
    feeds: Iterable[Iterator[Any]],
    forward: Forward | None,
) -> None:
    """One pass in training mode, the others with the statistics of the pass before."""
    found: dict[_NormBase, Buffers] = {}
    counts = sees_data_of_its_own(model)
    with _restored(model, chosen.values()):
        for number, batches in enumerate(feeds):
            collectors = _collectors(model, chosen, training=number == 0)
            with replaced_forwards(collectors):
                n_batches = run(model, batches, forward)
            found = _statistics(collectors, n_batches, counts=counts)
            for layer, statistics in found.items():
                layer._buffers.update(statistics)
    _store(found)


def _as_torch_does(model: Module, batches: Iterable[Any], forward: Forward | None) -> None:
    """Torch's estimate, bit for bit: momentum None, the whole model in training mode."""
    chosen: list[_NormBase] = [
        layer for layer in norm_layers(model).values() if isinstance(layer, _BatchNorm)
    ]
    if not chosen:
        return
    with _restored(model, chosen):
        model.train()
        for layer in chosen:
            layer.reset_running_stats()
            layer.momentum = None
        if run(model, batches, forward) == 0:
            raise ArgumentError(_NO_BATCHES)
        found = {
            layer: {name: layer._buffers[name] for name in RUNNING_STATISTICS} for layer in chosen
        }
    _store(found)


def _collectors(
    model: Module, chosen: Mapping[str, _NormBase], *, training: bool
) -> dict[str, StatisticsCollector]:
    """One collector per layer, and the modes of the pass: only these layers may train."""
    targets = set(chosen.values())
    for module in model.modules():
        set_mode(module, training=training and module in targets)
    for layer in chosen.values():
        layer.momentum = 1.0  # the statistics of the batch, nothing else, are left behind
    return {name: StatisticsCollector(layer, training=training) for name, layer in chosen.items()}


def _statistics(
    collectors: Mapping[str, StatisticsCollector], n_batches: int, *, counts: bool
) -> dict[_NormBase, Buffers]:
    """What each layer that was reached should store, checked; `counts`: whether this rank's data do."""
    for collector in collectors.values():
        collector.flush()
    n_batches = merge_ranks(list(collectors.values()), n_batches, counts=counts)
    reached = {name: collector for name, collector in collectors.items() if collector.calls}
    if n_batches == 0:
        raise ArgumentError(_NO_BATCHES)
    if not reached:
        raise UsageError(
            f"After {n_batches} batches none of the layers {', '.join(collectors)} was called. "
            "Check that forward= reaches them."
        )
    if missed := collectors.keys() - reached.keys():
        warn(_MISSED.format(", ".join(sorted(missed)), n_batches), StaleStatistics)
    _check({name: collector.moments for name, collector in _in_order(reached)}, n_batches)
    return {collector.layer: collector.statistics() for collector in reached.values()}


def _in_order(
    reached: Mapping[str, StatisticsCollector],
) -> list[tuple[str, StatisticsCollector]]:
    return sorted(reached.items(), key=lambda item: item[1].first_call)


def _check(found: Mapping[str, Moments], n_batches: int) -> None:
    """Refuse the first layer whose statistics are none, waiting once for all that a device holds."""
    bad = nonfinite((name, t) for name, own in found.items() for t in (own.mean, own.spread))
    for name, moments in found.items():
        if not moments.is_enough():
            raise ArgumentError(
                f"Layer {name!r} saw one value per channel in all of the data ({n_batches} batches), "
                "which has no variance. Pass more data."
            )
        if name in bad:
            raise NonFiniteError(
                f"Layer {name!r} saw a NaN, an infinity or an overflow in its input within "
                f"{n_batches} batches; no statistics were changed. Check the data and the weights "
                "before this layer."
            )


def _store(found: Mapping[_NormBase, Buffers]) -> None:
    """Copy into the layers' own buffers, which others may refer to."""
    with torch.no_grad():
        for layer, statistics in found.items():
            for name, value in statistics.items():
                buffer = layer._buffers[name]
                if buffer is not None and value is not None:
                    buffer.copy_(value)
    note_measured(found)


@contextmanager
def _restored(model: Module, layers: Iterable[_NormBase]) -> Iterator[None]:
    with restored_rng(model), restored_modes(model), restored_buffers(layers), uncompiled():
        yield


@contextmanager
def restored_buffers(layers: Iterable[_NormBase]) -> Iterator[None]:
    """Scratch buffers during the pass; the layers' own are written only after all has succeeded."""
    own = [
        (layer, layer.momentum, {k: layer._buffers[k] for k in RUNNING_STATISTICS})
        for layer in layers
    ]
    try:
        for layer, _, buffers in own:
            layer._buffers.update({k: _clone(b) for k, b in buffers.items()})
        yield
    finally:
        for layer, momentum, buffers in own:
            layer.momentum = momentum
            layer._buffers.update(buffers)


@contextmanager
def replaced_forwards(collectors: Mapping[str, StatisticsCollector]) -> Iterator[None]:
    """Each collector replaces its layer's `forward`.

    Not a hook: this also sees calls of `layer.forward(x)`, and the input as other hooks left it.
    """
    own = {collector: collector.layer.__dict__.get("forward") for collector in collectors.values()}
    try:
        for collector in own:
            collector.layer.__dict__["forward"] = collector
        yield
    finally:
        for collector, forward in own.items():
            if forward is None:
                collector.layer.__dict__.pop("forward", None)
            else:
                collector.layer.__dict__["forward"] = forward


@contextmanager
def restored_rng(model: Module) -> Iterator[None]:
    """Whatever draws random numbers in the pass, torch's generators are restored."""
    on_gpu = model.parameters() if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    devices = {p.device for p in on_gpu if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield


def uncompiled() -> AbstractContextManager[None]:
    """Compiled models run uncompiled: what was traced before does not call the collectors."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it costs a second
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _clone(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.clone()
