"""Scores along lines, on planes and rays through checkpoints, against closed forms and slow twins."""

from __future__ import annotations

import csv
import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import polyak
from polyak.errors import (
    ArgumentError,
    MismatchError,
    NonFiniteError,
    OutputError,
    StaleStatistics,
    UsageError,
)
from polyak.report import plot_scan, save_scan
from polyak.study import connect, named_points, paired_bootstrap, scan_line, scan_plane, scan_rays
from polyak.study.directions import Directions
from polyak.study.frame import Frame, anchors_of
from polyak.study.landscape import Plane

CURVATURES = torch.tensor([1.0, 4.0, 9.0, 0.5], dtype=torch.float64)


def state(*values, dtype=torch.float64):
    w = torch.tensor(values, dtype=dtype)
    return {"a": w[:2].clone(), "b": w[2:].reshape(1, 2).clone(), "steps": torch.tensor(7)}


def flat(weights):
    return torch.cat([weights["a"].double(), weights["b"].double().reshape(-1)])


def bowl(weights):
    return float((CURVATURES * flat(weights).square()).sum())


def wavy(weights):
    """One score per example: a barrier in the middle, which each example sees a little differently."""
    w, n = flat(weights), torch.arange(40, dtype=torch.float64)
    return torch.sin(3 * w[0] + 0.02 * n) + w.square().sum() * (1 + 0.1 * torch.cos(n))


@pytest.fixture
def three():
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    return {name: state(*row.tolist()) for name, row in zip("abcd", points, strict=True)}


def two(points):
    return {name: points[name] for name in "ab"}


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def trained(seed):
    """A state of `normed` with statistics of its own."""
    model = normed()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model(torch.randn(64, 3) * (seed + 1))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


BATCHES = [torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2)]


def output_loss(model):
    return model(BATCHES[0]).square().sum(1)


# The line


def test_a_line_equals_the_closed_form_beyond_both_ends(three):
    found = scan_line(two(three), bowl, minimize=True, points=5, beyond=0.5)
    assert found.positions.tolist() == [-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    a, b = flat(three["a"]), flat(three["b"])
    expected = [float((CURVATURES * (a + t * (b - a)) ** 2).sum()) for t in found.positions]
    np.testing.assert_allclose(found.values, expected, rtol=1e-13)
    np.testing.assert_allclose(found.distances, found.positions * float((b - a).norm()), rtol=1e-12)
    assert found.barriers[0].height == 0  # a bowl is convex


def test_the_ends_are_the_checkpoints_to_the_bit():
    ends = {name: {"w": torch.randn(5), "half": torch.randn(4).bfloat16()} for name in "ab"}
    seen = []
    scan_line(
        ends,
        lambda w: seen.append({n: t.clone() for n, t in w.items()}) or 0.0,
        minimize=True,
        points=3,
    )
    for name, got in zip("ab", seen[:2], strict=True):  # they are evaluated first
        assert torch.equal(got["w"], ends[name]["w"])
        assert torch.equal(got["half"], ends[name]["half"].float())
    middle = (ends["a"]["half"].double() + ends["b"]["half"].double()) / 2
    assert torch.equal(seen[2]["half"], middle.float())  # small steps are not rounded away


def test_a_barrier_is_chosen_on_one_half_and_measured_on_the_other(three):
    found = scan_line(two(three), wavy, minimize=True, points=9)
    a, b = flat(three["a"]), flat(three["b"])
    t = np.linspace(0, 1, 9)
    rows = torch.stack([wavy(state(*(a + float(p) * (b - a)).tolist())) for p in t])
    chord = torch.from_numpy((1 - t)[:, None]) * rows[0] + torch.from_numpy(t[:, None]) * rows[-1]
    above = rows - chord
    barrier = found.barriers[0]
    assert barrier.height == pytest.approx(max(0, float(above.mean(1).max())), abs=1e-12)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    held, choosing = order[:20], order[20:]
    top = 1 + int(above[1:-1, choosing].mean(1).argmax())
    assert barrier.chosen == t[top]
    assert barrier.at == t[1 + int(above[1:-1].mean(1).argmax())]
    expected = paired_bootstrap(rows[top, held], chord[top, held])
    np.testing.assert_allclose(
        (barrier.difference, barrier.low, barrier.high), expected, atol=1e-12
    )
    assert "95% interval" in str(found)


def test_of_accuracy_a_barrier_is_where_it_drops():
    ends = {"a": {"w": torch.tensor([-1.0])}, "b": {"w": torch.tensor([1.0])}}

    def accuracy(w):
        return 0.5 + 0.4 * float(w["w"].square())

    found = scan_line(ends, accuracy, points=5)
    assert not found.minimize
    assert (found.barriers[0].height, found.barriers[0].at) == (pytest.approx(0.4), 0.5)
    assert found.barriers[0].low is None  # one number has no interval


def test_a_way_through_several_has_a_barrier_for_each_segment(three):
    found = scan_line(three, wavy, minimize=True, points=9)
    assert found.names == ("a", "b", "c", "d")
    assert len(found.barriers) == 3
    assert len(found.values) == 3 * 8 + 1 == found.evaluations
    alone = scan_line({"b": three["b"], "c": three["c"]}, wavy, minimize=True, points=9)
    assert found.barriers[1] == alone.barriers[0]


def test_a_curve_is_followed_instead(three):
    found = scan_line(two(three), bowl, curve=three["c"], minimize=True, points=5)
    a, b, c = (flat(three[name]) for name in "abc")
    points = [(1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b for t in found.positions]
    expected = [float((CURVATURES * p**2).sum()) for p in points]
    np.testing.assert_allclose(found.values, expected, rtol=1e-12)
    assert found.names == ("a", "b")
    lengths = np.cumsum([0, *(float((q - p).norm()) for p, q in itertools.pairwise(points))])
    np.testing.assert_allclose(found.distances, lengths, rtol=1e-9)


def test_integers_and_statistics_are_those_of_the_nearest_checkpoint():
    ends = [trained(1), trained(2)]
    ends[1]["1.num_batches_tracked"].fill_(9)
    seen = []
    with pytest.warns(StaleStatistics, match="nearest checkpoint") as caught:
        scan_line(ends, lambda w: seen.append(dict(w)) or 0.0, minimize=True, points=5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    order = sorted(seen, key=lambda w: float((w["0.weight"] - ends[0]["0.weight"]).norm()))
    for index, got in enumerate(order):
        nearest = ends[0] if index <= 2 else ends[1]
        for name in ("1.running_var", "1.num_batches_tracked"):
            assert torch.equal(got[name], nearest[name])


@pytest.mark.parametrize("kind", ["line", "plane", "rays"])
def test_statistics_are_measured_at_each_point(kind):
    states = {str(seed): trained(seed) for seed in (1, 2, 3)}
    model = normed()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []

    def loss(m):
        assert not m.training
        seen.append({n: t.clone() for n, t in m.state_dict().items()})
        return output_loss(m)

    scan = {"line": scan_line, "plane": scan_plane, "rays": scan_rays}[kind]
    options = {"rays": 2} if kind == "rays" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan(states, loss, model=model, data=BATCHES, minimize=True, points=3, **options)
    twin = normed()
    for got in seen:
        twin.load_state_dict(got)
        polyak.update_bn(twin, BATCHES)
        torch.testing.assert_close(twin[1].running_var, got["1.running_var"])
    assert all(torch.equal(t, own[n]) for n, t in model.state_dict().items())
    assert model.training


# The plane


def test_a_plane_equals_the_one_of_vectors(three):
    found = scan_plane(three, bowl, minimize=True, points=4, margin=0.1)
    plane = Plane.through(*(flat(three[name]) for name in "abc"))
    expected = [
        [float((CURVATURES * plane.point(x, y) ** 2).sum()) for x in found.x] for y in found.y
    ]
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)
    for name, weights in three.items():
        x, y, distance = plane.project(flat(weights))
        np.testing.assert_allclose(found.points[name], [[x, y]], atol=1e-9)
        assert found.distance[name] == pytest.approx(distance, abs=1e-6)
    assert found.distance["d"] > 0.1
    assert "off the plane" in str(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_three_points_on_a_line_are_no_plane_in_any_dtype(dtype, offset):
    generator = torch.Generator().manual_seed(0)
    a, b = offset + torch.randn(2, 500, generator=generator, dtype=torch.float64)
    points = [{"w": w.to(dtype)} for w in (a, b, 0.3 * a + 0.7 * b)]
    with pytest.raises(ArgumentError, match=r"point 1, point 2 and point 3 are on one line"):
        scan_plane(points, lambda w: 0.0, minimize=True)


def test_points_that_are_nearly_on_a_line_are_one():
    generator = torch.Generator().manual_seed(0)
    a, b, off = torch.randn(3, 500, generator=generator)
    points = [{"w": w} for w in (a, b, (a + b) / 2 + 1e-4 * off)]
    assert scan_plane(points, lambda w: 0.0, minimize=True, points=3).values.shape == (3, 3)


# Rays


def direction(ray=0, normalize=None, model=None, seed=0):
    model = model or normed()
    frame = Frame(anchors_of({"m": model.state_dict()}), model)
    return Directions(frame, normalize, seed).direction(ray, 0)


def test_directions_are_unit_vectors_of_the_parameters():
    model = normed()
    model.register_buffer("table", torch.ones(3))  # a float buffer does not train
    found = direction(model=model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    total = torch.cat([d.reshape(-1) for d in found.values()])
    assert float(total.norm()) == pytest.approx(1, abs=1e-12)
    assert not torch.equal(direction(1)["0.weight"], found["0.weight"])
    assert torch.equal(direction()["0.weight"], found["0.weight"])
    assert not torch.equal(direction(seed=1)["0.weight"], found["0.weight"])


@pytest.mark.parametrize("model", [normed(), nn.Conv2d(2, 3, 2), nn.ConvTranspose1d(2, 3, 2)])
def test_filters_are_as_long_as_those_of_the_weights(model):
    with torch.no_grad():
        next(model.parameters())[1] = 0.0  # a dead filter stays dead
    found = direction(normalize="filter", model=model)
    weights = dict(model.named_parameters())
    assert set(found) == {name for name, w in weights.items() if w.ndim > 1}
    for name, d in found.items():
        w = weights[name].detach().double()
        torch.testing.assert_close(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))


def test_rays_share_their_directions_and_measure_a_centre_once(three):
    calls = []
    found = scan_rays(
        two(three),
        lambda w: calls.append(1) or bowl(w),
        minimize=True,
        rays=3,
        points=4,
        reach=1.5,
    )
    assert len(calls) == found.evaluations == 2 * (1 + 3 * 3)
    # Along d the bowl is f(c) + 2 r <Hc, d> + r^2 <d, Hd>; the last part is the same from each centre.
    curves = [
        np.polyfit(found.distances, row, 2)[0] for rows in found.values.values() for row in rows
    ]
    np.testing.assert_allclose(curves[:3], curves[3:], rtol=1e-9)
    assert found.distances.tolist() == [0, 0.5, 1, 1.5]
    usual = scan_rays(two(three), bowl, minimize=True, rays=1, points=2)
    assert usual.distances[-1] == pytest.approx(0.6 * float(flat(three["a"]).norm()))


# A record


@pytest.fixture
def record(tmp_path):
    model = nn.Linear(3, 2)
    torch.manual_seed(1)
    with polyak.Recorder(model, tmp_path / "record", interval=10) as recorder:
        for step in range(80):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter) + 0.02 * step / 80)
            recorder.update()
    return polyak.Trajectory(tmp_path / "record")


def size(weights):
    return float(sum(t.square().sum() for t in weights.values()))


def test_points_of_a_record_by_name(record):
    found = named_points(record, ["first", "last", "mean", "window:length=20@40", "mean@20"])
    rows = [named_points(record, [f"swa:start={s}@{s + 10}"]) for s in range(0, 80, 10)]
    means = torch.stack([next(iter(row.values()))["weight"] for row in rows])
    for name, expected in {
        "first": means[0], "last": means[-1], "mean": means.mean(0),
        "window:length=20@40": means[2:4].mean(0), "mean@20": means[:2].mean(0),
    }.items():  # fmt: skip
        torch.testing.assert_close(found[name]["weight"], expected)


@pytest.mark.parametrize("name", ["means", "mean20"])
def test_names_that_only_begin_like_the_mean_are_refused(record, name):
    with pytest.raises(ArgumentError, match=name):
        named_points(record, ["last", name])


def test_the_plane_of_a_record_is_that_of_its_leading_directions(record):
    found = scan_plane(record, size, minimize=True, points=3)
    states = [named_points(record, [f"swa:start={s}@{s + 10}"]) for s in range(0, 80, 10)]
    rows = np.stack([
        np.concatenate([t.double().numpy().ravel() for t in next(iter(one.values())).values()])
        for one in states
    ])  # fmt: skip
    centre = rows.mean(0)
    left, scale, right = np.linalg.svd(rows - centre, full_matrices=False)
    sign = np.sign(left[-1, :2])
    np.testing.assert_allclose(found.points["intervals"], left[:, :2] * scale[:2] * sign, atol=1e-7)
    assert found.explained == pytest.approx((scale[:2] ** 2).sum() / (scale**2).sum())
    at = centre + sign[0] * found.x[0] * right[0] + sign[1] * found.y[-1] * right[1]
    assert found.values[-1, 0] == pytest.approx(float((at**2).sum()), rel=1e-5)
    off = rows - centre - left[:, :2] * scale[:2] @ right[:2]
    assert found.distance["intervals"] == pytest.approx(np.linalg.norm(off, axis=1).max())


def test_a_record_s_scores_are_kept_beside_it(record):
    first = scan_line(record, size, minimize=True, points=5)
    again = scan_line(record, size, minimize=True, points=9)
    assert (first.names, first.evaluations) == (("last", "mean"), 5)
    assert (again.evaluations, again.cached) == (4, 5)


@pytest.mark.parametrize(
    ("steps", "message"),
    [(20, "has 2 intervals; a plane of its own needs 3"), (50, "on one line")],
)
def test_a_record_that_is_short_or_goes_straight_has_no_plane(tmp_path, steps, message):
    model = nn.Linear(1, 1)
    with polyak.Recorder(model, tmp_path / "record", interval=10) as recorder:
        for value in range(steps):
            nn.init.constant_(model.weight, value)
            recorder.update()
    with pytest.raises(ArgumentError, match=message):
        scan_plane(polyak.Trajectory(tmp_path / "record"), size, minimize=True)


# What is kept, and what goes wrong


def failing_once(weights):
    marker = Path("failed")
    if len(list(Path("kept").glob("*.json"))) == 4 and not marker.exists():
        marker.touch()
        raise OSError("the disk is gone")
    return bowl(weights)


def test_a_scan_continues_after_a_failure(three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"minimize": True, "points": 9, "cache": "kept"}
    with pytest.raises(
        UsageError, match=r"the disk is gone.*4 scores are kept: the same scan continues"
    ):
        scan_line(two(three), failing_once, **options)
    found = scan_line(two(three), failing_once, **options)
    assert (found.evaluations, found.cached) == (5, 4)


def test_points_without_a_score_are_said_and_left_blank(three, tmp_path):
    def diverges(weights):
        return float("nan") if flat(weights)[0] > flat(three["a"])[0] + 1e-9 else bowl(weights)

    # The second and third checkpoints are where it has values.
    points = {
        "b": three["a"],
        "c": state(*(flat(three["a"]) - 1).tolist()),
        "d": state(*(flat(three["a"]) * torch.tensor([1, 2, 3, 4])).tolist()),
    }
    found = scan_plane(points, diverges, minimize=True, points=5)
    assert np.isnan(found.values).any()
    assert np.isfinite(found.values).any()
    assert "points have no finite score" in str(found)
    save_scan(found, tmp_path / "plane.json")
    said = json.loads((tmp_path / "plane.json").read_text())
    assert None in {v for row in said["values"] for v in row}
    save_scan(found, tmp_path / "plane.svg")


@pytest.mark.parametrize("lost", ["nan", "inf"])
@pytest.mark.parametrize("scan", [scan_line, scan_rays])
def test_a_scan_that_has_scores_at_its_checkpoints_only_is_told_and_saved(
    three, tmp_path, scan, lost
):
    known = [flat(weights) for weights in three.values()]

    def nowhere_else(weights):
        return 1.0 if any(torch.equal(flat(weights), one) for one in known) else float(lost)

    found = scan(three, nowhere_else, minimize=True, points=3)
    assert "points have no finite score" in str(found)
    for kind in (".json", ".csv", ".svg"):
        save_scan(found, tmp_path / f"scan{kind}")


@pytest.mark.parametrize("count", [6, 11])
def test_every_checkpoint_is_in_the_picture(three, count):
    more = {f"more {n}": state(*(flat(three["a"]) * n).tolist()) for n in range(count - 3)}
    from matplotlib.figure import Figure

    plot_scan(scan_plane(three | more, bowl, minimize=True, points=3), ax := Figure().add_subplot())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [*three, *more]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_tied_tensor_is_one_under_all_the_names_that_files_give_it(tmp_path, suffix):
    """A torch archive says what is tied; in other files it is there twice, or under either name."""
    models = [Tied() for _ in range(3)]
    torch.save(models[0].state_dict(), tmp_path / "tied.pt")
    twice = {name: tensor.clone() for name, tensor in models[1].state_dict().items()}
    second = {
        name: t.clone() for name, t in models[2].state_dict().items() if name != "first.weight"
    }
    for name, weights in (("twice", twice), ("second", second)):
        write = save_file if suffix == ".safetensors" else torch.save
        write(weights, tmp_path / f"{name}{suffix}")
    paths = [tmp_path / "tied.pt", tmp_path / f"twice{suffix}", tmp_path / f"second{suffix}"]

    def value(model):
        return model(torch.ones(1, 3)).sum().item()

    found = scan_line(paths, value, minimize=True, model=Tied(), points=3)
    assert found.values[::2].tolist() == [value(model) for model in models]
    curve = connect(
        paths[:2], Tied(), lambda model, _: model(torch.ones(1, 3)).square().sum(), [0], epochs=1
    )
    curve.save(tmp_path / "bend.pt")
    scan_line(paths[:2], value, minimize=True, model=Tied(), points=3, curve=tmp_path / "bend.pt")
    write({**twice, "first.weight": twice["first.weight"] + 1}, tmp_path / f"apart{suffix}")
    with pytest.raises(MismatchError, match="is one tensor in the model"):
        scan_line([paths[0], tmp_path / f"apart{suffix}"], value, minimize=True, model=Tied())


def test_a_large_seed_is_one_too(three):
    found = [scan_rays([three["a"]], bowl, minimize=True, rays=2, seed=n) for n in (0, 2**63 - 1)]
    assert not np.array_equal(*(one.values["point 1"] for one in found))


def test_a_path_through_infinity_is_an_infinite_barrier(three):
    a, b = flat(three["a"]), flat(three["b"])
    middle = (a + b) / 2

    def wall(weights):
        return torch.full((40,), float("inf" if (flat(weights) - middle).norm() < 0.1 else 1.0))

    barrier = scan_line(two(three), wall, minimize=True, points=5).barriers[0]
    assert (barrier.height, barrier.at, barrier.low) == (float("inf"), 0.5, None)


@pytest.mark.parametrize("points", [(11, 21), (4, 7), (6, 16)])
def test_a_finer_scan_evaluates_only_what_is_new(three, tmp_path, points):
    coarse, fine = points
    for scan, inputs, options in (
        (scan_line, two(three), {}),
        (scan_line, three, {"beyond": 0.2}),
        (scan_rays, two(three), {"rays": 2}),
    ):
        how = {"minimize": True, "cache": tmp_path / str(len(options)), "name": "bowl", **options}
        first = scan(inputs, bowl, points=coarse, **how)
        again = scan(inputs, bowl, points=fine, **how)
        known = first.positions.size if scan is scan_line else first.evaluations
        assert again.cached >= known - (2 if "beyond" in options else 0)


def test_a_plane_without_any_score_is_not_drawn(three):
    inside = {flat(w)[0].item() for w in three.values()}
    with pytest.raises(NonFiniteError, match="None of the 9 points"):
        scan_plane(
            three, lambda w: 1.0 if flat(w)[0].item() in inside else float("nan"), minimize=True, points=3
        )  # fmt: skip


def test_tied_weights_count_once_and_move_together():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    ends = {}
    for name in "ab":
        nn.init.normal_(model[0].weight)
        ends[name] = {
            n: t.clone() if n == "0.weight" else None for n, t in model.state_dict().items()
        }
        ends[name]["1.weight"] = ends[name]["0.weight"]
    apart = {name: {"1.weight": w["1.weight"]} for name, w in ends.items()}  # under the other name

    def size(m):
        assert m[0].weight is m[1].weight
        return m[1].weight.square().sum()

    for inputs in (ends, apart):
        found = scan_line(inputs, size, model=model, minimize=True, points=3)
        length = float((ends["b"]["0.weight"] - ends["a"]["0.weight"]).norm())
        assert found.distances[-1] == pytest.approx(length, rel=1e-6)
        rays = scan_rays(inputs, size, model=model, minimize=True, points=2, rays=1)
        assert rays.values["a"][0, 0] != rays.values["a"][0, 1]


def test_checkpoints_of_other_dtypes_line_up():
    torch.manual_seed(0)
    ends = [
        {"w": torch.randn(4, dtype=d), "c": torch.randn(2, dtype=torch.complex64)}
        for d in (torch.float32, torch.bfloat16)
    ]
    found = scan_line(
        ends, lambda w: w["w"].square().sum() + w["c"].abs().square().sum(), minimize=True, points=3
    )
    middle = (ends[0]["w"].double() + ends[1]["w"].double()) / 2
    also = (ends[0]["c"] + ends[1]["c"]) / 2
    assert found.values[1] == pytest.approx(
        float(middle.square().sum() + also.abs().square().sum()), rel=1e-5
    )


def other(**changes):
    return {**state(1, 2, 3, 4), **changes}


@pytest.mark.parametrize(
    ("scan", "points", "options", "error", "message"),
    [
        (scan_line, [state(1, 2, 3, 4)], {}, ArgumentError, "There is 1 checkpoint; a line needs two"),
        (scan_line, [], {}, ArgumentError, "There are no checkpoints; a line"),
        (scan_line, [state(1, 2, 3, 4), state(1, 2, 3, 4)], {}, ArgumentError, "are the same weights"),
        (scan_line, "a.pt", {}, ArgumentError, "inputs is a str; expected checkpoints"),
        (scan_line, [state(1, 2, 3, 4), 3], {}, ArgumentError, "point 2 is a int; expected the path"),
        (scan_line, ["nowhere.pt", "x.pt"], {}, ArgumentError, "nowhere.pt"),
        (scan_line, [state(1, 2, 3, 4), other(a=torch.ones(3))], {}, MismatchError, r"a: \[3\] numbers, expected \[2\]"),
        (scan_line, [state(1, 2, 3, 4), {"a": torch.ones(2)}], {}, MismatchError, r"missing \(2\): b, steps"),
        (scan_line, [state(1, 2, 3, 4), other(steps=torch.tensor(1.5))], {}, MismatchError, "steps"),
        (scan_line, [state(1, 2, 3, 4), state(1, 2, 3, float("nan"))], {}, NonFiniteError, "point 2 holds NaN"),
        (scan_line, [{"n": torch.tensor(1)}, {"n": torch.tensor(2)}], {}, ArgumentError, "no weights of floating point"),
        (scan_line, [state(1, 2, 3, 4), state(2, 3, 4, 5)], {"points": 2}, ArgumentError, "points is 2"),
        (scan_line, [state(1, 2, 3, 4), state(2, 3, 4, 5)], {"beyond": -1}, ArgumentError, "beyond is -1"),
        (scan_line, [state(1, 2, 3, 4), state(2, 3, 4, 5), state(9, 2, 3, 4)], {"curve": state(0, 0, 0, 0)}, ArgumentError, "A curve goes between two"),
        (scan_line, [state(1, 2, 3, 4), state(2, 3, 4, 5)], {"model": nn.Linear(2, 2)}, MismatchError, "no weights of this model"),
        (scan_plane, [state(1, 2, 3, 4), state(2, 3, 4, 5)], {}, ArgumentError, "There are 2 checkpoints; a plane needs three"),
        (scan_plane, [state(1, 2, 3, 4), state(1, 2, 3, 4), state(0, 1, 0, 0)], {}, ArgumentError, "point 1 and point 2 are the same"),
        (scan_plane, [state(1, 2, 3, 4), state(0, 1, 0, 0), state(1, 2, 3, 4)], {}, ArgumentError, "point 1 and point 3 are the same"),
        (scan_plane, [state(1, 2, 3, 4), state(0, 1, 0, 0), state(0, 1, 0, 0)], {}, ArgumentError, "point 2 and point 3 are the same"),
        (scan_plane, [state(1, 2, 3, 4), state(0, 1, 0, 0), state(1, 0, 1, 0)], {"margin": float("nan")}, ArgumentError, "margin"),
        (scan_line, {1: state(1, 2, 3, 4), "1": state(2, 3, 4, 5)}, {}, ArgumentError, "read alike"),
        (scan_rays, [state(1, 2, 3, 4)], {"seed": 1.5}, ArgumentError, "seed is 1.5"),
        (scan_rays, [state(1, 2, 3, 4)], {"seed": 2**63}, ArgumentError, "seed is too large"),
        (scan_line, [state(1, 2, 3, 4), state(2, 3, 4, 5)], {"beyond": float("inf")}, ArgumentError, "beyond is inf"),
        (scan_line, [state(1, 2, 3, 4), state(2, 3, 4, 5)], {"holdout": 2}, ArgumentError, "holdout is 2"),
        (scan_rays, [], {}, ArgumentError, "There is no checkpoint"),
        (scan_rays, [state(1, 2, 3, 4)], {"reach": 0}, ArgumentError, "reach is 0"),
        (scan_rays, [state(1, 2, 3, 4)], {"rays": 0}, ArgumentError, "rays is 0"),
        (scan_rays, [state(1, 2, 3, 4)], {"normalize": "layer"}, ArgumentError, "normalize is 'layer'"),
        (scan_rays, [{"w": torch.ones(3)}], {"normalize": "filter"}, ArgumentError, "No tensor has two or more"),
    ],
)  # fmt: skip
def test_what_is_refused(scan, points, options, error, message):
    calls = []
    with pytest.raises(error, match=message):
        scan(points, lambda w: calls.append(1) or 0.0, minimize=True, **options)
    assert not calls


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.full((4,), float("nan"))])
@pytest.mark.parametrize("scan", [scan_line, scan_plane, scan_rays])
def test_a_checkpoint_without_a_score_ends_it_at_once(three, scan, value):
    calls = []
    with pytest.raises(NonFiniteError, match=r"The score of a is (nan|inf)"):
        scan(three, lambda w: calls.append(1) or value, minimize=True)
    assert len(calls) == 1


# Files and pictures


@pytest.fixture(params=["line", "plane", "rays"])
def scan(request, three):
    if request.param == "line":
        return scan_line(three, wavy, minimize=True, points=5)
    if request.param == "plane":
        return scan_plane(three, wavy, minimize=True, points=4)
    return scan_rays(two(three), wavy, minimize=True, rays=2, points=3)


def test_a_scan_as_files(scan, tmp_path):
    for suffix in (".json", ".csv", ".svg", ".png"):
        save_scan(scan, tmp_path / f"scan{suffix}")
    said = json.loads((tmp_path / "scan.json").read_text())
    assert said["kind"] == type(scan).__name__
    values = scan.values if isinstance(scan.values, dict) else {"": scan.values}
    rows = list(csv.reader((tmp_path / "scan.csv").read_text().splitlines()))
    assert len(rows) == 1 + sum(v.size for v in values.values())
    assert float(rows[-1][-1]) == float(list(values.values())[-1].ravel()[-1])  # every digit
    assert "<svg" in (tmp_path / "scan.svg").read_text()
    with pytest.raises(OutputError, match="exists"):
        save_scan(scan, tmp_path / "scan.json")
    with pytest.raises(ArgumentError, match=r"ends in '.gif'; expected .json, .csv"):
        save_scan(scan, tmp_path / "scan.gif")


def test_a_scan_into_the_axes_of_another_figure(scan):
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    plot_scan(scan, ax, ylabel="loss")
    legend = ax.get_legend()
    assert "loss" in (ax.get_ylabel(), legend and legend.get_title().get_text())


@pytest.mark.parametrize("value", [0.0, 2.5, -1e9])
def test_a_flat_plane_is_drawn(three, value):
    from matplotlib.figure import Figure

    for more in ({"minimize": True}, {"maximize": True}):
        flat_plane = scan_plane(three, lambda w: value, points=3, **more)
        plot_scan(flat_plane, Figure().add_subplot())


class OnFile:
    """An evaluation that reads a file, as `Command` does."""

    takes_file = True
    minimize = True

    def __call__(self, path):
        with polyak.open_checkpoint(path) as opened:
            return opened.tensors["1.running_var"].load().sum()


def test_a_file_has_statistics_of_its_own_too():
    ends = {"a": trained(1), "b": trained(2)}
    found = scan_line(ends, OnFile(), model=normed(), data=BATCHES, points=3)

    def variance(model):
        return model[1].running_var.sum()

    inside = scan_line(ends, variance, model=normed(), data=BATCHES, minimize=True, points=3)
    np.testing.assert_allclose(found.values, inside.values, rtol=1e-6)
