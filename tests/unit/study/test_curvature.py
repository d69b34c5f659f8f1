"""Lanczos against dense eigenvalues, and the Hessian of models against one that is written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from polyak.errors import ArgumentError, NonFiniteError, UsageError
from polyak.study import hessian_eigenvalues, lanczos


def symmetric(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (found + found.T) / 2


def begin(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def wanted(values, which, k):
    order = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which].argsort()
    return values[order[:k]]


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize(("size", "k"), [(1, 1), (2, 2), (40, 3), (300, 5)])
def test_it_finds_the_dense_eigenvalues(which, size, k):
    matrix = symmetric(size)
    values, vectors = torch.linalg.eigh(matrix)
    found = lanczos(
        lambda v: matrix @ v, begin(size), k=k, which=which, iterations=200, tolerance=1e-10
    )
    assert found.converged
    torch.testing.assert_close(
        torch.tensor(found.values, dtype=torch.float64), wanted(values, which, k)
    )
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(k, dtype=torch.float64))
    for value, vector in zip(found.values, found.vectors, strict=True):
        own = vectors[:, int((values - value).abs().argmin())]
        assert abs(float(own @ vector)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("iterations", [3, 8, 20])
def test_a_value_is_within_its_error_of_an_eigenvalue(iterations):
    matrix = symmetric(200)
    values = torch.linalg.eigvalsh(matrix)
    found = lanczos(lambda v: matrix @ v, begin(200), k=3, iterations=iterations, tolerance=1e-12)
    assert not found.converged
    assert "not converged" in str(found)
    for value, error in zip(found.values, found.errors, strict=True):
        assert float((values - value).abs().min()) <= error * (1 + 1e-9)


@pytest.mark.parametrize(
    "values",
    [[0.0] * 6, [1.0] * 6, [5.0, 5.0, 5.0, -1.0, -1.0, 0.0], [1e-9, 2e-9, 3e-9], [1e12, 1.0, -1e12]],
)  # fmt: skip
def test_equal_eigenvalues_are_found_as_often_as_there_are_when_all_are_asked_for(values):
    diagonal = torch.tensor(values, dtype=torch.float64)
    found = lanczos(lambda v: diagonal * v, begin(len(values)), k=len(values), tolerance=1e-9)
    assert found.products == len(values)
    expected = sorted(values, reverse=True)
    scale = max(map(abs, values)) or 1
    assert found.values == pytest.approx(expected, abs=1e-12 * scale)


def test_orthogonality_is_kept_where_plain_lanczos_loses_it():
    # Eigenvalues that converge early come back as ghosts without reorthogonalisation.
    diagonal = torch.cat([torch.tensor([100.0, 90.0]), torch.linspace(0, 1, 300)]).double()
    found = lanczos(lambda v: diagonal * v, begin(302), k=6, iterations=120, tolerance=1e-9)
    assert found.values[:2] == pytest.approx((100.0, 90.0))
    assert found.values[2] <= 1 + 1e-9
    gram = found.vectors @ found.vectors.T
    torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64), atol=1e-12, rtol=0)


# The Hessian


class Tied(nn.Module):
    """Normalised, with dropout, a weight that is used twice, a frozen one and one that is not used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.last.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def tied():
    torch.manual_seed(1)
    model = Tied()
    model(torch.randn(50, 3))  # statistics that are not 0 and 1
    return model.double()


def examples(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, x.argmax(1)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def each(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def dense(model, batches):
    """Twin: every second derivative of the mean loss of all examples at once."""
    model = model.eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    names, sizes = list(weights), [w.numel() for w in weights.values()]

    def total(vector):
        parts = zip(names, torch.split(vector, sizes), strict=True)
        given = {name: part.view_as(weights[name]) for name, part in parts}
        return cross_entropy(torch.func.functional_call(model, given, (x,)), y)

    point = torch.cat([w.reshape(-1) for w in weights.values()])
    return torch.autograd.functional.hessian(total, point)


@pytest.mark.parametrize("how", [loss, each])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_the_hessian_of_a_model_over_unequal_batches(how, which):
    x, y = examples(60)
    batches = [(x[:50], y[:50]), (x[50:], y[50:])]
    values = torch.linalg.eigvalsh(dense(tied(), batches))
    found = hessian_eigenvalues(tied(), how, batches, k=3, which=which, tolerance=1e-9)
    expected = wanted(values, which, 3)
    torch.testing.assert_close(
        torch.tensor(found.values, dtype=torch.float64), expected, rtol=1e-6, atol=1e-9
    )
    assert found.vectors.shape == (3, 9 + 3 + 3 + 3 + 2)


def test_nothing_of_the_model_is_touched():
    model = tied()
    model.drop.eval()
    loss(model, examples(20)).backward()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    hessian_eigenvalues(model, loss, [examples(20)])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_same_generator_gives_the_same_to_the_bit():
    def found(seed):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + 5)  # the global state has no say
        return hessian_eigenvalues(
            tied(), loss, [examples(30)], iterations=4, k=2, generator=generator
        )

    assert found(3).values == found(3).values
    assert found(3).values != found(4).values
    usual = [
        hessian_eigenvalues(tied(), loss, [examples(30)], iterations=4).values for _ in range(2)
    ]
    assert usual[0] == usual[1]


def test_inside_no_grad_and_from_float32():
    values = torch.linalg.eigvalsh(dense(tied(), [examples(40)]))
    x, y = examples(40)
    with torch.no_grad():
        found = hessian_eigenvalues(tied().float(), loss, [(x.float(), y)], k=2, tolerance=1e-5)
    assert found.values == pytest.approx(tuple(wanted(values, "largest", 2).tolist()), rel=1e-4)
    for value, error in zip(found.values, found.errors, strict=True):
        assert float((values - value).abs().min()) <= error


class Attention(nn.Module):
    """Fused attention has no second derivative, the plain one has."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)

    def forward(self, x):
        heads = self.q(x)[:, None]
        return scaled_dot_product_attention(heads, heads, heads).mean((1, 2))


@pytest.mark.parametrize(
    "model", [Attention(), nn.Sequential(nn.Flatten(), nn.Linear(20, 4)), nn.TransformerEncoderLayer(4, 2, 8)]
)  # fmt: skip
def test_networks_with_fused_parts(model):
    x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(0))
    found = hessian_eigenvalues(model, lambda m, b: m(b).square().mean(), [x], iterations=8)
    assert found.values[0] > 0


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


def sampled(model, x):
    """A sample from Beta: torch knows its gradient, and no second derivative."""
    torch.manual_seed(0)
    return torch.distributions.Beta(model(x).exp(), torch.tensor(2.0)).rsample()


# Where such a function enters the loss linearly, torch's own error never comes.
@pytest.mark.parametrize(
    "loss",
    [
        lambda m, x: Once.apply(m(x)).square().mean(),
        lambda m, x: Once.apply(m(x).square()).mean(),
        lambda m, x: sampled(m, x).square().mean(),
        lambda m, x: sampled(m, x).mean(),
        lambda m, x: sampled(m, x).mean() + m(x).square().mean(),
    ],
)
def test_what_cannot_be_differentiated_twice_is_said(loss):
    with pytest.raises(UsageError, match=r"cannot be differentiated twice: .*second derivative"):
        hessian_eigenvalues(nn.Linear(3, 1), loss, [torch.ones(4, 3)])


def test_a_linear_loss_has_no_curvature():
    found = hessian_eigenvalues(nn.Linear(3, 1), lambda m, x: m(x).mean(), [torch.ones(4, 3)], k=4)
    assert found.values == (0.0,) * 4


def test_directions_of_many_parameters_have_length_1():
    # torch's norm of so many float32 values on a CPU is too short: the eigenvalue of 2 I came out above 2.
    start = torch.randn(2**23, generator=torch.Generator().manual_seed(0))
    found = lanczos(lambda vector: 2 * vector, start, iterations=1)
    assert found.values[0] == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("spectrum", [[1e-3, *range(1, 61)], [0.0] * 8 + [1.0, 5.0, 1e3]])
def test_small_eigenvalues_of_a_large_matrix_are_within_their_bounds(spectrum):
    values = torch.tensor(spectrum, dtype=torch.float32)
    turn = torch.linalg.qr(symmetric(len(values)))[0].float()
    matrix = turn @ torch.diag(values) @ turn.T
    found = lanczos(lambda v: matrix @ v, begin(len(values)).float(), which="smallest", k=1)
    assert found.converged
    assert abs(found.values[0] - min(spectrum)) <= found.errors[0] < 1e-3 * max(spectrum)


def test_a_first_vector_without_a_direction_is_refused():
    for start in (torch.zeros(3), torch.tensor([1.0, math.inf, 0.0])):
        with pytest.raises(ArgumentError, match="start is zero or not finite"):
            lanczos(lambda v: v, start)


def test_a_batch_counts_by_its_first_tensor():
    def mean_loss(model, batch):
        return model(batch["x"]).square().mean()

    def counted(x):
        return {"id": ["a", "b"], "x": x}

    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(10, 3)
    unequal = hessian_eigenvalues(model, mean_loss, [counted(x[:8]), counted(x[8:])])
    assert unequal.values == pytest.approx(
        hessian_eigenvalues(model, mean_loss, [counted(x)]).values, rel=1e-5
    )


def frozen():
    return nn.Linear(3, 3).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "how", "batches", "options", "error", "message"),
    [
        (tied(), loss, [examples(4)], {"k": 0}, ArgumentError, "k is 0"),
        (tied(), loss, [examples(4)], {"k": 21}, ArgumentError, "there are 20 parameters, so at most 20"),
        (tied(), loss, [examples(4)], {"which": "top"}, ArgumentError, "which is 'top'; expected 'largest'"),
        (tied(), loss, [examples(4)], {"iterations": 0}, ArgumentError, "iterations is 0"),
        (tied(), loss, [examples(4)], {"tolerance": 0}, ArgumentError, "tolerance is 0"),
        (tied(), loss, [], {}, ArgumentError, "The data has no batches"),
        (tied(), loss, iter([examples(4)]), {}, ArgumentError, "batches is a list_iterator"),
        (tied(), nn.CrossEntropyLoss(), [examples(4)], {}, ArgumentError, "expected a function of the model"),
        (tied(), lambda m, b: m(b[0]), [examples(4)], {}, ArgumentError, r"returned shape \(4, 3\)"),
        (tied(), lambda m, b: 1.0, [examples(4)], {}, ArgumentError, "returned float"),
        (tied(), lambda m, b: m(b[0]).sum() * math.nan, [examples(4)], {}, NonFiniteError, "not finite"),
        (frozen(), loss, [examples(4)], {}, ArgumentError, "no parameters that train"),
        (nn.Linear, loss, [examples(4)], {}, ArgumentError, "needs a torch module"),
    ],
)  # fmt: skip
def test_what_is_refused(model, how, batches, options, error, message):
    with pytest.raises(error, match=message):
        hessian_eigenvalues(model, how, batches, **options)
