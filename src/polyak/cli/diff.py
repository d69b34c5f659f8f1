"""`polyak diff`: how two checkpoints differ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from polyak.errors import PolyakError

if TYPE_CHECKING:
    from rich.table import Table

    from polyak.checkpoints.diff import CheckpointDiff, Distance


def diff(
    a: str,
    b: str,
    /,
    *,
    key_a: str | None = None,
    key_b: str | None = None,
    full: Annotated[bool, Parameter(name="--all", negative="")] = False,
) -> int:
    """Compare two checkpoints: names, shapes, dtypes, and how far apart their values are.

    The exit code is that of diff: 0 if they are equal, 1 if they differ, 2 if they cannot be compared.

    Args:
        a: The first checkpoint: a file or folder of any format.
        b: The second checkpoint.
        key_a: Where the tensors of the first are inside nested dicts, with dots.
        key_b: Where the tensors of the second are.
        full: Also list the tensors that are equal.

    """
    from rich.console import Console

    from polyak.checkpoints.diff import diff_checkpoints
    from polyak.cli.app import with_flags
    from polyak.cli.inspect import wide_console

    console = wide_console()
    try:
        found = diff_checkpoints(a, b, key_a=key_a, key_b=key_b)
    except PolyakError as error:
        message = with_flags(str(error)).replace("--key", "--key-a or --key-b")
        Console(stderr=True).print(
            message, style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    for line in _described(found, a, b):
        console.print(line, markup=False, soft_wrap=True)
    if any(entry.unequal or full for entry in found.distances.values()):
        console.print(_table(found, full=full))
    unequal = sum(bool(entry.unequal) for entry in found.distances.values())
    if found.distances:
        console.print(
            f"{unequal} of {len(found.distances)} compared tensors differ in their values."
        )
    else:
        console.print("No values were compared: no tensor has one name and one shape in both.")
    return 0 if found.same else 1


def _described(found: CheckpointDiff, a: str, b: str) -> list[str]:
    """Names, shapes and dtypes that differ, a line each."""
    lines = [f"only in {a}: {name}" for name in found.only_a]
    lines += [f"only in {b}: {name}" for name in found.only_b]
    lines += [f"{name}: shape {list(x)} against {list(y)}" for name, (x, y) in found.shapes.items()]
    lines += [f"{name}: dtype {x} against {y}" for name, (x, y) in found.dtypes.items()]
    lines += [f"{name}: state that is no tensor differs" for name in found.extra]
    return lines


def _table(found: CheckpointDiff, *, full: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_footer=True)
    table.add_column("tensor", "all of them", overflow="fold")
    titles = ("unequal", "L2 distance", "relative", "angle", "largest")
    for title, total in zip(titles, _row(found.total), strict=True):
        table.add_column(title, total, justify="right")
    for name, entry in found.distances.items():
        if entry.unequal or full:
            table.add_row(Text(name), *_row(entry))
    return table


def _row(entry: Distance) -> list[str]:
    return [
        f"{entry.unequal:,}",
        f"{entry.l2:.6g}",
        f"{entry.relative:.3g}",
        "-" if math.isnan(entry.degrees) else f"{entry.degrees:.3g}°",
        f"{entry.largest:.3g}",
    ]
