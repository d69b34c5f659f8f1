"""Lines, rays, segments and planes against closed forms and slow twins; the model is restored."""

import itertools

import numpy as np
import pytest
import torch
from reference import landscape as slow
from torch import nn

from polyak.errors import ArgumentError, MismatchError, NonFiniteError, UsageError
from polyak.study.frame import Anchor
from polyak.study.landscape import Plane, along_line, along_rays, along_segments, on_plane
from polyak.study.surface import Surface

CURVATURES = np.array([1.0, 4.0, 9.0, 0.5, 2.0])


class Bowl(nn.Module):
    """Five float64 parameters in two tensors: loss = sum of curvature * w^2."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.arange(3, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))

    def forward(self):
        w = torch.cat([self.a, self.b.reshape(-1)])
        return (torch.from_numpy(CURVATURES) * w.square()).sum()


def bowl_loss(w):
    return float((CURVATURES * w**2).sum())


def wavy_loss(w):
    return bowl_loss(w) + 30 * float(np.sin(4 * w[0]))


def measure_bowl(model):
    return {"loss": float(model())}


def measure_wavy(model):
    return {"loss": float(model()) + 30 * float(torch.sin(4 * model.a[0]))}


@pytest.fixture
def points():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 5, generator=generator, dtype=torch.float64)


def test_line_equals_the_closed_form_beyond_both_ends(points):
    positions = np.linspace(-0.5, 1.5, 9)
    with Surface(Bowl(), measure_bowl) as surface:
        line = along_line(surface, points[0], points[1], positions)
    expected = slow.line(bowl_loss, points[0].numpy(), points[1].numpy(), positions)
    np.testing.assert_allclose(line.values["loss"], expected, rtol=1e-12)
    assert line.length == pytest.approx(np.linalg.norm(points[1] - points[0]))


def test_rays_leave_along_unit_directions_shared_by_all_centres(points):
    # At 0 the bowl along d is r^2 * c(d); the same c must come back from another centre's
    # second difference, f(r) - 2 f(0) + f(-r) = 2 r^2 c(d), only if the directions are the same.
    distances = [-1.5, 0.0, 1.5]
    with Surface(Bowl(), measure_bowl) as surface:
        at_zero = along_rays(surface, torch.zeros(5, dtype=torch.float64), distances, n_rays=6)
        elsewhere = along_rays(surface, points[0], distances, n_rays=6)
    curvature = at_zero.values["loss"][:, 2] / 1.5**2
    second = elsewhere.values["loss"] @ np.array([1.0, -2.0, 1.0]) / (2 * 1.5**2)
    np.testing.assert_allclose(second, curvature, rtol=1e-10)
    assert ((curvature > 0.5) & (curvature < 9)).all()  # a unit direction's mean of curvatures
    assert len(set(curvature.round(9))) == 6


def test_rays_measure_their_common_centre_once(points):
    calls = []
    with Surface(Bowl(), lambda model: {"n": float(len(calls.append(0) or calls))}) as surface:
        rays = along_rays(surface, points[0], [-1.0, 0.0, 1.0], n_rays=4)
    assert len(calls) == 4 * 2 + 1
    assert rays.values["n"][:, 1].tolist() == [1.0] * 4
    assert sorted(rays.values["n"][:, [0, 2]].ravel()) == list(range(2, 10))


def test_rays_leave_the_global_random_state(points):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with Surface(Bowl(), measure_bowl) as surface:
        along_rays(surface, points[0], [0.0, 1.0], n_rays=2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_segments_have_no_barrier_in_a_bowl_and_the_twin_s_over_waves(points):
    with Surface(Bowl(), measure_bowl) as surface:
        segments = along_segments(surface, points, n_inner=5)
    assert segments.values["loss"].shape == (3, 7)
    np.testing.assert_allclose(segments.barriers("loss"), 0, atol=1e-12)
    with Surface(Bowl(), measure_wavy) as surface:
        segments = along_segments(surface, points, n_inner=199)
    ends = points.numpy()
    expected = [slow.barrier(wavy_loss, a, b) for a, b in itertools.pairwise(ends)]
    np.testing.assert_allclose(segments.barriers("loss"), expected, atol=2e-2)
    assert max(expected) > 0.5


def test_segments_measure_a_shared_end_once(points):
    calls = []
    with Surface(Bowl(), lambda model: {"n": float(len(calls.append(0) or calls))}) as surface:
        segments = along_segments(surface, points, n_inner=1)
    assert len(calls) == 4 + 3
    assert (segments.values["n"][:-1, -1] == segments.values["n"][1:, 0]).all()


def test_plane_basis_projection_and_grid(points):
    plane = Plane.through(*points[:3])
    u, v = slow.plane_basis(*points[:3].numpy())
    np.testing.assert_allclose(plane.u, u, atol=1e-12)
    np.testing.assert_allclose(plane.v, v, atol=1e-12)
    for point in points[:3]:
        x, y, distance = plane.project(point)
        assert distance < 1e-12
        torch.testing.assert_close(plane.point(x, y), point)
    x, y, distance = plane.project(points[3])
    left_over = points[3] - plane.point(x, y)
    assert distance == pytest.approx(float(left_over.norm()))
    assert abs(float(left_over @ plane.u)) + abs(float(left_over @ plane.v)) < 1e-12
    with Surface(Bowl(), measure_bowl) as surface:
        grid = on_plane(surface, plane, [-1.0, 0.5, 2.0], [0.0, 1.0])
    assert grid.values["loss"].shape == (2, 3)
    assert grid.values["loss"][1, 2] == pytest.approx(bowl_loss(plane.point(2.0, 1.0).numpy()))


@pytest.mark.parametrize("third", [-1.0, 0.5, 3.0])
def test_three_points_on_one_line_are_no_plane(points, third):
    on_line = points[0] + third * (points[1] - points[0])
    with pytest.raises(ArgumentError, match="one line"):
        Plane.through(points[0], points[1], on_line)


@pytest.mark.parametrize(
    ("places", "which"), [((0, 0, 1), "first and the second"), ((0, 1, 0), "first and the third"), ((0, 1, 1), "second and the third")]
)  # fmt: skip
def test_two_points_that_are_the_same_are_named(points, places, which):
    with pytest.raises(ArgumentError, match=f"The {which} point are the same"):
        Plane.through(*(points[place] for place in places))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.net(x))


def norm_twin(weights, x):
    """The network in float64 NumPy with the statistics of x itself."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    h = x.double().numpy() @ w["net.0.weight"].T + w["net.0.bias"]
    h = (h - h.mean(0)) / np.sqrt(h.var(0, ddof=1) + 1e-5) * w["net.1.weight"] + w["net.1.bias"]
    return h @ w["head.weight"].T + w["head.bias"]


def test_statistics_are_those_of_each_point():
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    model, other = Normed(), Normed()
    ends = [dict(net.state_dict()) for net in (model, other)]
    ends = [{name: value.clone() for name, value in end.items()} for end in ends]
    batches = [x[:40], x[40:]]
    with Surface(model, lambda m: {"mean": m(x).square().mean()}, refresh=batches) as surface:
        line = along_line(surface, *map(surface.vector, ends), [0.0, 0.3, 1.0])
    for t, value in zip(line.positions, line.values["mean"], strict=True):
        names = dict(model.named_parameters())
        between = {name: (1 - t) * ends[0][name] + t * ends[1][name] for name in names}
        assert value == pytest.approx((norm_twin(between, x) ** 2).mean(), rel=1e-4)


def test_batchnorm_without_batches_is_refused():
    with pytest.raises(ArgumentError, match=r"net\.1.*refresh"):
        Surface(Normed(), measure_bowl)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back(fails):
    model = Normed()
    model.net[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    batches = [torch.randn(8, 3)]

    def measure(m):
        assert not any(module.training for module in m.modules())
        if fails:
            raise KeyError("broken")
        return {"zero": 0.0}

    def run():
        with Surface(model, measure, refresh=batches) as surface:
            along_line(surface, surface.vector(state), torch.zeros(surface.size), [0.0, 2.0])

    if fails:
        with pytest.raises(KeyError, match="broken"):
            run()
    else:
        run()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_outside_its_context_nothing_is_touched(points):
    model = Bowl()
    before = model.a.detach().clone()
    with pytest.raises(UsageError, match="with surface"):
        Surface(model, measure_bowl).at(points[0])
    assert torch.equal(model.a, before)


def test_weights_of_another_model_are_named():
    with Surface(Bowl(), measure_bowl) as surface, pytest.raises(MismatchError) as caught:
        surface.vector({"b": torch.zeros(2, 1), "extra": torch.zeros(1)})
    assert "missing (1): a" in str(caught.value)
    assert "b: (2, 1), expected (1, 2)" in str(caught.value)


def test_nan_is_refused(points):
    with (
        Surface(Bowl(), lambda model: {"loss": float("nan")}) as surface,
        pytest.raises(NonFiniteError, match="loss is NaN"),
    ):
        surface.at(points[0])


def test_one_point_has_no_segments(points):
    with (
        Surface(Bowl(), measure_bowl) as surface,
        pytest.raises(ArgumentError, match="There are 1 points"),
    ):
        along_segments(surface, points[:1])


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "normed", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
def test_vectors_of_spectral_norm_are_no_coordinates(normed):
    state = nn.Sequential(normed(nn.Linear(3, 2))).state_dict()
    anchor = Anchor("one", state, "one")
    moving = {name for name in state if anchor.moves(name)}
    assert {name.rpartition("_")[2] for name in state.keys() - moving} == {"u", "v"}
    assert len(moving) == 2
