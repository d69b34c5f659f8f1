"""Curves between checkpoints: a hill that is known, permuted solutions, and one step by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

import polyak
from polyak.errors import ArgumentError, MismatchError, NonFiniteError, OutputError, UsageError
from polyak.study import ScaledNLL, connect, scan_line


def ring(model, batch):
    """Two valleys, or rather one: low on the circle of radius 1, a hill of height 1 in the middle."""
    return (model.weight.square().sum() - 1).square()


def flat():
    return nn.Linear(2, 1, bias=False)


def ends_of(*points):
    return {f"w{i}": {"weight": torch.tensor([point])} for i, point in enumerate(points, 1)}


ENDS = ends_of([-1.0, 0.0], [1.0, 0.0])


def hill(state):
    return float((state["weight"].double().square().sum() - 1) ** 2)


def on_average(height, t):
    """The loss over the curve with the control point (0, height), by quadrature."""
    x, y = 2 * t - 1, 2 * t * (1 - t) * height
    return float(np.trapezoid((x**2 + y**2 - 1) ** 2, t))


def test_a_curve_goes_around_a_hill_where_the_best_one_does():
    curve = connect(ENDS, flat(), ring, [torch.zeros(1)] * 100, epochs=10)
    t = np.linspace(0, 1, 2001)
    heights = np.linspace(1, 3, 401)
    best = heights[np.argmin([on_average(h, t) for h in heights])]
    x, y = curve.control["weight"][0].tolist()
    assert abs(x) < 0.1
    assert abs(y) == pytest.approx(best, rel=0.03)
    straight = scan_line(ENDS, hill, minimize=True, points=41).barriers[0]
    curved = scan_line(curve, hill, minimize=True, points=41).barriers[0]
    assert (straight.height, straight.at) == (pytest.approx(1), 0.5)
    assert curved.height < 0.06
    assert curve.losses[-1] < 0.1 < curve.losses[0]


def network(width=32):
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 2))


def spirals():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def batches():
    x, y = spirals()
    return list(zip(x.split(50), y.split(50), strict=True))


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def permuted():
    """A trained network, and the same function with its hidden units in another order."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        for batch in batches():
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    order = torch.arange(32).roll(1)
    moved = {n: t[order] if n[0] in "01" and t.ndim else t.clone() for n, t in state.items()}
    moved["3.weight"] = state["3.weight"][:, order]
    return {"trained": state, "permuted": moved}


def test_permuted_solutions_are_connected(permuted):
    model, x = network(), spirals()[0]
    judging = {"model": model, "data": [x], "points": 11}
    nll = ScaledNLL([spirals()])
    straight = scan_line(permuted, nll, **judging).barriers[0]
    curve = connect(permuted, model, loss, batches(), epochs=40, rate=0.2)
    curved = scan_line(curve, nll, **judging).barriers[0]
    assert straight.height > 0.2
    assert straight.low > 0  # by more than noise
    assert curved.height < straight.height / 3


def test_nothing_of_the_model_is_touched_and_the_seed_decides(permuted):
    model = network()
    model[1].eval()
    loss(model, batches()[0]).backward()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    gradient = model[0].weight.grad.clone()
    state = torch.random.get_rng_state()

    def made(seed):
        generator = torch.Generator().manual_seed(seed)
        return connect(permuted, model, loss, batches(), epochs=1, generator=generator).control

    first, again, other = made(1), made(1), made(2)
    assert all(torch.equal(t, again[n]) for n, t in first.items())
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, gradient)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_step_is_the_one_by_hand():
    """Twin: the gradient of the loss at the curve's point, through the formula of the curve."""
    generator = torch.Generator().manual_seed(5)
    ends = ends_of([-1.0, 0.5], [1.0, 0.25])
    curve = connect(
        ends, flat().double(), ring, [torch.zeros(1)], epochs=1, generator=torch.Generator().manual_seed(5),
        optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
    )  # fmt: skip
    a, b = (one["weight"].double() for one in ends.values())
    noise = torch.randn(1, 2, generator=generator, dtype=torch.float64)
    theta = (a + b) / 2 + 1e-3 * (b - a).norm() / 2**0.5 * noise
    theta.requires_grad_()
    t = float(torch.rand((), generator=generator, dtype=torch.float64))
    point = (1 - t) ** 2 * a + 2 * t * (1 - t) * theta + t**2 * b
    ((point.square().sum() - 1) ** 2).backward()
    torch.testing.assert_close(curve.control["weight"], (theta - 0.1 * theta.grad).detach())


def test_what_does_not_train_stays_on_the_straight_line(permuted):
    model = network()
    model[3].requires_grad_(False)
    curve = connect(permuted, model, loss, batches(), epochs=2)
    a, b = permuted.values()
    torch.testing.assert_close(curve.control["3.weight"], (a["3.weight"] + b["3.weight"]) / 2)
    assert not torch.allclose(curve.control["0.weight"], (a["0.weight"] + b["0.weight"]) / 2)
    assert torch.equal(curve.control["1.running_var"], a["1.running_var"])


def test_a_curve_is_saved_and_followed_from_its_file(permuted, tmp_path):
    curve = connect(permuted, network(), loss, batches(), epochs=1)
    for t, name in ((0.0, "trained"), (1.0, "permuted")):
        assert all(torch.equal(v, permuted[name][n]) for n, v in curve.at(t).items())
    path = tmp_path / "bend.safetensors"
    curve.save(path)
    assert torch.equal(load_file(path)["0.weight"], curve.control["0.weight"])

    def size(state):
        return float(state["0.weight"].square().sum())

    with pytest.warns(polyak.errors.StaleStatistics):
        whole = scan_line(curve, size, minimize=True, points=5)
    with pytest.warns(polyak.errors.StaleStatistics):
        read = scan_line(permuted, size, curve=path, minimize=True, points=5)
    assert whole.values.tolist() == read.values.tolist()
    other = {**permuted, "permuted": permuted["trained"] | {"3.bias": torch.ones(2)}}
    with pytest.raises(ArgumentError, match="a curve between other checkpoints"):
        scan_line(other, size, curve=path, minimize=True)
    with pytest.raises(ArgumentError, match="a control point of its own"):
        scan_line(curve, size, curve=path, minimize=True)
    with pytest.raises(OutputError, match="exists"):
        curve.save(path)


def diverging(model, batch):
    return ring(model, batch) * float("nan")


@pytest.mark.parametrize(
    ("inputs", "how", "options", "error", "message"),
    [
        (ends_of([1.0, 0.0]), ring, {}, ArgumentError, "There is 1 checkpoint; a curve connects two"),
        (ends_of([1.0, 0.0], [1.0, 0.0]), ring, {}, ArgumentError, "are the same weights"),
        ({"a": ENDS["w1"], "b": {"weight": torch.ones(1, 3)}}, ring, {}, MismatchError, "not weights of one model"),
        ({"a": {"w": torch.ones(2)}, "b": {"w": torch.zeros(2)}}, ring, {}, MismatchError, "no weights of this model"),
        (ENDS, diverging, {}, NonFiniteError, r"epoch 1, at 0\.\d+ of the curve"),
        (ENDS, lambda model: 0.0, {}, UsageError, r"The loss failed: TypeError.* Expected loss\(model, batch\)"),
        (ENDS, lambda model, batch: ring(model, batch).detach(), {}, UsageError, "does not depend on the model's weights"),
        (ENDS, torch.no_grad()(ring), {}, UsageError, "does not depend on the model's weights"),
        (ENDS, lambda model, batch: model.nothing, {}, UsageError, "The loss failed: AttributeError"),
        (ENDS, ring, {"epochs": 0}, ArgumentError, "epochs is 0"),
        (ENDS, ring, {"rate": -1.0}, ArgumentError, "rate is -1"),
        (ENDS, ring, {"batches": []}, ArgumentError, "no batches"),
        (ENDS, ring, {"batches": iter([1])}, ArgumentError, "batches is a list_iterator"),
        (ENDS, ring, {"optimizer": lambda tensors: None}, ArgumentError, "optimizer returned a NoneType"),
        (ENDS, ring, {"model": flat().requires_grad_(False)}, ArgumentError, "nothing can bend"),
        (ENDS, ring, {"model": flat}, ArgumentError, "connect needs a torch module"),
    ],
)  # fmt: skip
def test_what_is_refused(inputs, how, options, error, message):
    options = {"model": flat(), "batches": [torch.zeros(1)]} | options
    with pytest.raises(error, match=message):
        connect(inputs, options.pop("model"), how, options.pop("batches"), **options)
