"""The normalisation statistics of averaged weights in a file: `polyak update-bn`."""

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
from polyak.checkpoints.reading.extra_state import tensors_in
from polyak.checkpoints.reading.lightning import lightning_entries
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.checkpoints.writing.extra_state import built, writable
from polyak.checkpoints.writing.layouts import Around
from polyak.checkpoints.writing.save import check_target, write_checkpoint
from polyak.errors import ArgumentError, NonFiniteError, check_match
from polyak.files import as_path, writing_errors
from polyak.tensors.finite import nonfinite
from polyak.tensors.policy import RUNNING_STATISTICS


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

    The weights are loaded into `model`, which runs on the device where it is. The file is replaced as a
    whole; its metadata is kept, with `batchnorm` set to `refreshed`.

    Args:
        path: A safetensors file or a torch archive of `model`'s weights.
        model: The model that the weights belong to.
        batches: Data, as `update_bn` takes it.
        output: Where to write; by default `path`.
        overwrite: Replace another `output` that exists.
        limit: Use at most this many batches.

    Returns the names of the layers. Raises ArgumentError if `model` is not a Module or has no such layers,
    MismatchError if the file does not fit the model, NonFiniteError for a NaN in its weights, OutputError
    if the output exists or cannot be written, and what `update_bn` raises.

    """
    if not isinstance(model, Module):
        raise ArgumentError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    source, target = as_path(path), as_path(path if output is None else output)
    with writing_errors(target):  # even asking about a path can fail
        _refuse(source, target, overwrite=overwrite)
    layers = norm_layers(model)
    if not layers:
        raise ArgumentError(
            "The model has no layers with running statistics, so there is nothing to update."
        )
    with open_checkpoint(source) as opened:
        ties, metadata, extra = dict(opened.ties), dict(opened.metadata), opened.extra
        around = _around(opened, target)
        state = dict(iter_averaged_tensors([opened], "swa", exclude=["*"]))  # as they are
    updated = {
        f"{layer}.{last}" if layer else last for layer in layers for last in RUNNING_STATISTICS
    }
    _refuse_non_finite(state, updated, source)
    _load(model, state, ties, extra, source)
    update_bn(model, batches, limit=limit, layers=layers.values())
    found = model.state_dict()
    for name in updated & state.keys():
        state[name] = found[name].detach().cpu().to(state[name].dtype)
    metadata["batchnorm"] = "refreshed"
    write_checkpoint(
        target,
        state,
        ties=ties,
        metadata=metadata,
        extra=extra,
        around=around,
        overwrite=True,
    )
    return tuple(layers)


def _around(opened: Checkpoint, target: Path) -> Around:
    """What the file holds beside its tensors, Lightning's entries where it stays a `.ckpt`."""
    found = lightning_entries(opened) if target.suffix.lower() == ".ckpt" else None
    return Around(opened.order, opened.versions, found and found[0])


def _refuse(source: Path, target: Path, *, overwrite: bool) -> None:
    for path in (source, target):
        if path.is_dir():
            raise ArgumentError(f"{path} is a folder; name the file of weights in it.")
    in_place = target.resolve() == source.resolve()
    check_target(target, overwrite=overwrite or in_place)


def _refuse_non_finite(state: Mapping[str, Tensor], updated: set[str], source: Path) -> None:
    """NonFiniteError for a NaN or an infinity in what stays; statistics are measured anew."""
    if bad := nonfinite((n, t) for n, t in state.items() if n not in updated):
        raise NonFiniteError(
            f"Not finite in {source}: {', '.join(sorted(bad))}. No statistics mend such weights: make the average "
            "again without the checkpoint that they came from."
        )


def _load(
    model: Module,
    state: Mapping[str, Tensor],
    ties: Mapping[str, str],
    extra: Mapping[str, Any],
    source: Path,
) -> None:
    whole = {**state, **{alias: state[name] for alias, name in ties.items()}}
    others = built(writable(extra), whole.__getitem__)
    tensors = {name: whole[name] for name in whole.keys() - tensors_in(extra)}
    expected = model.state_dict()
    check_match(
        {name: list(tensor.shape) for name, tensor in tensors.items()},
        {n: list(value.shape) for n, value in expected.items() if isinstance(value, Tensor)},
        f"{source} does not hold the weights of this model.",
        "Build the model in the way in which it was trained.",
    )
    model.load_state_dict({**expected, **tensors, **others})
