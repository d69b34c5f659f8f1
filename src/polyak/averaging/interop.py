"""Coming from other libraries and going to them: their state dicts in, plain ones out.

What is read: torch's `AveragedModel` (`module.*`, `n_averaged`), timm's `ModelEmaV2` and
`ModelEmaV3` (`module.*`, or `state_dict_ema` in timm's checkpoints), ema-pytorch's `EMA`
(`ema_model.*`, `step`), diffusers' `EMAModel` and torch-ema (`shadow_params`, in the order of the
parameters), and any plain state dict of the averaged model.

An average goes on from a file: its own state, or another library's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module

from polyak.averaging.saving import batchnorm_status, warn_stale
from polyak.averaging.state import VERSION, spelled
from polyak.averaging.tracker import Following
from polyak.averaging.values import refuse_nonfinite_average
from polyak.errors import ArgumentError, FormatError, MismatchError, UsageError
from polyak.files import replacing
from polyak.maths.profiles import Profile
from polyak.tensors.blend import accumulator_dtype
from polyak.tensors.finite import refuse_nonfinite
from polyak.tensors.names import named_tensors

if TYPE_CHECKING:
    from polyak.averaging.average import Average

Layout = Literal["plain", "averaged_model"]

_ADVICE = "Nothing was imported. Is it the state of another model?"


@dataclass(frozen=True)
class Foreign:
    """What another library's state says: tensors by name, and how many updates it has seen."""

    tensors: dict[str, Tensor]
    updates: int | None


def import_state(average: Average, state: Mapping[str, Any], *, updates: int | None = None) -> None:
    """Go on from the average that another library has taken of the same model.

    The average keeps its own profile: only the weights and the number of updates come over. A
    state that does not count (timm's) needs `updates=`; it overrides what a state says.

    Args:
        average: replaced whole; on an error it stays as it was.
        state: the other library's state dict, or a plain one.
        updates: how many updates, one unit of time apart, the state stands for.

    Raises:
        FormatError: not a state of any kind that is known.
        MismatchError: tensors that are missing or of another shape, all by name.
        ArgumentError: nothing says how many updates; a window, which needs its single snapshots.
        NonFiniteError: a NaN or an infinity in the state.

    """
    following, profile = average._following, average.profile  # one room: as state.py does
    if not profile.streaming:
        raise ArgumentError(
            f"{profile!r} keeps snapshots, which no running average can be taken apart into;"
            " import into an Average with a streaming profile, such as SWA or EMA"
        )
    foreign = read_foreign(state, following.roster.model)
    updates = foreign.updates if updates is None else updates
    if updates is None:
        raise ArgumentError(
            "the state does not say how many updates it stands for: pass updates="
            " (for example the number of optimizer steps so far)"
        )
    if updates < 1 or updates % 1:
        raise ArgumentError(
            f"updates is {updates!r}; expected a whole number from 1: an empty average has no state"
        )
    refuse_nonfinite(foreign.tensors.items(), "import_state()", "Nothing was imported.")
    with following.roster.bound_for_now():
        average.load_state_dict(_translated(following, profile, foreign.tensors, int(updates)))


def read_foreign(state: Mapping[str, Any], model: Module) -> Foreign:
    """The averaged tensors in another library's state, by the model's own names."""
    if not isinstance(state, Mapping):
        raise FormatError(f"import_state() reads a state dict; found {type(state).__name__}")
    if "shadow_params" in state:
        count = state.get("optimization_step", state.get("num_updates"))
        return Foreign(_by_position(state["shadow_params"], model), _whole(count))
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
            "import_state() found no tensors. Expected the state dict of torch's AveragedModel,"
            " timm's ModelEma, ema-pytorch's EMA, diffusers' EMAModel or torch-ema, or a plain"
            f" one; found the entries {sorted(map(str, state))[:10]}"
        )
    return Foreign(tensors, count)


def export(
    average: Average,
    path: str | os.PathLike[str],
    *,
    layout: Layout = "plain",
    overwrite: bool = False,
) -> None:
    """Write the average for others to read.

    A path that ends in ``.safetensors`` gets what `Average.save` writes; any other a `torch.save`
    of a dict of tensors, readable with ``weights_only=True``: the state dict of the model
    ("plain"), or of a `torch.optim.swa_utils.AveragedModel` around it ("averaged_model").

    Raises:
        OutputError: `path` exists and `overwrite` is False, or cannot be written.
        NonFiniteError: a NaN or an infinity in the average, by name.
        UsageError: nothing has been averaged yet.
        ArgumentError: a layout that is not known, or that the format has no room for.

    """
    if layout not in ("plain", "averaged_model"):
        raise ArgumentError(f"layout is {layout!r}; expected 'plain' or 'averaged_model'")
    if Path(path).suffix == ".safetensors":
        if layout != "plain":
            raise ArgumentError(f"{path}: torch loads AveragedModel states from .pt files")
        average.save(path, overwrite=overwrite)
        return
    state = exported(average, layout=layout)
    with replacing(path, overwrite=overwrite) as part:
        torch.save(state, part)


def exported(average: Average, *, layout: Layout = "plain") -> dict[str, Tensor]:
    """What `export` writes, as a dict."""
    following, held = average._following, average._held
    if held.is_empty():
        raise UsageError("There is nothing to export: nothing has been averaged yet.")
    refuse_nonfinite_average(following, held, "export()")
    if batchnorm_status(following, held) == "stale":
        warn_stale()
    tensors = average.averaged_tensors()
    if layout == "plain":
        return tensors
    n_averaged = torch.tensor(average.count)
    return {"n_averaged": n_averaged, **{f"module.{n}": t for n, t in tensors.items()}}


def _translated(
    following: Following, profile: Profile, tensors: Mapping[str, Tensor], updates: int
) -> dict[str, Any]:
    """The state that this average would have after so many updates to these weights."""
    roster = following.roster
    if missing := set(roster.names) - tensors.keys():
        unexpected = tensors.keys() - roster.kinds.keys()
        raise MismatchError.of(
            "import_state(): this is not a state of the model that is averaged",
            missing=missing,
            unexpected=unexpected,
            advice=_ADVICE,
        )
    first = 0 if profile.initial_mass(0.0) == 1 else 1
    times = [float(first + i) for i in range(updates)]
    live = dict(zip(roster.statistic_names, roster.statistics, strict=True))
    return {
        "version": VERSION,
        "profile": spelled(profile),
        "unit": following.unit,
        "time": times[-1],
        "count": updates,
        "squares": 1 / profile.effective_samples(times),
        "latest": times[-1],
        "tensors": {n: _wide(tensors[n], t, following) for n, t in _pairs(roster)},
        "block": None,
        "statistics": {n: tensors.get(n, t).to(t).clone() for n, t in live.items()},
        "statistics_are_fresh": False,
        "layer_modes": None,
        "pending": [0, 0.0],
    }


def _pairs(roster: Any) -> list[tuple[str, Tensor]]:
    return list(zip(roster.names, roster.live, strict=True))


def _wide(tensor: Tensor, live: Tensor, following: Following) -> Tensor:
    return tensor.detach().to(accumulator_dtype(live.dtype, following.options.dtype))


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
        raise FormatError(
            "import_state(): shadow_params is no list of tensors. Nothing was imported."
        )
    for candidates in (slots, trained):
        if len(candidates) == len(shadows):
            break
    else:
        raise MismatchError(
            f"import_state(): the state lists {len(shadows)} parameters, and this model has"
            f" {len(slots)}, of which {len(trained)} take gradients. {_ADVICE}"
        )
    found = dict(zip(candidates, shadows, strict=True))
    changed = {
        n: f"{tuple(t.shape)}, but this model's is {tuple(slots[n].tensor.shape)}"
        for n, t in found.items()
        if t.shape != slots[n].tensor.shape
    }
    if changed:
        raise MismatchError.of(
            "import_state(): the state lists other parameters", changed=changed, advice=_ADVICE
        )
    return found


def _whole(count: Any) -> int | None:
    return None if count is None else int(count)


def load(average: Average, path: str | os.PathLike[str], *, updates: int | None = None) -> None:
    """Go on from a file; what `Average.load` says."""
    state = _read(Path(path))
    is_own = isinstance(state, dict) and state.keys() >= {"version", "profile", "tensors"}
    if not is_own:
        import_state(average, state, updates=updates)
    elif updates is None:
        average.load_state_dict(state)
    else:
        raise ArgumentError(
            f"{path} is a state of polyak's, which says how many updates it stands for: leave out updates="
        )


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ArgumentError(f"{path}: there is no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
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
            f" polyak's) or import_state() (another's) the part that is the state. ({type(error).__name__}: {str(error)[:200]})"
        ) from error
