"""The state of an average: plain names, numbers and tensors, checked whole before any of it is used.

version, polyak        of this layout, and of the package that wrote it
profile, unit          the profile as text, and what its time is counted in
time, count            how far it has come
sum_squared_shares,    as the clock keeps them
time_if_none_skipped
tensors                name -> accumulator;  `block`: the open block, if there is one
snapshots              for a window, instead of accumulators
statistics             normalisation statistics that belong to the average
fresh_layers           the layers in which they were measured on it; `measured_buffers` are those
                       that are averaged, as measured
layer_modes            which layers trained at the last capture, or None
pending                steps that the hook has counted since the last update: all, real, by which

`torch.distributed.checkpoint` loads only those entries that the given state has. So an average that is
still empty has room for its tensors in its state, and whatever may be there or not is in a tuple, which
is one entry, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Set, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.accumulators import accumulator_class
from polyak.averaging.tracker import Member
from polyak.errors import ArgumentError, FormatError, MismatchError, PolyakError
from polyak.maths.profiles import Profile
from polyak.maths.text import format_profile
from polyak.tensors.policy import Kind
from polyak.version import __version__

VERSION = 2
_NUMBERS = ("time", "count", "sum_squared_shares", "time_if_none_skipped")
_NEEDED = {*_NUMBERS, "version", "profile", "unit", "tensors", "statistics", "pending"}
_NEEDED |= {"fresh_layers", "measured_buffers", "layer_modes"}
_NOTHING_PENDING = (0, 0.0, ())
_NO_TENSORS = (
    "This state stands for {} updates, but holds no tensors. torch.distributed.checkpoint loads only "
    "what the given state_dict has room for, and this one was taken while the model could not be bound "
    "(lazy modules, meta tensors). Nothing was loaded: give the model its tensors, then call "
    "state_dict(), dcp.load and load_state_dict() again."
)


def profile_text(profile: Profile) -> str:
    """The profile as the command line spells it; a custom one as it prints."""
    try:
        return format_profile(profile)
    except ArgumentError:
        return repr(profile)


def state_dict(member: Member) -> dict[str, Any]:
    """The state of one average. Its tensors are the average's own, as in torch's state dicts."""
    tracker = member.tracker
    tracker.take_due()
    tracker.finish()
    clock = member.clock.on_host()
    held, statistics = _held(member)
    modes = tracker.layer_modes
    attachment = member.attachment or tracker.attachment
    pending = attachment.pending() if attachment else member.pending
    return {
        "version": VERSION,
        "polyak": __version__,
        "profile": profile_text(member.profile),
        "unit": member.unit,
        **{number: getattr(clock, number) for number in _NUMBERS},
        **held,
        "statistics": statistics,
        "measured_buffers": tuple(member.measured_buffers.items()),
        "fresh_layers": sorted(member.fresh_layers),
        "layer_modes": None if modes is None else tuple(modes.items()),
        "pending": list(pending or _NOTHING_PENDING),
    }


def _held(member: Member) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the accumulator keeps, and the statistics by name; zeros while nothing was averaged."""
    tensors, held = member.tracker.tensors, member.accumulator
    if held is not None:
        statistics = dict(zip(tensors.statistic_names, member.statistics, strict=True))
        return held.state(tensors.names), statistics
    try:
        named, kinds = tensors.inspect()
    except PolyakError:  # a lazy module, ...: the first update will say so
        return {"tensors": {}}, {}
    of = {
        kind: {n: s.tensor for n, s in named.slots.items() if kinds[n].kind is kind}
        for kind in Kind
    }
    live = of[Kind.AVERAGED]
    if any(tensor.is_meta for tensor in live.values()):
        return {"tensors": {}}, {}
    empty = accumulator_class(member.profile)(list(live.values()), member.tracker.options)
    statistics = {n: torch.zeros_like(t) for n, t in of[Kind.STATISTIC].items()}
    return empty.state(list(live)), statistics


def check_state(member: Member, state: Any) -> None:
    """FormatError if this is not a polyak state, MismatchError if it belongs to a different average."""
    _check_layout(state)
    if not isinstance(state["unit"], str | None):
        raise FormatError(
            f"The state is damaged: its unit is {state['unit']!r}. Nothing was loaded."
        )
    groups = _groups(member, state)
    tracker = member.tracker
    changed = {
        what: f"{have!r}, but this average has {expected!r}"
        for what, have, expected in (
            ("profile", state["profile"], profile_text(member.profile)),
            ("unit", state["unit"], member.unit),
        )
        if have != expected and not (what == "unit" and None in (have, expected))
    }
    if groups and not changed:
        with tracker.tensors.bound_temporarily():
            _check_tensors(member, state, groups)
    elif changed:
        _refuse(changed)


def check_names(states: Any, names: Set[str]) -> None:
    """Raise FormatError unless these are states by name, MismatchError if they have other names."""
    if not isinstance(states, Mapping):
        raise FormatError(
            f"This is not the state of several averages: found {type(states).__name__}, expected a "
            f"state for each of {', '.join(sorted(names))}."
        )
    if states.keys() != names:
        raise MismatchError.of(
            "This is the state of other averages.",
            missing=names - states.keys(),
            unexpected=states.keys() - names,
            advice="Nothing was loaded.",
        )


def load_state(member: Member, state: Mapping[str, Any]) -> None:
    """Continue from a state that `check_state` has passed."""
    tracker = member.tracker
    tracker.finish()
    if _holds_weights(state):
        if thawed := _tensors_of(state).keys() & tracker.tensors.frozen().keys():
            tracker.add(sorted(thawed), known_to=member)
        tracker.prepare()
        if member.accumulator is not None:
            member.accumulator.load_state(state, tracker.tensors.names)
        with torch.no_grad():
            for kept, name in zip(member.statistics, tracker.tensors.statistic_names, strict=True):
                kept.copy_(state["statistics"][name])
    else:
        member.accumulator = None
    member.fresh_layers = set(state["fresh_layers"])
    member.measured_buffers = {n: t.clone() for n, t in dict(state["measured_buffers"]).items()}
    member.clock = replace(member.clock, **{number: state[number] for number in _NUMBERS})
    if tracker.tensors.bound:
        tracker.to_device_if_capturable(member)
    member.unit = state["unit"] or member.unit
    modes = state["layer_modes"]
    tracker.layer_modes = None if modes is None else dict(modes)
    member.pending = list(state["pending"])
    if attachment := member.attachment or tracker.attachment:
        attachment.resume(member.pending)


def _check_layout(state: Any) -> None:
    if isinstance(state, Mapping) and {"version", "profile", "tensors"} <= state.keys():
        if not _is_number(state["version"]) or state["version"] != VERSION:
            raise FormatError(
                f"The state has version {state['version']!r}; this polyak reads version {VERSION}. "
                "Load it with the release that wrote it, and save the averaged weights."
            )
        if not _NEEDED - state.keys():
            return
    found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
    raise FormatError(
        f"This is not the state of a polyak average: expected {', '.join(sorted(_NEEDED))}; "
        f"found {found}. import_state() reads those of other libraries."
    )


def _groups(member: Member, state: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    """The groups of averaged tensors in a state. Raises FormatError for what no average wrote."""
    bad = [n for n in _NUMBERS if not _is_number(state[n]) or not 0 <= state[n] < float("inf")]
    groups: dict[str, Mapping[str, Tensor]] = {}
    measured: Any = None
    try:
        measured = dict(state["measured_buffers"])
        dict(() if state["layer_modes"] is None else state["layer_modes"])
        set(state["fresh_layers"])
        if _holds_weights(state) and state["profile"] == profile_text(member.profile):
            groups = accumulator_class(member.profile).check_state(state)
        steps, real, stepped = state["pending"]
        float(steps + real + sum(stepped))
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError, IndexError):
        bad.append("block, snapshots, fresh_layers, layer_modes or pending")
    named = {**groups, "measured_buffers": measured}
    named |= {n: state[n] for n in ("statistics", "tensors")}
    bad += [n for n, group in named.items() if not _holds_tensors(group)]
    if not bad and state["count"] and not _holds_weights(state):
        raise FormatError(_NO_TENSORS.format(state["count"]))
    if bad:
        raise FormatError(
            f"The state is damaged: {', '.join(bad)} cannot be what was saved. Nothing was loaded."
        )
    return groups


def _holds_weights(state: Mapping[str, Any]) -> bool:
    if not _is_number(state["count"]) or not state["count"]:
        return False
    return any(isinstance(state.get(n), Sized) and len(state[n]) for n in ("tensors", "snapshots"))


def _tensors_of(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The averaged tensors by name; for a window, those of one snapshot."""
    tensors: Mapping[str, Tensor] = state["tensors"] or state["snapshots"][-1]["tensors"]
    return tensors


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _holds_tensors(group: Any) -> bool:
    return isinstance(group, Mapping) and all(isinstance(t, Tensor) for t in group.values())


def _check_tensors(
    member: Member, state: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]
) -> None:
    tensors, options = member.tracker.tensors, member.tracker.options
    held_by = accumulator_class(member.profile)
    live = dict(zip(tensors.names, tensors.live, strict=True))
    # What trained when the state was saved may still be frozen here: a run that resumes thaws later.
    live |= {n: t for n, t in tensors.frozen().items() if n in _tensors_of(state)}
    weights = {
        n: f"{tuple(t.shape)} {held_by.dtype_held(t.dtype, options)}" for n, t in live.items()
    }
    statistics = {
        n: str(tuple(t.shape))
        for n, t in zip(tensors.statistic_names, tensors.statistics, strict=True)
    }
    expected = weights | statistics
    missing: set[str] = set()
    unexpected: set[str] = set()
    changed: dict[str, str] = {}
    for group in groups.values():
        found = {n: f"{tuple(t.shape)} {t.dtype}" for n, t in group.items()}
        found |= {n: str(tuple(t.shape)) for n, t in state["statistics"].items()}
        missing |= expected.keys() - found.keys()
        unexpected |= found.keys() - expected.keys()
        changed |= {
            n: f"{found[n]}, but this model's is {expected[n]}"
            for n in expected.keys() & found.keys()
            if found[n] != expected[n]
        }
    if missing or unexpected or changed:
        _refuse(changed, missing, unexpected)


def _refuse(changed: dict[str, str], missing: Any = (), unexpected: Any = ()) -> None:
    raise MismatchError.of(
        "This state belongs to a different average.",
        missing=missing,
        unexpected=unexpected,
        changed=changed,
        advice="Nothing was loaded. Build the Average with the model and the profile it was saved with.",
    )
