"""Times in another unit than training steps, such as tokens: from a table, or from the names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.scores import look_up, read_table
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.errors import ArgumentError

_FACTORS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def measured_times(
    inputs: Sequence[Checkpoint], options: MergeOptions
) -> tuple[str, list[float]] | None:
    """The unit that was asked for and the time of each input in it; None where that is steps.

    Raises ArgumentError if the time of one is unknown.
    """
    if options.steps_unit is None and options.steps_from is None:
        return None
    unit = options.steps_unit or "tokens"
    if options.steps_from is None:
        where, found = "its name", [number_in_name(one.path, unit) for one in inputs]
    else:
        where = str(options.steps_from)
        table = read_table(Path(options.steps_from), unit)
        found = [look_up(table, one.path, one.step) for one in inputs]
    unknown = [one.path for one, time in zip(inputs, found, strict=True) if time is None]
    if unknown:
        raise ArgumentError(
            f"The {unit} of {', '.join(unknown)} are unknown: {where} does not say. Pass steps_from= with a "
            f"CSV or JSONL file that has the columns step (or file) and {unit}."
        )
    return unit, [time for time in found if time is not None]


def number_in_name(path: str, unit: str) -> float | None:
    """The number beside the unit in the last part of the path that has one.

    >>> number_in_name("run/stage1-step1000-tokens4B/model.safetensors", "tokens")
    4000000000.0
    >>> number_in_name("run/1.5T_tokens.pt", "tokens")
    1500000000000.0
    """
    word = re.escape(unit.removesuffix("s")) + "s?"
    number = r"(\d+(?:\.\d+)?)([kmbt]?)"
    pattern = rf"(?<![a-z]){word}[-_=]?{number}(?![a-z\d])|(?<![\w.]){number}[-_]?{word}(?![a-z])"
    for part in reversed(Path(path).parts):
        if found := re.search(pattern, part, re.IGNORECASE):
            digits, factor = (found[1], found[2]) if found[1] else (found[3], found[4])
            return float(digits) * _FACTORS[factor.lower()]
    return None
