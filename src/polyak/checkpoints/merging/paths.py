"""The paths of a merge: what is read, what is written, and that the second never harms the first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from polyak.checkpoints.merging.recipes import How
from polyak.checkpoints.reading.layout import Checkpoint
from polyak.errors import ArgumentError

PathLike = str | os.PathLike[str]


def checked_paths(inputs: Iterable[PathLike], outputs: Mapping[PathLike, How]) -> list[str]:
    """The inputs' paths; one path instead of many would be taken letter by letter."""
    if isinstance(inputs, (str, bytes, os.PathLike)):
        raise ArgumentError(
            f"inputs is one path, {inputs!r}; expected a list of checkpoints: [{inputs!r}] for this "
            "one alone, or Path(folder).glob('*') for those in a folder."
        )
    if not isinstance(outputs, Mapping):
        raise ArgumentError(
            f"outputs is {outputs!r}; expected a mapping of path to method, like "
            "{'averaged.safetensors': 'swa'}."
        )
    return [os.fspath(path) for path in inputs]


def refuse_twice(paths: Sequence[str], outputs: Mapping[PathLike, How]) -> None:
    """ArgumentError for nothing to read or write, and for what is named twice."""
    if not paths:
        raise ArgumentError("There is nothing to average: no input was given.")
    if not outputs:
        raise ArgumentError("There is nothing to write: no output was given.")
    resolved = [_resolved(path) for path in paths]
    twice = sorted({path for path in resolved if resolved.count(path) > 1})
    if twice:
        raise ArgumentError(
            f"Given twice as an input: {', '.join(twice)}. Use weights to count more."
        )
    targets = [_resolved(path) for path in outputs]
    if len(set(targets)) < len(targets):
        raise ArgumentError(f"Two outputs have the same path: {targets}.")


def refuse_replacing(outputs: Iterable[PathLike], inputs: Iterable[Checkpoint]) -> None:
    """ArgumentError where an output would take the place of an input, or of a folder that holds one."""
    read = {path for one in inputs for path in (one.path, *(file.path for file in one.files))}
    sources = {
        place: path
        for path in sorted(read)
        if "://" not in path
        for start in (Path(path).absolute(), Path(path).resolve())
        for place in (start, *start.parents)
    }
    for target in outputs:
        if (source := sources.get(Path(target).resolve())) is not None:
            raise ArgumentError(
                f"The output {os.fspath(target)} is an input, or holds one: {source}. Write to "
                "another name."
            )


def _resolved(path: str | os.PathLike[str]) -> str:
    """The path as far as the system can resolve it, to tell whether an input was given twice."""
    text = os.fspath(path)
    return text if "://" in text else str(Path(text).resolve())
