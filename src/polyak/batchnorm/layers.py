"""Which layers of a model keep running statistics, and which of those train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer

from polyak.errors import ArgumentError, MismatchError, UsageError
from polyak.tensors.names import named_modules


def norm_layers(model: Module) -> dict[str, Module]:
    """Every layer of `model` that keeps running statistics, by its fully qualified name.

    These are BatchNorm, SyncBatchNorm and InstanceNorm layers (and classes derived from them) with
    ``track_running_stats=True``. A layer that is used in several places appears once, under its
    first name. Names are without what wrappers add (``_orig_mod.``, ``module.`` of data parallelism).

    Raises:
        UsageError: a lazy layer has not seen any data yet, so its size is unknown.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> list(norm_layers(model))
        ['1']

    """
    layers: dict[str, Module] = {}
    seen: set[Module] = set()
    for prefix, module in named_modules(model):
        name = prefix.removesuffix(".")
        if module not in seen and _tracks(module, name):
            seen.add(module)
            layers[name] = module
    return layers


def trained_layers(model: Module) -> dict[str, Module]:
    """The layers of `norm_layers` that are not frozen.

    While the model itself trains, the layers in evaluation mode are frozen and no others: statistics
    move with the mode, whether or not the affine parameters take gradients (LoRA freezes those and
    leaves the mode). With the model in evaluation mode, a layer is frozen if it has affine parameters
    and none of them takes a gradient while others in the model do (a model without any gradients
    says nothing about its layers).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
        >>> _ = model[0].eval()  # frozen, as in fine-tuning
        >>> list(trained_layers(model))
        ['1']

    """
    layers = norm_layers(model)
    if model.training:
        return {name: layer for name, layer in layers.items() if layer.training}
    takes_gradients = any(p.requires_grad for p in model.parameters())
    return {
        name: layer
        for name, layer in layers.items()
        if not (takes_gradients and _affine_is_frozen(layer))
    }


def unsupported_norm_layers(model: Module) -> list[str]:
    """Names of layers that train and keep running statistics that `update_bn` cannot measure.

    They are neither torch BatchNorm nor InstanceNorm layers, or are scripted. A layer without
    parameters that train is left out: its buffers are constants, not statistics.
    """
    return [
        prefix.removesuffix(".")
        for prefix, module in named_modules(model)
        if not isinstance(module, _NormBase)
        and {"running_mean", "running_var"} <= set(module._buffers.keys())
        and any(p.requires_grad for p in module.parameters(recurse=False))
        and not (model.training and not module.training)
    ]


def chosen_layers(model: Module, layers: Iterable[str | Module] | None) -> dict[str, _NormBase]:
    """The layers to update: those that train, or the ones asked for by name or as modules."""
    chosen = trained_layers(model) if layers is None else _asked_for(norm_layers(model), layers)
    return {name: layer for name, layer in chosen.items() if isinstance(layer, _NormBase)}


def _asked_for(known: dict[str, Module], layers: Iterable[str | Module]) -> dict[str, Module]:
    if isinstance(layers, (str, Module)):
        raise ArgumentError(
            f"layers is a single {layers!r}; expected several names or modules. Put it in a list."
        )
    try:
        asked: list[Any] = list(layers)
    except TypeError:
        asked = [None]
    if not all(isinstance(item, str | Module) for item in asked):
        raise ArgumentError(f"layers is {layers!r}; expected a list of names or modules.")
    name_of = {layer: name for name, layer in known.items()}
    wanted = [name_of.get(item, repr(item)) if isinstance(item, Module) else item for item in asked]
    if unknown := set(wanted) - known.keys():
        raise MismatchError.of(
            "layers= names layers that keep no running statistics in this model.",
            unexpected=unknown,
            advice=f"These do: {', '.join(known) or 'none'}.",
        )
    return {name: layer for name, layer in known.items() if name in wanted}


def _tracks(layer: Module, name: str) -> TypeGuard[_NormBase]:
    if not isinstance(layer, _NormBase) or not layer.track_running_stats:
        return False
    if isinstance(layer.running_mean, UninitializedBuffer):
        raise UsageError(
            f"The lazy normalisation layer {name!r} has not seen data yet. Run the model on one "
            "batch first."
        )
    return layer.running_mean is not None and layer.running_var is not None


def _affine_is_frozen(layer: Module) -> bool:
    affine = list(layer.parameters(recurse=False))
    return bool(affine) and not any(p.requires_grad for p in affine)
