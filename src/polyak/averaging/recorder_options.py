"""What a Recorder is given and what its state holds, checked; and how large a record will be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyak.errors import ArgumentError, FormatError, MismatchError, require
from polyak.maths.arguments import at_least_one, number
from polyak.tensors.sharding import part_of

VERSION = 1
TINY = 1e-9
"""What sums of floats may be off, as a part of an interval."""


def checked_interval(interval: float | None, total: float | None, intervals: int) -> float:
    """The length of an interval, from what was given."""
    at_least_one("intervals", intervals)
    if (interval is None) == (total is None):
        raise ArgumentError(
            "A Recorder needs the length of an interval or that of the training: pass interval=1000, or "
            f"total=100000 to have it divided by intervals={intervals}; not both. If the length is "
            "unknown, pass a short interval and keep=64."
        )
    what, given = ("total", total) if interval is None else ("interval", interval)
    length = float(number(what, given if given is not None else 0))
    require(0 < length < math.inf, f"{what} is {given}; expected a positive time.")
    return length / intervals if interval is None else length


def checked_keep(keep: int | None) -> int | None:
    """An even number of files, or None."""
    if keep is not None:
        require(
            at_least_one("keep", keep) % 2 == 0,
            f"keep is {keep}; expected an even number of files, which are merged in pairs.",
        )
    return keep


def checked_state(found: Any, base: float) -> dict[str, Any]:
    """The state, unless it is damaged or of other intervals."""
    needed = {
        "version", "record", "base", "interval", "time", "start", "captured", "captures", "carry", "average",
    }  # fmt: skip
    if not isinstance(found, Mapping) or needed - found.keys() or found["version"] != VERSION:
        raise FormatError(
            f"This is not the state of a Recorder: expected {', '.join(sorted(needed))}, and version "
            f"{VERSION}. Nothing was loaded."
        )
    try:
        numbers = [
            float(found[n]) for n in ("base", "interval", "time", "start", "captured", "captures")
        ]
        carry = dict(found["carry"])
    except (TypeError, ValueError):
        numbers, carry = [-1.0], {}
    tensors = all(isinstance(one, Tensor) for one in carry.values())
    if not tensors or min(numbers) < 0 or not isinstance(found["record"], str):
        raise FormatError("The state of the Recorder is damaged. Nothing was loaded.")
    if found["base"] != base:
        raise MismatchError(
            f"The state is of a record with intervals of {found['base']:g}, and this one's are {base:g}. "
            "Nothing was loaded. Make the Recorder with the interval that the record began with."
        )
    return dict(found)


def checked_carry(carry: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What rounding has left, this rank's part of it. Raises MismatchError if it is of another model."""
    changed = {
        n: f"{tuple(t.shape)}, but this model's is {tuple(model[n].shape)}"
        for n, t in carry.items()
        if n in model and t.shape != model[n].shape
    }
    if changed or carry.keys() - model.keys():
        raise MismatchError.of(
            "The state is of the record of another model.",
            missing=(),
            unexpected=carry.keys() - model.keys(),
            changed=changed,
            advice="Nothing was loaded.",
        )
    return {n: part_of(t, model[n]) for n, t in carry.items()}


def no_average(average: Mapping[str, Any]) -> dict[str, Any]:
    """An interval that has just begun holds nothing: what the last one left is not its own."""
    return {
        **({"parts": 0} if "parts" in average else {}),
        "time": 0.0,
        "count": 0,
        "sum_squared_shares": 0.0,
        "time_if_none_skipped": 0.0,
        "block": (),
    }


def expected(each: int, total: float | None, interval: float, keep: int | None) -> tuple[str, int]:
    """How large the record will be, in words and in bytes."""
    if total is not None:
        count = math.ceil(total / interval - TINY)
        count = count if keep is None else min(count, keep)
        return f"{count} intervals of {size(each)}: {size(count * each)} in all", count * each
    if keep is not None:
        return (
            f"at most {keep} intervals of {size(each)}: {size(keep * each)} in all",
            keep * each,
        )
    return f"{size(each)} for every interval of {interval:g}", each


def size(nbytes: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
