"""The files of a SWAG: what `save` writes, and the records and checkpoints that one is made from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.averaging import saving, state
from polyak.averaging.clock import Clock
from polyak.averaging.interop import read_file, saved_state
from polyak.averaging.spread import SpreadAverage
from polyak.averaging.tracker import Member
from polyak.averaging.values import refuse_nonfinite_average
from polyak.checkpoints.intervals import Interval
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.writing.save import check_target, write_checkpoint
from polyak.errors import ArgumentError, FormatError, PolyakError, UsageError, check_match, some
from polyak.files import as_path
from polyak.maths.arguments import number
from polyak.study.trajectory import Trajectory
from polyak.tensors.blend import GroupedTensors

_VARIANCE, _DEVIATIONS = "swag.variance.", "swag.deviations."
_RANK, _COLUMNS = "swag_rank", "swag_columns"


def save(member: Member, path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Write what `SWAG.save` documents."""
    check_target(as_path(path), overwrite=overwrite, suffixes=(".safetensors",))
    tracker = member.tracker
    tracker.ready_to_read()
    held = member.accumulator
    if not isinstance(held, SpreadAverage) or member.is_empty():
        raise UsageError("There is nothing to save: nothing has been averaged yet.")
    saving.refuse_odd_forms(member, path)
    refuse_nonfinite_average(member, f"Not saved to {path}")
    metadata = saving.provenance(member)
    metadata |= {_RANK: str(tracker.options.rank), _COLUMNS: str(len(held.columns))}
    names, clock = tracker.tensors.names, member.clock.on_host()
    tensors, ties = saving.averaged_state_dict(member)
    tensors |= {name: held.value(i, clock) for i, name in enumerate(names)}
    extra = saving.extra_state(tracker.tensors.model)
    tensors |= {name: value for name, value in extra.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in extra.items() if name not in tensors}
    tensors |= dict(_named(_VARIANCE, names, held.variance))
    for k, column in enumerate(held.columns):
        tensors |= dict(_named(f"{_DEVIATIONS}{k}.", names, column))
    write_checkpoint(path, tensors, ties=ties, metadata=metadata, extra=others, overwrite=overwrite)


def read(member: Member, path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The state in a file that `save` wrote, or in a saved state_dict, for `SWAG.load_state_dict`."""
    found, metadata = read_file(as_path(path), {})
    if isinstance(found, dict) and found.keys() >= {"version", "profile", "tensors"}:
        return found
    names = member.tracker.tensors.names
    try:
        rank, n_columns = int(metadata[_RANK]), int(metadata[_COLUMNS])
        variance = {name: found[_VARIANCE + name] for name in names}
        columns = tuple(
            {name: found[f"{_DEVIATIONS}{k}.{name}"] for name in names} for k in range(n_columns)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path} is not the file of a SWAG of this model: {error} is not in it. Expected what SWAG.save "
            "wrote, or a saved state_dict()."
        ) from None
    if below := [n for n, v in variance.items() if not v.is_complex() and bool((v < 0).any())]:
        raise FormatError(
            f"{path} holds a variance below 0, of {', '.join(below)}: the file is damaged. Load another one."
        )
    state = saved_state(member, path, found, metadata)
    return {**state, "rank": rank, "variance": variance, "deviations": columns}


def rank_of(path: str | os.PathLike[str]) -> int | None:
    """The rank of a SWAG that was saved in this file; None if none was."""
    if Path(path).suffix.lower() != ".safetensors":
        return None
    try:
        with open_checkpoint(path) as checkpoint:
            return int(checkpoint.metadata[_RANK])
    except (PolyakError, KeyError, ValueError):
        return None  # whoever loads it says why


def state_of(
    member: Member, trajectory: Trajectory, since: float | None, until: float | None
) -> dict[str, Any]:
    """The state that a SWAG would have that had captured the mean of each interval."""
    used = _between(trajectory, since, until)
    tracker = member.tracker
    with tracker.tensors.bound_temporarily():
        SpreadAverage.check_model(tracker.tensors.model)
        template = state.fresh_state(member)
        names, live = tracker.tensors.names, tracker.tensors.live
        held, clock = SpreadAverage(live, tracker.options), Clock(member.profile)
        statistics: dict[str, Tensor] = {}
        for interval in used:
            values, statistics = _read_interval(interval, member)
            clock = _capture(held, values, clock, interval.end - interval.start)
    numbers = ("time", "count", "sum_squared_shares", "time_if_none_skipped")
    return {
        **template,
        **{name: getattr(clock, name) for name in numbers},
        **held.state(names),
        "statistics": {**template["statistics"], **statistics},
    }


@torch.no_grad()
def _capture(held: SpreadAverage, values: list[Tensor], before: Clock, dt: float) -> Clock:
    """One more capture, of values instead of live weights."""
    now = before.advance(dt)
    grouped = GroupedTensors(values, held.tensors, n_averages=1)
    held.regroup(values, grouped)
    if (update := held.update(before, now)) is not None:
        grouped.blend([update])
    held.settle(now)
    return now


def _between(
    trajectory: Trajectory, since: float | None, until: float | None
) -> tuple[Interval, ...]:
    start = trajectory.start if since is None else number("since", since)
    end = trajectory.end if until is None else number("until", until)
    used = tuple(one for one in trajectory.intervals if one.start >= start and one.end <= end)
    if len(used) < 2:
        raise ArgumentError(
            f"{len(used)} intervals are between {start:g} and {end:g} {trajectory.unit}; a spread needs at "
            f"least 2. {trajectory!r} begins and ends intervals at "
            f"{some(f'{edge:g}' for edge in trajectory.edges)}."
        )
    return used


def _read_interval(interval: Interval, member: Member) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The averaged tensors of an interval in the order of the model's, and its statistics."""
    bound = member.tracker.tensors
    with interval.open() as checkpoint:
        stored = dict(checkpoint.tensors)
        stored |= {alias: stored[name] for alias, name in checkpoint.ties.items()}
        expected = {n: tuple(t.shape) for n, t in zip(bound.names, bound.live, strict=True)}
        check_match(
            {name: tuple(one.shape) for name, one in stored.items()},
            expected,
            f"{interval.path} does not fit this {type(bound.model).__name__}.",
            allow_unexpected=True,
        )
        values = [
            stored[name].load().to(live.device)
            for name, live in zip(bound.names, bound.live, strict=True)
        ]
        statistics = {n: stored[n].load() for n in bound.statistic_names if n in stored}
    return values, statistics


def _named(
    prefix: str, names: Sequence[str], tensors: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    return ((prefix + name, tensor) for name, tensor in zip(names, tensors, strict=True))
