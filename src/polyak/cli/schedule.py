"""`polyak schedule`: a learning-rate schedule as a table, and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from polyak.cli.converters import NewFile
from polyak.errors import ArgumentError
from polyak.maths.schedules import MOST_STEPS
from polyak.maths.text import parse_schedule

if TYPE_CHECKING:
    from rich.table import Table

    from polyak.maths.schedules import Chain

CLASSICAL = (
    "constant:rate=0.1,steps=50",
    "cosine:start=0.1,end=0.01,steps=50",
    "cyclic:high=0.05,low=0.01,cycle=10,steps=40",
)
_POINTS_SHOWN = 12


def schedule(
    *pieces: str,
    plot: NewFile | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Print a learning-rate schedule and when it averages the weights, or draw it.

    Args:
        pieces: One after another, each KIND:NAME=VALUE,...,steps=N. Kinds: constant:rate=,
            linear:start=,end=, cosine:start=,end=, and the cycles with high=,low=,cycle=:
            cyclic (SWA's), sawtooth (torch's CyclicLR), triangular (FGE's). For example:
            linear:start=0.1,end=0.05,steps=800 cyclic:high=0.05,low=0.01,cycle=50,steps=200.
            Default: 50 steps constant, 50 cosine, 40 of SWA's cycles.
        plot: Draw it into this file: .png, .svg or .pdf.
        overwrite: Replace the file if it exists.

    """
    from rich.console import Console

    chain = parse_schedule(pieces or CLASSICAL)
    if chain.total > MOST_STEPS:
        raise ArgumentError(
            f"These are {chain.total} steps; at most {MOST_STEPS} are listed and drawn."
        )
    if plot is not None:
        from polyak.report.schedule import save_schedule_plot

        save_schedule_plot(chain, plot, overwrite=overwrite)
    console = Console(highlight=False)
    console.print(_pieces(chain))
    console.print(_points(chain))
    for steps, piece in chain.pieces:
        if getattr(piece, "cycle", 0) > steps:
            console.print(
                f"Note: no cycle of {piece} ends within its {steps} steps.", soft_wrap=True
            )
    if plot is not None:
        console.print(f"Picture: {plot}", soft_wrap=True)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column == "schedule" else "right")
    return table


def _pieces(chain: Chain) -> Table:
    table = _table("steps", "schedule", "first rate", "last rate")
    for start, (steps, piece) in zip(chain.starts, chain.pieces, strict=True):
        first, last = piece(0), piece(steps - 1)
        table.add_row(f"{start} to {start + steps - 1}", repr(piece), f"{first:g}", f"{last:g}")
    return table


def _points(chain: Chain) -> Table | str:
    points = chain.averaging_points()
    if not points:
        return "  Nothing is averaged: none of the pieces has cycles.\n"
    table = _table("averaged after", "rate just used")
    shown = _POINTS_SHOWN // 2
    for i, point in enumerate(points):
        if len(points) > _POINTS_SHOWN and i == shown:
            table.add_row(f"... {len(points) - 2 * shown} more ...", "")
        if i < shown or i >= len(points) - shown or len(points) <= _POINTS_SHOWN:
            table.add_row(f"{point} steps", f"{chain(point - 1):g}" if point else "none yet")
    return table
