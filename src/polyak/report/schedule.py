"""The picture of a learning-rate schedule and its averaging points."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from polyak.errors import ArgumentError, require
from polyak.files import file_target, replacing
from polyak.maths.arguments import at_least_one
from polyak.maths.schedules import MOST_STEPS, Schedule, check_schedule
from polyak.report.drawing import style
from polyak.report.figures import legend_above
from polyak.report.meanings import colour_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASE, AVERAGING, TAKEN = "Base LR schedule", "SWA LR schedule", "Averaged weights"


def plot_schedule(schedule: Schedule, ax: Axes | None = None, *, steps: int | None = None) -> Axes:
    """Draw a schedule: its base part, its averaging part, and the points at which weights are taken.

    x is completed steps: the rate of step i is drawn over [i, i + 1], and a marker shows the
    completed steps after which weights are averaged, at the rate that the last of them used.
    `steps` is the schedule's own length by default. Without an `ax` a new figure is created. The
    colours are those of the report: of an annealed run, and of the iterates that averages are made of. Returns the axes.

    Raises ArgumentError if the schedule has no length and `steps` is None, and MissingExtra if
    matplotlib is not installed.

    >>> import polyak
    >>> schedule = polyak.schedules.chain((50, polyak.schedules.Constant(0.1)), (40, polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=10)))
    >>> ax = polyak.plot_schedule(schedule)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['Base LR schedule', 'SWA LR schedule', 'Averaged weights']
    """
    steps = _length(schedule, steps)
    require(
        ax is None or hasattr(ax, "stairs"),
        f"ax is {ax!r}; expected the axes to draw on. To write a file, call "
        "plot_schedule(schedule).figure.savefig(path).",
    )
    with style():
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.figure().add_subplot()
        _draw(schedule, ax, steps)
    return ax


def save_schedule_plot(
    schedule: Schedule, path: Path, *, steps: int | None = None, overwrite: bool = False
) -> None:
    """Write the picture to a file; its suffix (png, svg, pdf) determines the format.

    Raises ArgumentError for a suffix that matplotlib does not write, OutputError if the file exists
    or cannot be written.
    """
    steps = _length(schedule, steps)
    file_target(path, overwrite=overwrite)
    with style():
        from matplotlib.figure import Figure

        figure = Figure()
        kind = path.suffix.removeprefix(".").lower()
        known = figure.canvas.get_supported_filetypes()
        if kind not in known:
            raise ArgumentError(
                f"{path} ends in {path.suffix or 'no suffix'!r}; expected one of "
                f"{', '.join('.' + name for name in sorted(known))}."
            )
        _draw(schedule, figure.add_subplot(), steps)
        with replacing(path, overwrite=overwrite) as part:
            figure.savefig(part, format=kind)


def _length(schedule: Schedule, steps: int | None) -> int:
    check_schedule("What is drawn is", schedule)
    steps = schedule.total if steps is None else steps
    if steps is None:
        raise ArgumentError(f"{schedule} never ends. Pass the number of steps to draw: steps=...")
    require(
        at_least_one("steps", steps) <= MOST_STEPS,
        f"steps is {steps}; a picture shows at most {MOST_STEPS}.",
    )
    return steps


def _draw(schedule: Schedule, ax: Axes, steps: int) -> None:
    for is_averaging, run in groupby(range(steps), schedule.is_averaging):
        label = AVERAGING if is_averaging else BASE
        color = colour_of(label)
        part = list(run)
        rates = [schedule(step) for step in part]
        ax.stairs(rates, [*part, part[-1] + 1], baseline=None, label=label, color=color, lw=1.8)
    if points := schedule.averaging_points(steps):
        used = [schedule(max(point - 1, 0)) for point in points]
        ax.plot(
            points, used, "o", color=colour_of(TAKEN), label=TAKEN, ms=6, mec="white", mew=0.9, zorder=3,
            clip_on=False,
        )  # fmt: skip
    ax.set(xlabel="completed steps", ylabel="learning rate", xlim=(0, steps), ylim=(0, None))
    legend_above(ax, order=(BASE, AVERAGING, TAKEN))
