"""Recorded intervals: files that say of which stretch of training they are the mean.

`interval-<k>.safetensors` is an ordinary averaged file. Beside what those say (profile, unit, time,
count), its metadata has `interval`, the times at which it begins and ends, and `record`, which all
files of one record share. `k` counts intervals of the length that the record began with, so that a
name always means the same end. A merge of neighbours has the name of the last one and is there, whole,
before the others go: a file whose stretch is inside another one's is a leftover.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from polyak.checkpoints.reading.folders import INTERVAL, is_record
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.stored import FLOATS, Checkpoint
from polyak.errors import ArgumentError, FormatError, MismatchError, PolyakError, require
from polyak.maths.planning import Span


@dataclass(frozen=True)
class Interval:
    """One file of a record. number: that in its name. signature: of its tensors' names and shapes."""

    path: Path
    number: int
    span: Span
    unit: str
    record: str
    sum_squared_shares: float
    nbytes: int
    narrow: bool = False
    signature: str = ""
    key: str | None = None

    @property
    def start(self) -> float:
        """The time at which it begins."""
        return self.span.start

    @property
    def end(self) -> float:
        """The time at which it ends."""
        return self.span.end

    @property
    def captures(self) -> int:
        """How many weights are in its mean."""
        return self.span.captures

    @property
    def stamp(self) -> str:
        """What tells this file from one that takes its place."""
        stat = self.path.stat()
        return f"{self.path} {self.start!r} {self.end!r} {stat.st_size} {stat.st_mtime_ns}"

    def open(self) -> Checkpoint:
        """The file as a checkpoint."""
        return open_checkpoint(self.path, key=self.key)


@dataclass(frozen=True)
class Scan:
    """What a folder holds: intervals in order, and files that cannot be used, with the reason."""

    intervals: tuple[Interval, ...] = ()
    damaged: Mapping[str, str] = field(default_factory=dict)


def interval_path(folder: Path, number: int) -> Path:
    """Where the interval of this number is."""
    return folder / f"interval-{number}.safetensors"


def interval_metadata(
    span: Span, unit: str, record: str, sum_squared_shares: float
) -> dict[str, str]:
    """What the file of an interval says about itself, but for its BatchNorm statistics."""
    said = {
        "profile": "swa",
        "unit": unit,
        "time": repr(span.end - span.start),
        "count": str(span.captures),
        "sum_squared_shares": repr(sum_squared_shares),
        "interval": json.dumps([span.start, span.end]),
        "record": record,
    }
    return said | ({"step": str(round(span.end))} if unit == "steps" else {})


def records_in(folder: Path) -> list[Path]:
    """Folders with recorded intervals inside one that is no record itself: a run's, up to three levels down."""
    if is_record(folder):
        return []
    found: set[Path] = set()
    for depth in range(1, 4):
        for path in folder.glob("*/" * depth + "interval-*.safetensors"):
            if INTERVAL.fullmatch(path.name):
                found.add(path.parent)
    return sorted(found)


def scan_intervals(folder: Path) -> Scan:
    """The intervals in a folder by their time, without leftovers of merges."""
    found: list[Interval] = []
    damaged: dict[str, str] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not (match := INTERVAL.fullmatch(path.name)):
            continue
        try:
            with open_checkpoint(path) as opened:
                found.append(_described(path, int(match[1]), opened))
        except (PolyakError, OSError) as error:
            damaged[str(path)] = str(error)
    found.sort(key=lambda one: (one.start, -one.end))
    kept: list[Interval] = []
    for one in found:
        before = kept[-1].end if kept else -math.inf
        if one.end <= before:
            continue  # a merge has taken its place
        if one.start < before:
            damaged[str(one.path)] = f"it overlaps {kept[-1].path}; one of them is of another run"
            continue
        kept.append(one)
    return Scan(tuple(kept), damaged)


def merge_intervals(group: Sequence[Interval]) -> None:
    """Put one file in the place of neighbours: their mean, weighed by the time they stand for."""
    if len(group) < 2:
        return
    lengths = [one.end - one.start for one in group]
    shares = [length / math.fsum(lengths) for length in lengths]
    write_mean(group[-1].path, group, shares)
    for one in group[:-1]:
        one.path.unlink(missing_ok=True)


def write_mean(target: Path, group: Sequence[Interval], shares: Sequence[float]) -> None:
    """Write a mean of neighbours to `target`, which may be one of them, as an interval of its own."""
    from polyak.checkpoints.merging.into import merge_into
    from polyak.checkpoints.merging.weights import OutputWeights

    span = Span(group[0].start, group[-1].end, sum(one.captures for one in group))
    pairs = zip(shares, group, strict=True)
    squares = math.fsum(share**2 * one.sum_squared_shares for share, one in pairs)
    metadata = interval_metadata(span, group[-1].unit, group[-1].record, squares)
    with ExitStack() as stack:
        opened = [stack.enter_context(one.open()) for one in group]
        merge_into(target, opened, OutputWeights(tuple(shares), metadata=metadata))


def _described(path: Path, number: int, opened: Checkpoint) -> Interval:
    said = opened.metadata
    try:
        start, end = map(float, json.loads(said["interval"]))
        span = Span(start, end, int(said["count"]))
        squares = float(said["sum_squared_shares"])
        unit, record = said["unit"], said["record"]
    except (KeyError, TypeError, ValueError):
        raise FormatError(
            f"{path} is not a recorded interval: its metadata lacks interval, count or record."
        ) from None
    if not (0 <= start < end < math.inf and span.captures >= 1):
        raise FormatError(f"{path} says that it is the interval {start} to {end}, which is none.")
    shapes = sorted((name, t.shape) for name, t in opened.tensors.items())
    signature = hashlib.sha256(repr(shapes).encode()).hexdigest()
    narrow = any(
        t.dtype in FLOATS and t.dtype not in ("F32", "F64") for t in opened.tensors.values()
    )
    size = sum(file.size for file in opened.files)
    return Interval(path, number, span, unit, record, squares, size, narrow, signature)


def the_record(folder: Path) -> Path:
    """The folder, or the one record in it. Raises ArgumentError if there are several, or no folder."""
    require(folder.is_dir(), f"There is no folder {folder}. Check the path.")
    inside = records_in(folder)
    if len(inside) > 1:
        named = "".join(f"\n  {path}" for path in inside[:12])
        more = f"\n  and {len(inside) - 12} more" if len(inside) > 12 else ""
        raise ArgumentError(
            f"{folder} holds {len(inside)} records; name the one that is meant:{named}{more}"
        )
    return inside[0] if inside else folder


def refuse_mixed(intervals: Sequence[Interval]) -> None:
    """Raise MismatchError for intervals of different runs, naming them."""
    newest = intervals[-1]
    for what, found in (
        ("record", {one.path.name: one.record for one in intervals}),
        ("tensors", {one.path.name: one.signature for one in intervals}),
        ("unit", {one.path.name: one.unit for one in intervals}),
    ):
        other = [name for name, value in found.items() if value != found[newest.path.name]]
        if other:
            raise MismatchError(
                f"{newest.path.parent} holds intervals of different runs: the {what} of "
                f"{', '.join(other[:8])} {'is' if len(other) == 1 else 'are'} not that of "
                f"{newest.path.name}. Move those of the other run away."
            )
