"""Each picture is a function of plain arrays that draws on the `ax` it is given."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from polyak.report import figures
from polyak.report.drawing import Picture, draw
from polyak.study.paired import Estimate


@pytest.fixture
def ax():
    return Figure().add_subplot()


def line(ax, label):
    found = [drawn for drawn in ax.get_lines() if drawn.get_label() == label]
    assert len(found) == 1, [drawn.get_label() for drawn in ax.get_lines()]
    return found[0].get_xydata()


def test_rates_and_averaged_weights(ax):
    rates = {"SGD": ([1, 2, 3], [0.1, 0.1, 0.05]), "iterate, SWA arm": ([3], [0.1])}
    figures.plot_rates(ax, rates, {"averaged weights": ([2, 3], [0.1, 0.1])})
    assert line(ax, "SGD").tolist() == [[1, 0.1], [2, 0.1], [3, 0.05]]
    assert line(ax, "averaged weights").tolist() == [[2, 0.1], [3, 0.1]]


def test_the_budget_draws_means_bands_and_where_annealed_runs_end(ax):
    x = np.array([1.0, 2.0])
    band = figures.Band(x, np.array([14.0, 12.0]), x + 9, x + 14)
    ended = figures.Band(x, np.array([15.0, 11.0]), x, x)
    figures.plot_budget(ax, {"its EMA": band}, {"annealed": ended}, ylabel="error", ylim=(5, 20))
    assert line(ax, "its EMA").tolist() == [[1, 14.0], [2, 12.0]]
    assert ax.get_lines()[-2].get_xydata().tolist() == [[2, 11.0]]
    assert ax.get_lines()[-1].get_ydata() == [11.0, 11.0]
    assert len(ax.collections) == 1


def test_history_with_what_sgd_ends_with(ax):
    curves = {"SWA": figures.Curve([1, 2], [14.0, 13.0])}
    figures.plot_history(ax, curves, ylabel="error", reference=13.7, ylim=(10, 20))
    assert line(ax, "SWA").tolist() == [[1, 14.0], [2, 13.0]]
    assert line(ax, "SGD at the end")[:, 1].tolist() == [13.7, 13.7]
    assert ax.get_ylim() == (10, 20)


def test_reliability_leaves_bins_of_few_out(ax):
    figures.plot_reliability(ax, [0.3, 0.5, 0.9], [0.0, 0.4, 0.8], [5, 10, 25], name="SGD")
    assert line(ax, "SGD").tolist() == [[0.5, 0.4], [0.9, 0.8]]
    assert [bar.get_height() for bar in ax.patches] == [0.125, 0.25, 0.625]


def test_line_marks_both_ends_where_they_are(ax):
    figures.plot_line(ax, [-1, 0, 1, 2], [4.0, 1.0, 3.0, 9.0], ylabel="", ends=("SGD", "SWA"))
    assert line(ax, "SGD").tolist() == [[0, 1.0]]
    assert line(ax, "SWA").tolist() == [[1, 3.0]]


def test_rays_draw_each_ray_and_their_mean(ax):
    figures.plot_rays(ax, [0, 1], {"SGD": np.array([[0.0, 1.0], [0.0, 3.0]])}, ylabel="")
    assert line(ax, "SGD").tolist() == [[0, 0], [1, 2.0]]
    assert len(ax.get_lines()) == 3


def test_segments_join_at_the_checkpoints(ax):
    values = np.array([[1.0, 2.0, 1.5], [1.5, 1.0, 1.2]])
    figures.plot_segments(ax, [0, 0.5, 1], values, ["30", "31", "32"], ylabel="")
    dots = ax.get_lines()[-1].get_xydata().tolist()
    assert dots == [[0, 1.0], [1, 1.5], [2, 1.2]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["30", "31", "32"]


def test_plane_marks_its_points(ax):
    path = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]])
    points = {"averaged weights": path, "SWA": np.array([[0.5, 0.3]])}
    grid = np.add.outer(np.arange(3.0), np.arange(4.0))
    figures.plot_plane(ax, range(4), range(3), grid, points, title="loss")
    assert line(ax, "averaged weights").tolist() == path.tolist()
    assert line(ax, "SWA").tolist() == [[0.5, 0.3]]


def test_a_flat_plane_is_drawn_too(ax):
    figures.plot_plane(ax, [0, 1], [0, 1], np.ones((2, 2)), {}, title="")


def test_results_of_runs_leave_out_what_a_run_lacks(ax):
    values = {"a": [Estimate(1.0, 0.1, 3), None], "b": [Estimate(2.0, None, 1)] * 2}
    figures.plot_results(ax, ["SGD", "SWA"], values, xlabel="error")
    drawn = [container[0].get_xdata().tolist() for container in ax.containers]
    assert drawn == [[1.0], [2.0, 2.0]]


def test_a_picture_drawn_for_the_page():
    picture = Picture("dots", "dots", lambda ax: ax.plot([0, 1], [0, 1], label="a & b"))
    drawing = draw(picture, "p7-")
    assert drawing.svg.startswith("<svg ")
    assert "currentColor" in drawing.svg
    assert "<metadata" not in drawing.svg
    assert 'id="p7-' in drawing.svg
    opening = drawing.svg.split(">", 1)[0]
    assert "viewBox" in opening
    assert " height=" not in opening  # the page sets the width, the height follows
    assert draw(picture, "p7-").svg == drawing.svg
