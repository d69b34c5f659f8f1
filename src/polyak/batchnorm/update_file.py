"""Statistics of averaged weights that lie in a file: `polyak update-bn`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from polyak.batchnorm.layers import norm_layers
from polyak.batchnorm.update import update_bn
from polyak.checkpoints.merging.average import iter_averaged_tensors
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.writing.save import check_target, write_checkpoint
from polyak.errors import ArgumentError, MismatchError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def update_bn_file(
    path: str | os.PathLike[str],
    model: Module,
    batches: Iterable[Any],
    *,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    limit: int | None = None,
) -> tuple[str, ...]:
    """Set the normalisation statistics in a file of weights to those of the data under them.

    path: a safetensors file or a torch archive of `model`'s weights. batches: as `update_bn` takes
    them; `limit` of them. output: where to write; the file itself unless given. The weights go into
    `model`, which runs where it is. The metadata stays, with `batchnorm` set to `refreshed`.

    Returns the names of the layers. Raises ArgumentError where the model is none or has no such layers,
    MismatchError where the file does not fit the model, and what `update_bn` raises.
    """
    if not isinstance(model, Module):
        raise ArgumentError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    source, target = Path(path), Path(output if output is not None else path)
    _refuse(source, target, overwrite=overwrite)
    layers = norm_layers(model)
    if not layers:
        raise ArgumentError("The model has no layers with running statistics: nothing to update.")
    with open_checkpoint(source) as opened:
        ties, metadata = dict(opened.ties), dict(opened.metadata)
    state = dict(iter_averaged_tensors([source], "swa"))
    _load(model, state, ties, source)
    update_bn(model, batches, limit=limit, layers=layers.values())
    found = model.state_dict()
    for layer in layers:
        for last in _STATISTICS:
            name = f"{layer}.{last}" if layer else last
            if name in state:
                state[name] = found[name].detach().cpu().to(state[name].dtype)
    metadata["batchnorm"] = "refreshed"
    write_checkpoint(target, state, ties=ties, metadata=metadata, overwrite=True)
    return tuple(layers)


def _refuse(source: Path, target: Path, *, overwrite: bool) -> None:
    for path in (source, target):
        if path.is_dir():
            raise ArgumentError(f"{path} is a folder; name the file of weights in it.")
    in_place = target.resolve() == source.resolve()
    check_target(target, overwrite=overwrite or in_place)


def _load(
    model: Module, state: Mapping[str, Tensor], ties: Mapping[str, str], source: Path
) -> None:
    whole = {**state, **{alias: state[name] for alias, name in ties.items()}}
    expected = model.state_dict()
    changed = {
        name: f"{list(whole[name].shape)}; the model expects {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in whole and whole[name].shape != tensor.shape
    }
    missing, unexpected = expected.keys() - whole.keys(), whole.keys() - expected.keys()
    if missing or unexpected or changed:
        raise MismatchError.of(
            f"{source} does not hold the weights of this model.",
            missing=missing,
            unexpected=unexpected,
            changed=changed,
            advice="Check that --model builds the model that the file was trained as.",
        )
    model.load_state_dict(whole)
