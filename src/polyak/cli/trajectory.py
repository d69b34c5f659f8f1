"""The record of a run on the command line: averages of it, and `polyak thin`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from polyak.cli.converters import Whole
from polyak.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from polyak.checkpoints.merging.options import MergeOptions


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Record:
    """Where the one input is the record of a run, as polyak.Recorder writes it.

    Attributes:
        until: The moment from which the average is seen, in the record's unit; by default its end.
        cache_size: What the means of 2, 4, 8, ... intervals may take that are kept beside the record for
            later windows; 0 for none.

    """

    until: float | None = None
    cache_size: str | None = None


def average_record(
    console: Console,
    folder: str,
    methods: Mapping[Any, Any],
    options: MergeOptions,
    record: Record,
    dry_run: bool,
) -> None:
    """Make averages of a record, and print what they are made of."""
    from polyak.study.trajectory import Trajectory

    idle = [name for name in ("base", "key", "normalize", "part") if getattr(options, name)]
    if idle:
        raise ArgumentError(f"A record is averaged as a whole. Leave out {idle[0]}=.")
    trajectory = Trajectory(folder, cache_size=record.cache_size)
    for path, why in trajectory.damaged.items():
        console.print(f"Left out: {path}: {why}", markup=False, soft_wrap=True)
    for method in methods.values():
        console.print(str(trajectory.plan(method, record.until)), markup=False, soft_wrap=True)
    if dry_run:
        return
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    done = trajectory.save(methods, until=record.until, **given)
    for target in done.outputs:
        console.print(f"{target}: {done.tensors} tensors", soft_wrap=True, markup=False)


def thin(folder: Path, *, keep: Whole, by: Literal["evenly", "age"] = "evenly") -> None:
    """Merge neighbouring intervals of a record, in place.

    Args:
        folder: The record of a run, as polyak.Recorder writes it, or the folder of a run that holds one.
        keep: How many intervals to keep.
        by: evenly: all about equally long. age: the longer the older they are, for averages that end
            with the run.

    """
    from rich.console import Console

    from polyak.checkpoints.intervals import the_record
    from polyak.checkpoints.thinning import thin_record

    record = the_record(folder)
    gone = thin_record(record, keep, by=by)
    Console(highlight=False).print(
        f"{record}: {gone} files merged into their neighbours", soft_wrap=True, markup=False
    )
