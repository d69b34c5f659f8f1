"""The picture of a schedule, read back from the axes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from polyak import plot_schedule
from polyak.errors import ArgumentError, MissingExtra, OutputError
from polyak.report.drawing import BLUE, PURPLE
from polyak.report.schedule import save_schedule_plot
from polyak.schedules import Constant, Cosine, CyclicLinear, Sawtooth, chain

CYCLIC = CyclicLinear(high=0.05, low=0.01, cycle=10)
SCHEDULE = chain((50, Constant(0.1)), (50, Cosine(0.1, 0.01)), (40, CYCLIC))


@pytest.fixture
def ax():
    return Figure().add_subplot()


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_rate_of_step_i_lies_over_i_to_i_plus_1(ax):
    assert plot_schedule(SCHEDULE, ax) is ax
    base, averaging = (patch.get_data() for patch in ax.patches)
    np.testing.assert_array_equal(base.edges, np.arange(101))
    np.testing.assert_array_equal(averaging.edges, np.arange(100, 141))
    np.testing.assert_array_equal(base.values, [SCHEDULE(s) for s in range(100)])
    np.testing.assert_array_equal(averaging.values, [SCHEDULE(s) for s in range(100, 140)])


def test_a_marker_sits_at_the_rate_just_used(ax):
    plot_schedule(SCHEDULE, ax)
    (markers,) = ax.lines
    assert markers.get_xdata().tolist() == [100, 110, 120, 130, 140]
    assert markers.get_ydata().tolist() == [SCHEDULE(99), 0.01, 0.01, 0.01, 0.01]


def test_two_colours_and_three_names(ax):
    plot_schedule(SCHEDULE, ax)
    assert labels(ax) == ["Base LR schedule", "SWA LR schedule", "Averaged weights"]
    base, averaging = (tuple(patch.get_edgecolor()) for patch in ax.patches)
    assert (base, averaging) == (to_rgba(PURPLE), to_rgba(BLUE))
    assert ax.lines[0].get_color() == BLUE  # iterates, as those of the rate they were made at


def test_several_averaging_parts_are_named_once(ax):
    schedule = chain(
        (20, CYCLIC), (10, Constant(0.02)), (11, Sawtooth(high=0.05, low=0.01, cycle=5))
    )
    plot_schedule(schedule, ax)
    assert labels(ax) == ["Base LR schedule", "SWA LR schedule", "Averaged weights"]
    assert len(ax.patches) == 3


def test_no_averaging_part(ax):
    plot_schedule(Constant(0.1), ax, steps=5)
    assert labels(ax) == ["Base LR schedule"]
    assert ax.get_xlim() == (0, 5)


@pytest.mark.parametrize("steps", [None, 0, -3])
def test_a_length_is_needed(ax, steps):
    with pytest.raises(ArgumentError, match="steps"):
        plot_schedule(CYCLIC, ax, steps=steps)


def test_a_figure_of_its_own():
    import matplotlib.pyplot as plt

    ax = plot_schedule(SCHEDULE)
    assert labels(ax)
    plt.close(ax.figure)


def test_files(tmp_path):
    for name in ("a.png", "a.svg", "a.pdf"):
        save_schedule_plot(SCHEDULE, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(OutputError, match="exists"):
        save_schedule_plot(SCHEDULE, tmp_path / "a.png")
    with pytest.raises(ArgumentError, match=r"\.png"):
        save_schedule_plot(SCHEDULE, tmp_path / "a")


def test_without_matplotlib(ax, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'polyak\[report\]'"):
        plot_schedule(SCHEDULE, ax)
