"""`thin_record`: fewer intervals, merged evenly or more the older they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from polyak.checkpoints.intervals import Interval, merge_intervals, scan_intervals, the_record
from polyak.errors import ArgumentError, FormatError, require
from polyak.files import as_path
from polyak.maths.arguments import at_least_one


def thin_record(
    folder: str | os.PathLike[str],
    keep: int,
    *,
    by: str = "evenly",
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Merge neighbouring intervals of a record until `keep` are left; returns how many files are gone.

    Each file that is left is the mean of all captures between its edges. A kill leaves whole files, and
    the same call continues.

    Args:
        folder: The record, or the folder of a run that holds one.
        keep: How many intervals to keep; nothing happens if there are not more.
        by: `"evenly"`, all about equally long, which serves averages that end anywhere; `"age"`, in
            proportion to how long ago they were, which serves those that end with the run.
        progress: Called with the number of merges done and the number of all.

    Raises:
        ArgumentError: no record or several, or another word for `by`.
        FormatError: a damaged interval; nothing is merged then.
        OutputError: the folder cannot be written to.

    """
    require(by in ("evenly", "age"), f"by is {by!r}; expected 'evenly' or 'age'.")
    path = the_record(as_path(folder))
    found = scan_intervals(path)
    if found.damaged:
        listed = "\n".join(f"  {name}: {why}" for name, why in found.damaged.items())
        raise FormatError(f"{path} holds damaged intervals; remove them first.\n{listed}")
    if not found.intervals:
        raise ArgumentError(f"{path} holds no recorded intervals (interval-<k>.safetensors).")
    groups = grouped(found.intervals, at_least_one("keep", keep), by_age=by == "age")
    merges = [group for group in groups if len(group) > 1]
    for done, group in enumerate(merges, start=1):
        merge_intervals(group)
        if progress is not None:
            progress(done, len(merges))
    return len(found.intervals) - len(groups)


def grouped(
    intervals: Sequence[Interval], keep: int, *, by_age: bool = False
) -> list[list[Interval]]:
    """Neighbours to merge so that `keep` groups are left: always the two whose union is shortest.

    Shortest in time or, by age, relative to how long before the end of the record they are.
    """
    groups = [[one] for one in intervals]
    end = intervals[-1].end
    newest = end - intervals[-1].start

    def cost(at: int) -> float:
        if groups[at][-1].end != groups[at + 1][0].start:
            return float("inf")  # an interval between them is missing
        length = groups[at + 1][-1].end - groups[at][0].start
        return length / (end - groups[at + 1][-1].end + newest) if by_age else length

    while len(groups) > keep:
        at = min(range(len(groups) - 1), key=cost)
        if cost(at) == float("inf"):
            break
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    return groups
