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
is one entry, whatever it holds. Of a sharded model the tensors are DTensors, which must be entries of their
own to be stored whole: blocks and snapshots are in lists, and `parts` says how many there must be.
`polyak.sharded.load` makes room for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.clock import Clock
from polyak.averaging.tracker import Member, Tracker
from polyak.errors import FormatError, MismatchError, PolyakError
from polyak.maths.text import profile_text
from polyak.tensors.policy import Kind
from polyak.tensors.sharding import fits, is_sharded, layout, local, part_of, sharded_as
from polyak.version import __version__

VERSION = 2
_NUMBERS = ("time", "count", "sum_squared_shares", "time_if_none_skipped")
_NEEDED = {*_NUMBERS, "version", "profile", "unit", "tensors", "statistics", "pending"}
_NEEDED |= {"fresh_layers", "measured_buffers", "layer_modes"}
_PARTS = ("block", "snapshots")  # what may be there or not
_NOTHING_PENDING = (0, 0.0, ())
_NO_TENSORS = (
    "This state stands for {} updates, but holds no tensors. torch.distributed.checkpoint loads only "
    "what the given state_dict has room for, and this one was taken while the model could not be bound "
    "(lazy modules, meta tensors). Nothing was loaded: give the model its tensors, then call "
    "state_dict(), dcp.load and load_state_dict() again."
)


_PARTS_LEFT_OUT = (
    "block or snapshots (not loaded, because the given state had no room for them: polyak.sharded.load "
    "makes it)"
)


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
        return _as_dtensors(held.state(tensors.names), tensors.names, tensors.whole), statistics
    try:
        tensors.settle()
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
    values = list(map(local, live.values()))
    empty = member.held_by(values, member.tracker.options)
    statistics = {n: torch.zeros_like(local(t)) for n, t in of[Kind.STATISTIC].items()}
    return _as_dtensors(empty.state(list(live)), list(live), list(live.values())), statistics


def refuse_other_profile(member: Member, state: Mapping[str, Any]) -> None:
    """Raise FormatError or MismatchError if a state, or this much of it, cannot be this average's."""
    if state.get("version") != VERSION or "profile" not in state:
        raise FormatError(
            f"This is not the state of a polyak average of version {VERSION}: it has version "
            f"{state.get('version')!r}. Nothing was loaded."
        )
    if (found := state["profile"]) != (own := profile_text(member.profile)):
        _refuse({"profile": f"{found!r}, but this average has {own!r}"})


def fresh_state(member: Member, n_blocks: int = 0, n_snapshots: int = 0) -> dict[str, Any]:
    """The state of an average that is still empty, with room for blocks and snapshots."""
    tracker = member.tracker
    with tracker.tensors.bound_temporarily():
        state = state_dict(Member(tracker, Clock(member.profile), member.held_by, member.unit))
        tensors = tracker.tensors
        if n_blocks:
            block = [{n: zeros(t, t.dtype) for n, t in state["tensors"].items()}]
            state["block"] = [{"updates": 0, "start": 0.0, "tensors": b} for b in block]
        if n_snapshots:
            state["snapshots"] = [
                {
                    "from": 0.0,
                    "to": 0.0,
                    "tensors": {
                        n: zeros(t, t.dtype)
                        for n, t in zip(tensors.names, tensors.whole, strict=True)
                    },
                }
                for _ in range(n_snapshots)
            ]
    return state


def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a tensor that is sharded as another one is."""
    values = torch.zeros_like(local(like).detach(), dtype=dtype)
    return sharded_as(values, like) if is_sharded(like) else values


def _as_dtensors(
    held: dict[str, Any], names: Sequence[str], whole: Sequence[Tensor]
) -> dict[str, Any]:
    """What an accumulator holds of a sharded model, as torch.distributed.checkpoint stores it whole."""
    like = {name: tensor for name, tensor in zip(names, whole, strict=True) if is_sharded(tensor)}
    if not like:
        return held
    wrapped = _mapped(held, lambda n, t: sharded_as(t, like[n]) if n in like else t)
    return wrapped | {"parts": sum(len(wrapped.get(key, ())) for key in _PARTS)}


def _mapped(held: Mapping[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """The same with every tensor changed, blocks and snapshots in lists."""

    def group(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: change(name, tensor) for name, tensor in tensors.items()}

    parts = {
        key: [{**part, "tensors": group(part["tensors"])} for part in held[key] or ()]
        for key in _PARTS
        if key in held
    }
    return {**held, **parts, "tensors": group(held["tensors"])}


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
            member.accumulator.load_state(_on_this_rank(state, tracker), tracker.tensors.names)
        with torch.no_grad():
            for kept, name in zip(member.statistics, tracker.tensors.statistic_names, strict=True):
                kept.copy_(local(state["statistics"][name]))
    elif tracker.options.capturable and member.accumulator is not None:
        for tensors in member.accumulator.tensors_held():  # a graph may hold their addresses
            torch._foreach_zero_(tensors)
        member.accumulator.restart()
    else:
        member.accumulator = None
    member.fresh_layers = set(state["fresh_layers"])
    member.measured_buffers = {n: t.clone() for n, t in dict(state["measured_buffers"]).items()}
    numbers = {number: state[number] for number in _NUMBERS}
    tracker.set_clock(member, replace(member.clock, **numbers))
    member.unit = state["unit"] or member.unit
    modes = state["layer_modes"]
    tracker.layer_modes = None if modes is None else dict(modes)
    member.pending = list(state["pending"])
    if attachment := member.attachment or tracker.attachment:
        attachment.resume(member.pending)
    for one in member.fed:
        one.after_load()


def reset(member: Member) -> None:
    """Back to an average that has seen nothing; its unit stays, which an attachment may have set."""
    nothing: dict[str, Any] = {**dict.fromkeys(_NUMBERS, 0.0), "count": 0, "unit": member.unit}
    nothing |= {"fresh_layers": (), "measured_buffers": (), "layer_modes": None}
    load_state(member, {**nothing, "tensors": {}, "pending": _NOTHING_PENDING})


def _on_this_rank(state: Mapping[str, Any], tracker: Tracker) -> Mapping[str, Any]:
    """The state with this rank's part of what is sharded, here or there."""
    whole = dict(zip(tracker.tensors.names, tracker.tensors.whole, strict=True))
    if not any(map(is_sharded, [*whole.values(), *state["tensors"].values()])):
        return state
    return _mapped(state, lambda name, tensor: part_of(tensor, whole[name]))


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
            groups = member.held_by.check_state(state)
        if "parts" in state and state["parts"] != sum(len(state.get(k) or ()) for k in _PARTS):
            bad.append(_PARTS_LEFT_OUT)
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
    held_by = member.held_by
    whole = dict(zip(tensors.names, tensors.whole, strict=True))
    # What trained when the state was saved may still be frozen here: a run that resumes thaws later.
    whole |= {n: t for n, t in tensors.frozen().items() if n in _tensors_of(state)}
    weights = {
        n: f"{tuple(t.shape)} {held_by.dtype_held(t.dtype, options)}" for n, t in whole.items()
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
        found |= {
            n: f"{found[n]}, {layout(t)}" for n, t in group.items() if not fits(t, whole.get(n, t))
        }
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
