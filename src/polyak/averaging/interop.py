"""States from elsewhere: the files that `Average.save` writes, and other libraries' averages.

Recognised are torch's `AveragedModel` (`module.*`, `n_averaged`), timm's `ModelEmaV2` and
`ModelEmaV3` (`module.*`, or `state_dict_ema` in timm's checkpoints), ema-pytorch's `EMA`
(`ema_model.*`, `step`), diffusers' `EMAModel` and torch-ema (`shadow_params`, in the order of the
parameters), and any plain state dict of the averaged model. All become the state that the average
would have, which `Average.load_state_dict` takes.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Module

from polyak.averaging.state import VERSION
from polyak.averaging.tracker import Member
from polyak.errors import ArgumentError, FormatError, MismatchError, warn
from polyak.files import as_path
from polyak.maths.arguments import number
from polyak.maths.profile import Profile
from polyak.maths.text import profile_text
from polyak.tensors.blend import accumulator_dtype
from polyak.tensors.finite import refuse_nonfinite
from polyak.tensors.names import named_tensors
from polyak.tensors.sharding import boxes, is_sharded, local, narrowed, part_of, sharded_as

_EXACT, _PIECES = 2**20, 2**16
_ADVICE = "Nothing was imported. Is it the state of another model?"
_SAVED = {"profile", "unit", "time", "count", "sum_squared_shares", "batchnorm"}


@dataclass(frozen=True)
class Foreign:
    """What another library's state holds: tensors by name, and how many updates it has seen."""

    tensors: dict[str, Tensor]
    updates: int | None


def read_state(
    member: Member, path: str | os.PathLike[str], updates: int | None = None
) -> Mapping[str, Any]:
    """The state in a file, for `Average.load_state_dict`; what `Average.load` documents."""
    bound = member.tracker.tensors
    whole = {n: t for n, t in zip(bound.names, bound.whole, strict=True) if is_sharded(t)}
    state, metadata = read_file(as_path(path), whole)
    if isinstance(state, dict) and state.keys() >= {"version", "profile", "tensors"}:
        if updates is not None:
            raise ArgumentError(
                f"{path} holds a state_dict() of polyak, which records how many updates it stands for: "
                "leave out updates=."
            )
        return state
    if updates is None and metadata.keys() >= _SAVED and isinstance(state, Mapping):
        return saved_state(member, path, state, metadata)
    return translated_state(member, state, updates)


def translated_state(
    member: Member, state: Mapping[str, Any], updates: int | None = None
) -> dict[str, Any]:
    """The state that this average would have after `updates` updates to another library's weights."""
    profile, tracker = member.profile, member.tracker
    _refuse_snapshots(member)
    foreign = read_foreign(state, tracker.tensors.model)
    updates = foreign.updates if updates is None else updates
    if updates is None:
        raise ArgumentError(
            "The state does not record how many updates it stands for: pass updates= (for example "
            "the number of optimizer steps so far)."
        )
    count = _checked_count(updates)
    first = 0 if profile.initial_mass(0.0) == 1 else 1
    numbers = {
        "time": float(first + count - 1),
        "count": count,
        "sum_squared_shares": _sum_squared_shares(profile, first, count),
    }
    return _state(member, foreign.tensors, numbers, member.unit, fresh_layers=())


def read_foreign(state: Mapping[str, Any], model: Module) -> Foreign:
    """The averaged tensors in another library's state, by the model's own names."""
    if not isinstance(state, Mapping):
        raise FormatError(f"import_state() reads a state dict; found {type(state).__name__}.")
    if "shadow_params" in state:
        count = state.get("optimization_step", state.get("num_updates"))
        return Foreign(_by_position(state["shadow_params"], model), _whole(count))
    if isinstance(state.get("averaging_state"), Mapping) and "state_dict" in state:  # Lightning
        wrapped = {f"module.{name}": tensor for name, tensor in state["state_dict"].items()}
        return read_foreign({**wrapped, **state["averaging_state"]}, model)
    if "state_dict_ema" in state:
        return read_foreign(state["state_dict_ema"], model)
    names = named_tensors(model).slots.keys()
    if any(key.startswith("ema_model.") for key in state):
        return Foreign(_below(state, "ema_model.", names), _whole(state.get("step")))
    count = _whole(state.get("n_averaged"))
    is_wrapped = count is not None or (
        all(key.startswith("module.") for key in state) and not names & state.keys()
    )
    tensors = _below(state, "module." if is_wrapped else "", names)
    if not tensors:
        raise FormatError(
            "There are no tensors in this state. Expected the state dict of torch's AveragedModel,"
            " timm's ModelEma, ema-pytorch's EMA, diffusers' EMAModel, torch-ema, Lightning's"
            " WeightAveraging, or a plain"
            f" one; found the entries {sorted(map(str, state))[:10]}."
        )
    return Foreign(tensors, count)


def _checked_count(updates: Any) -> int:
    if not 1 <= number("updates", updates) <= 2**53 or updates % 1:
        raise ArgumentError(
            f"updates is {updates!r}; expected a whole number from 1: an empty average has no state."
        )
    return int(updates)


def _sum_squared_shares(profile: Profile, first: int, count: int) -> float:
    """Of `count` updates one unit of time apart: exact for the newest million, in pieces before."""
    last = first + count - 1
    newest = np.arange(max(first, last - _EXACT + 1), last + 1, dtype=np.float64)
    edges = np.linspace(first, newest[0] - 1, _PIECES) if newest[0] > first else newest[:0]
    times = np.concatenate([np.unique(edges.round()), newest])
    each = np.diff(times, prepend=first - 1)  # how many updates a piece stands for
    return float((profile.weights(times.tolist()) ** 2 / each).sum())


def saved_state(
    member: Member,
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    """The state of the average that `save` wrote, with its values as stored."""
    _refuse_snapshots(member)
    if metadata["profile"] != profile_text(member.profile):
        raise MismatchError(
            f"{path} is an average with the profile {metadata['profile']!r}, and this one has "
            f"{profile_text(member.profile)!r}. Nothing was loaded. To begin from its weights all the "
            "same, pass updates=, the number of updates that they stand for."
        )
    try:
        count = int(metadata["count"])
        numbers = {name: float(metadata[name]) for name in ("time", "sum_squared_shares")}
    except ValueError:
        raise FormatError(f"{path}: time and count in its metadata are not numbers.") from None
    unit = None if metadata["unit"] == "updates" else metadata["unit"]
    names = named_tensors(member.tracker.tensors.model).slots.keys()
    prefix = "module." if "n_averaged" in tensors and "n_averaged" not in names else ""
    values = _below(tensors, prefix, names)
    fresh = member.tracker.tensors.norms if metadata["batchnorm"] == "refreshed" else ()
    state = _state(member, values, {**numbers, "count": count}, unit, fresh_layers=fresh)
    _warn_if_rounded(member, path, values)
    return state


def _warn_if_rounded(
    member: Member, path: str | os.PathLike[str], values: Mapping[str, Tensor]
) -> None:
    bound, options = member.tracker.tensors, member.tracker.options
    for name, live in zip(bound.names, bound.live, strict=True):
        wide, dtype = accumulator_dtype(live.dtype, options.dtype), values[name].dtype
        if dtype != wide:
            warn(
                f"{path} holds {str(dtype).removeprefix('torch.')} values, and this average keeps "
                f"{str(wide).removeprefix('torch.')}: averaging continues from the rounded values. To "
                "resume exactly, save and load its state_dict()."
            )
            return


def _state(
    member: Member,
    values: Mapping[str, Tensor],
    numbers: Mapping[str, float],
    unit: str | None,
    *,
    fresh_layers: Iterable[str],
) -> dict[str, Any]:
    bound, options = member.tracker.tensors, member.tracker.options
    read = [(name, local(value)) for name, value in values.items()]
    refuse_nonfinite(read, "The state", "Nothing was imported.", bound.ranks)
    if missing := set(bound.names) - values.keys():
        raise MismatchError.of(
            "This is not a state of the model that is averaged.",
            missing=missing,
            unexpected=values.keys() - bound.kinds.keys(),
            advice=_ADVICE,
        )
    live = dict(zip(bound.statistic_names, bound.statistics, strict=True))
    return {
        "version": VERSION,
        "profile": profile_text(member.profile),
        "unit": unit,
        **numbers,
        "time_if_none_skipped": numbers["time"],
        "tensors": {
            name: _fitted(values[name], tensor, accumulator_dtype(tensor.dtype, options.dtype))
            for name, tensor in zip(bound.names, bound.whole, strict=True)
        },
        "block": None,
        "statistics": {n: values.get(n, t).to(t).clone() for n, t in live.items()},
        "fresh_layers": sorted(fresh_layers),
        "measured_buffers": {},
        "layer_modes": None,
        "pending": [0, 0.0, []],
    }


def _refuse_snapshots(member: Member) -> None:
    if not member.profile.streaming:
        raise ArgumentError(
            f"{member.profile!r} stores individual snapshots, which cannot be recovered from averaged "
            "weights: use state_dict() and load_state_dict(), or an Average with a streaming profile, "
            "such as SWA or EMA."
        )


def read_file(path: Path, whole: Mapping[str, Tensor]) -> tuple[Any, Mapping[str, str]]:
    """What is in a file, and what it says about itself, without running code from it.

    whole: the sharded tensors of the model, of which only this rank's part is read.
    """
    if path.is_dir():
        raise ArgumentError(
            f"{path} is a folder; load() takes a file, as save() writes it or torch.save(state_dict())."
        )
    if not path.is_file():
        raise ArgumentError(f"{path}: there is no such file.")
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, "pt") as file:
                names = file.keys()  # not a mapping: it cannot be iterated
                read = {n: _part(file, n, whole.get(_plain(n, whole.keys()))) for n in names}
                return read, file.metadata() or {}
        mapped = bool(whole) and zipfile.is_zipfile(path)  # then parts are read when they are used
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (
        UnpicklingError,
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        raise FormatError(
            f"{path} cannot be read as a state. It may be cut short, or hold more than tensors and"
            " plain values: then load it as it was saved, and give load_state_dict() (a state of"
            " polyak) or import_state() (another library's) the part that is the state."
            f" ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    metadata = getattr(state, "_metadata", None)
    said = metadata.get("polyak") if isinstance(metadata, Mapping) else None
    return state, said if isinstance(said, Mapping) else {}


def _part(file: Any, name: str, like: Tensor | None) -> Tensor:
    """A tensor in a safetensors file; of one that the model has sharded, the part of this rank."""
    stored = file.get_slice(name)
    if like is None or not like.dim() or tuple(stored.get_shape()) != tuple(like.shape):
        whole: Tensor = file.get_tensor(name)
        return whole
    here = local(like)
    part = torch.empty(here.shape, dtype=stored[0:0].dtype)
    for spans, own in boxes(like):
        narrowed(part, own).copy_(stored[tuple(slice(*span) for span in spans)])
    return sharded_as(part, like)


def _fitted(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A value of the state in the accumulators' dtype, this rank's part of it where it is sharded."""
    if not is_sharded(like) or value.shape != like.shape:
        return value.detach().to(dtype)
    return sharded_as(part_of(value.detach(), like).to(dtype), like)


def _below(state: Mapping[str, Any], prefix: str, names: Set[str]) -> dict[str, Tensor]:
    """The tensors under a prefix, by the model's names: without it, and without wrappers' own."""
    return {
        _plain(key.removeprefix(prefix), names): value
        for key, value in state.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }


def _plain(key: str, names: Set[str]) -> str:
    if key in names:
        return key
    return ".".join(part for part in key.removeprefix("module.").split(".") if part != "_orig_mod")


def _by_position(shadows: Any, model: Module) -> dict[str, Tensor]:
    """Lists in the order of `model.parameters()`, or of those that take gradients."""
    slots = {n: s for n, s in named_tensors(model).slots.items() if s.is_parameter}
    trained = {n: s for n, s in slots.items() if s.tensor.requires_grad}
    if not isinstance(shadows, (list, tuple)) or not all(isinstance(t, Tensor) for t in shadows):
        raise FormatError("shadow_params is not a list of tensors. Nothing was imported.")
    for candidates in (slots, trained):
        if len(candidates) == len(shadows):
            break
    else:
        raise MismatchError(
            f"The state lists {len(shadows)} parameters, and this model has"
            f" {len(slots)}, of which {len(trained)} take gradients. {_ADVICE}"
        )
    found = dict(zip(candidates, shadows, strict=True))
    changed = {
        n: f"{tuple(t.shape)}, but this model's is {tuple(slots[n].tensor.shape)}"
        for n, t in found.items()
        if t.shape != slots[n].tensor.shape
    }
    if changed:
        raise MismatchError.of("The state lists other parameters.", changed=changed, advice=_ADVICE)
    return found


def _whole(count: Any) -> int | None:
    return None if count is None else int(count)
