"""An average as a file, and what the file says about itself."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from polyak.averaging.tracker import Member
from polyak.averaging.values import copied_values, model_value, refuse_nonfinite_average
from polyak.errors import ArgumentError, StaleStatistics, UsageError, require, warn
from polyak.files import as_path
from polyak.maths.arguments import flag
from polyak.maths.text import profile_text
from polyak.tensors.memory import odd_form
from polyak.tensors.names import named_modules, named_tensors
from polyak.tensors.ranks import rank
from polyak.tensors.sharding import boxes, is_first_replica, is_sharded, local, narrowed

_HOST = torch.device("cpu")

STALE = (
    "The BatchNorm statistics of this average are those of the newest weights, not its own. Call "
    "average.update_bn(batches) before {}."
)


def save(
    member: Member,
    path: str | os.PathLike[str],
    *,
    layout: str = "model",
    overwrite: bool = False,
    shards: bool = False,
    carry: str | os.PathLike[str] | None = None,
) -> None:
    """Write the averaged model's tensors, tied ones once, and where they come from."""
    from polyak.checkpoints.writing.save import check_target, write_checkpoint

    target = as_path(path)
    flag("shards", shards)
    _check_layout(path, layout)
    member.tracker.ready_to_read()
    if together := shards or bool(member.tracker.tensors.ranks):
        _check_collective(path, layout, shards=shards, carry=carry)
    else:
        require(carry is None, "carry= needs a folder to carry files to: pass shards=True.")
        check_target(target, overwrite=overwrite)
    if member.is_empty():
        raise UsageError("There is nothing to save: nothing has been averaged yet.")
    refuse_odd_forms(member, path)
    refuse_nonfinite_average(member, f"Not saved to {path}")
    metadata = provenance(member)
    if metadata["batchnorm"] == "stale":
        warn(f"{STALE.format('saving')} The file says that they are stale.", StaleStatistics)
    if together:
        return _save_together(
            member, path, metadata, overwrite=overwrite, shards=shards, carry=carry
        )
    tensors, ties = averaged_state_dict(member)
    extra = extra_state(member.tracker.tensors.model)
    if layout == "averaged_model":
        tensors, ties = _as_averaged_model(tensors, ties, int(metadata["count"]))
        extra = {f"module.{name}": value for name, value in extra.items()}
    tensors |= {name: value for name, value in extra.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in extra.items() if name not in tensors}
    write_checkpoint(path, tensors, ties=ties, metadata=metadata, extra=others, overwrite=overwrite)
    return None


def _save_together(
    member: Member, path: str | os.PathLike[str], metadata: dict[str, str], **options: Any
) -> None:
    """Every rank writes what it holds at its place in the file: nothing is gathered."""
    from polyak.checkpoints.writing.collective import write_collectively
    from polyak.checkpoints.writing.extra_state import warn_of_lost
    from polyak.checkpoints.writing.hf_folder import files_beside_weights

    carry = options.pop("carry")
    entries = _entries(member)
    extra = extra_state(member.tracker.tensors.model)
    entries |= {n: boxed(v, v) for n, v in extra.items() if isinstance(v, Tensor)}
    if lost := {name: value for name, value in extra.items() if name not in entries}:
        warn_of_lost(as_path(path), lost, is_torch=False)
    ties = named_tensors(member.tracker.tensors.model).ties
    write_collectively(
        path,
        entries,
        ties={alias: name for alias, name in ties.items() if name in entries},
        metadata=metadata,
        sidecars=None if carry is None else files_beside_weights(as_path(carry)),
        **options,
    )


@torch.no_grad()
def _entries(member: Member) -> dict[str, Any]:
    """By name: dtype, global shape, and what this rank holds of the averaged model, and where."""
    tensors = member.tracker.tensors
    tensors.settle()
    index = {name: i for i, name in enumerate(tensors.names)}
    statistics = dict(zip(tensors.statistic_names, member.statistics, strict=True))
    found = {}
    for name, slot in named_tensors(tensors.model).slots.items():
        if slot.persistent:
            own = statistics.get(name, local(slot.tensor))
            found[name] = boxed(own, slot.tensor)
            if name in index:
                part = partial(model_value, member, index[name], exchanged=True)
                found[name] = boxed(own, slot.tensor, part)
    return found


def boxed(
    value: Tensor, like: Tensor, compute: Callable[..., Tensor] | None = None
) -> tuple[torch.dtype, tuple[int, ...], list[Any]]:
    """The values on this rank of a tensor that is sharded as `like` is, as `write_collectively` takes it.

    With `compute` they are not those of `value`, but computed when they are written, part by part.
    """
    from polyak.checkpoints.writing.deferred import Deferred

    first = is_first_replica(like) and (is_sharded(like) or rank() == 0)
    places = [
        (
            tuple(start for start, _ in spans),
            narrowed(value.detach(), here)
            if compute is None
            else Deferred(value.dtype, here, lambda part: compute(part=part)),
        )
        for spans, here in (boxes(like) if first else ())
    ]
    return value.dtype, tuple(like.shape), places


def _check_collective(path: Any, layout: str, *, shards: bool, carry: Any) -> None:
    if layout != "model" or not (shards or str(path).lower().endswith(".safetensors")):
        raise ArgumentError(
            f"{path}: sharded averages are written as safetensors with the names of the model: a path "
            "that ends in .safetensors, or a folder with shards=True."
        )
    require(shards or carry is None, "carry= needs a folder to carry files to: pass shards=True.")


def provenance(member: Member) -> dict[str, str]:
    """What the average is made of: strings, and no time of day, so that equal runs give equal files."""
    clock = member.clock.on_host()
    return {
        "profile": profile_text(member.profile),
        "unit": member.unit or "updates",
        "time": repr(clock.time),
        "count": repr(clock.count),
        "sum_squared_shares": repr(clock.sum_squared_shares),
        "batchnorm": batchnorm_status(member),
    }


def batchnorm_status(member: Member) -> str:
    """'none' without running statistics, 'refreshed' if they are the average's own, or 'stale'."""
    if not member.tracker.tensors.statistics:
        return "none"
    return "stale" if member.stale_layers() else "refreshed"


def averaged_state_dict(member: Member) -> tuple[OrderedDict[str, Tensor], dict[str, str]]:
    """The averaged model's state dict, as `Module.state_dict` orders and versions it; and its ties."""
    model = member.tracker.tensors.model
    ties = named_tensors(model).ties
    values = copied_values(member, _HOST)
    tensors = OrderedDict((name, tensor) for name, tensor in values.items() if name not in ties)
    tensors._metadata = _versions(model)  # type: ignore[attr-defined]
    return tensors, {alias: name for alias, name in ties.items() if name in tensors}


def extra_state(model: Module) -> dict[str, Any]:
    """What `get_extra_state` of the modules that have it returns now, as `Module.state_dict` names it."""
    return {
        f"{prefix}_extra_state": module.get_extra_state()
        for prefix, module in named_modules(model)
        if type(module).get_extra_state is not Module.get_extra_state
    }


def _versions(model: Module) -> OrderedDict[str, dict[str, Any]]:
    """What `Module.state_dict` says of each module's layout, which loading it again asks for."""
    return OrderedDict(
        (prefix.removesuffix("."), {"version": module._version})
        for prefix, module in named_modules(model)
    )


def _as_averaged_model(
    tensors: OrderedDict[str, Tensor], ties: dict[str, str], count: int
) -> tuple[OrderedDict[str, Tensor], dict[str, str]]:
    wrapped = OrderedDict({"n_averaged": torch.tensor(count)})
    wrapped |= {f"module.{name}": tensor for name, tensor in tensors.items()}
    return wrapped, {f"module.{alias}": f"module.{name}" for alias, name in ties.items()}


def refuse_odd_forms(member: Member, path: str | os.PathLike[str]) -> None:
    """Raise ArgumentError for tensors of the model that are not dense: files cannot hold them."""
    slots = named_tensors(member.tracker.tensors.model).slots
    forms = {n: odd_form(s.tensor) for n, s in slots.items() if s.persistent}
    if listed := ", ".join(f"{name} ({form})" for name, form in forms.items() if form):
        raise ArgumentError(
            f"Not saved to {path}: weights files hold dense tensors only, not {listed}. Make it a "
            "buffer with persistent=False if the model can rebuild it, or write "
            "average.averaged_tensors() with torch.save."
        )


def _check_layout(path: str | os.PathLike[str], layout: str) -> None:
    require(
        str(layout) in ("model", "averaged_model"),
        f"layout is {layout!r}; expected 'model' or 'averaged_model'.",
    )
    if layout == "averaged_model" and str(path).lower().endswith(".safetensors"):
        raise ArgumentError(f"{path}: torch loads the states of AveragedModel from .pt files.")
