"""The state of an average: plain names, numbers and tensors, checked whole before any of it is used.

version, polyak   of this layout, and of the package that wrote it
profile, unit     the profile's spelling, and what its time is counted in
time, count       how far it has come; `squares` and `latest` belong to the clock as well
tensors           name -> accumulator;  `block`: the open block, or None
snapshots         for a window, instead of accumulators
statistics        normalisation statistics that belong to the average, and whether they are fresh
pending           steps that the hook has counted since the last update
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.tracker import Following, Held
from polyak.errors import ArgumentError, FormatError, MismatchError
from polyak.maths.profiles import Profile
from polyak.maths.text import format_profile
from polyak.tensors.blend import accumulator_dtype
from polyak.version import __version__

VERSION = 1
_NUMBERS = ("time", "count", "squares", "latest")
_NEEDED = {*_NUMBERS, "version", "profile", "unit", "tensors", "statistics", "pending"}
_NEEDED |= {"statistics_are_fresh", "layer_modes"}


def spelled(profile: Profile) -> str:
    """The profile as the command line spells it; a profile of one's own as it prints."""
    try:
        return format_profile(profile)
    except ArgumentError:
        return repr(profile)


def state_of(following: Following, held: Held) -> dict[str, Any]:
    """The state of one average. Its tensors are the average's own, as in torch's state dicts."""
    following.finish()
    clock = held.clock.read()
    roster = following.roster
    kept = {"tensors": {}} if held.store is None else held.store.state(roster.names)
    return {
        "version": VERSION,
        "polyak": __version__,
        "profile": spelled(held.profile),
        "unit": following.unit,
        "time": clock.time,
        "count": clock.count,
        "squares": clock.squares,
        "latest": clock.latest,
        **kept,
        "statistics": dict(zip(roster.statistic_names, held.statistics, strict=False)),
        "statistics_are_fresh": held.statistics_are_fresh,
        "layer_modes": following.layer_modes,
        "pending": [following.pending_steps, float(following.pending_real)],
    }


def check_state(following: Following, held: Held, state: Any) -> None:
    """Raise FormatError for what is no such state, MismatchError for one of another average."""
    if not isinstance(state, Mapping) or not state.keys() >= _NEEDED:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise FormatError(
            f"This is not the state of a polyak average: expected {', '.join(sorted(_NEEDED))}; "
            f"found {found}. import_state() reads those of other libraries."
        )
    if state["version"] != VERSION:
        raise FormatError(
            f"The state has version {state['version']!r}; this polyak reads version {VERSION}."
        )
    if damaged := _damaged(state):
        raise FormatError(
            f"The state is damaged: {', '.join(damaged)} cannot be what was saved. Nothing was loaded."
        )
    changed = {
        what: f"{have!r}, but this average has {expected!r}"
        for what, have, expected in (
            ("profile", state["profile"], spelled(held.profile)),
            ("unit", state["unit"], following.unit),
        )
        if have != expected and not (what == "unit" and None in (have, expected))
    }
    if state["tensors"] or state.get("snapshots"):
        with following.roster.bound_for_now():
            _check_tensors(following, held, state, changed)
    elif changed:
        _raise(changed, (), ())


def load_into(following: Following, held: Held, state: Mapping[str, Any]) -> None:
    """Take over a state that `check_state` has passed."""
    following.finish()
    if state["tensors"] or state.get("snapshots"):
        following.prepare()
        if held.store is not None:
            held.store.load(state, following.roster.names)
        with torch.no_grad():
            for kept, name in zip(held.statistics, following.roster.statistic_names, strict=True):
                kept.copy_(state["statistics"][name])
    else:
        held.store = None
    held.statistics_are_fresh = bool(state["statistics_are_fresh"])
    numbers = {k: state[k] for k in ("time", "count", "squares", "latest")}
    held.clock = replace(held.clock, **numbers)
    following.unit = state["unit"] or following.unit
    following.layer_modes = state["layer_modes"]
    following.pending_steps, following.pending_real = state["pending"]


def _damaged(state: Mapping[str, Any]) -> list[str]:
    """The entries that no average has written."""
    bad = [n for n in _NUMBERS if not _is_number(state[n]) or not 0 <= state[n] < float("inf")]
    groups = {"tensors": state["tensors"], "statistics": state["statistics"]}
    block, snapshots = state.get("block"), state.get("snapshots", ())
    try:
        if block is not None:
            groups["block"] = block["tensors"]
            float(block["start"] + block["updates"])
        groups |= {f"snapshots[{i}]": s["tensors"] for i, s in enumerate(snapshots)}
        sum(s["to"] - s["from"] for s in snapshots)
        steps, real = state["pending"]
        float(steps + real)
    except (TypeError, KeyError, ValueError, AttributeError):
        bad.append("block, snapshots or pending")
    bad += [n for n, g in groups.items() if not _holds_tensors(g)]
    return bad or ["tensors"] * (state["count"] > 0 and not (state["tensors"] or snapshots))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _holds_tensors(group: Any) -> bool:
    return isinstance(group, Mapping) and all(isinstance(t, Tensor) for t in group.values())


def _check_tensors(
    following: Following, held: Held, state: Mapping[str, Any], changed: dict[str, str]
) -> None:
    roster = following.roster
    groups = [state["tensors"]] if held.profile.streaming else []
    groups += [state["block"]["tensors"]] if state.get("block") else []
    groups += [snapshot["tensors"] for snapshot in state.get("snapshots", ())]
    expected = dict(zip(roster.names, roster.live, strict=True))
    kept = dict(zip(roster.statistic_names, roster.statistics, strict=True))
    missing, unexpected = set(kept) - state["statistics"].keys(), state["statistics"].keys() - kept
    for group in groups:
        missing |= expected.keys() - group.keys()
        unexpected |= group.keys() - expected.keys()
        for name in expected.keys() & group.keys():
            wide = held.profile.streaming
            changed |= _difference(name, group[name], expected[name], following, wide=wide)
    for name in kept.keys() & state["statistics"].keys():
        if state["statistics"][name].shape != kept[name].shape:
            changed[name] = (
                f"{tuple(state['statistics'][name].shape)}, not {tuple(kept[name].shape)}"
            )
    if missing or unexpected or changed:
        _raise(changed, missing, unexpected)


def _difference(
    name: str, found: Tensor, live: Tensor, following: Following, *, wide: bool
) -> dict[str, str]:
    dtype = accumulator_dtype(live.dtype, following.options.dtype) if wide else live.dtype
    have, expected = (tuple(found.shape), found.dtype), (tuple(live.shape), dtype)
    if have == expected:
        return {}
    return {name: f"{have[0]} {have[1]}, but this model's is {expected[0]} {expected[1]}"}


def _raise(changed: dict[str, str], missing: Any, unexpected: Any) -> None:
    raise MismatchError.of(
        "This is the state of another average.",
        missing=missing,
        unexpected=unexpected,
        changed=changed,
        advice="Nothing was loaded. Build the Average with the model and the profile it was saved with.",
    )
