"""SWAG against a float64 twin that keeps every capture, and against the statistics of its draws."""

from __future__ import annotations

import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from reference.models import MODELS
from reference.swag import Twin, covariance, wide
from torch import nn

import polyak

# What draws are worth without statistics of their own, or of fewer captures than asked for, is not asked.
pytestmark = pytest.mark.filterwarnings("ignore::polyak.errors.PolyakWarning")
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def averaged(model):
    return {
        n: p
        for n, p in model.named_parameters()
        if p.requires_grad and (p.is_floating_point() or p.is_complex())
    }


@torch.no_grad()
def walk(model, seed, size=0.1):
    """The weights move a bit, by the step of this seed."""
    torch.manual_seed(seed)
    for parameter in averaged(model).values():
        parameter += size * torch.randn_like(parameter)


def captured(make, rank, n, **options):
    torch.manual_seed(0)
    model = make()
    swag, twin = polyak.SWAG(model, rank=rank, **options), Twin(rank)
    for seed in range(n):
        walk(model, seed)
        swag.update()
        twin.capture(averaged(model))
    return model, swag, twin


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(found, expected, tolerance=3e-6):
    scale = expected.abs().max().clamp(min=1e-30)
    return float((wide(found) - expected).abs().max() / scale) < tolerance


@models
@pytest.mark.parametrize(("rank", "n"), [(0, 7), (3, 2), (3, 9), (20, 9)])
def test_what_is_kept_is_what_a_twin_finds(make, rank, n):
    _, swag, twin = captured(make, rank, n)
    state = swag.state_dict()
    assert swag.columns == len(state["deviations"]) == min(rank, n)
    for name, mean in state["tensors"].items():
        assert close(mean, twin.mean(name))
        assert close(state["variance"][name], twin.variance(name), 2e-5)
        for own, expected in zip(state["deviations"], twin.deviations(name), strict=True):
            assert own[name].dtype == mean.dtype
            # The first deviation is 0; the others are within the rounding of the weights.
            assert float((wide(own[name]) - expected).abs().max()) < 1e-6


@models
@pytest.mark.parametrize("rank", [0, 4, 20])  # of which 9 are held
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_draw_is_the_formula(make, rank, scale):
    model, swag, twin = captured(make, rank, 9)
    own = {n: t.clone() for n, t in model.state_dict().items()}
    dtype = torch.float64 if make is MODELS["float64"] else torch.float32
    expected = twin.draw(list(averaged(model)), seeded(), scale, dtype)
    with swag.sample(generator=seeded(), scale=scale):
        for name, parameter in averaged(model).items():
            tolerance = max(torch.finfo(parameter.dtype).eps, 1e-5)
            assert close(parameter, expected[name], tolerance), name
        if make is MODELS["tied"]:
            assert model.head.weight is model.embedding.weight
    assert all(torch.equal(own[n], t) for n, t in model.state_dict().items())


def test_small_deviations_of_large_weights_keep_their_digits():
    # E[w^2] - E[w]^2 in float32 has the wrong sign for half of such weights (docs/uncertainty.md).
    model = nn.Linear(50, 40)
    torch.nn.init.uniform_(model.weight, 0.5, 1.5)
    start = model.weight.detach().clone()
    swag, twin = polyak.SWAG(model, rank=2), Twin(2)
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            model.weight.copy_(start * (1 + 1e-4 * torch.randn_like(start)))
        swag.update()
        twin.capture(averaged(model))
    found, expected = swag.state_dict()["variance"]["weight"], twin.variance("weight")
    relative = (wide(found).sqrt() / expected.sqrt() - 1).abs()
    assert float(found.min()) > 0
    assert float(relative.max()) < 5e-3


def test_thousands_of_captures_are_gathered_in_blocks():
    model, swag, twin = captured(MODELS["plain"], 3, 1500)
    assert swag.state_dict()["block"]  # or this tests nothing
    expected = twin.draw(list(averaged(model)), seeded(), 1.0)
    with swag.sample(generator=seeded()):
        assert all(close(p, expected[n], 2e-5) for n, p in averaged(model).items())


CHI_SQUARED = {8: 42.70, 36: 91.50}
"""By degrees of freedom: exceeded by chance once in a million."""


def whitened(draws, mean, cov):
    return torch.linalg.solve_triangular(
        torch.linalg.cholesky(cov), (draws - mean).T, upper=False
    ).T


def statistics_of(draws, mean, cov):
    """Both are chi-squared, of d and d (d + 1) / 2 degrees of freedom, if draws are N(mean, cov)."""
    white = whitened(draws, mean, cov)
    n, d = white.shape
    second = white.T @ white / n
    of_mean = n * white.mean(0).square().sum()
    of_covariance = n * (second.trace() - second.logdet() - d)
    return float(of_mean), float(of_covariance)


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_draws_have_the_mean_and_the_covariance_that_are_stored(rank, scale):
    """A right SWAG fails this in 2 of a million seeds, each of the four times; the seed is fixed.

    Wrong ones, as reference implementations have them, are told apart.
    """
    model, swag, _ = captured(
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(1, 2, bias=False)), rank, 12
    )
    state, names = swag.state_dict(), list(averaged(model))
    vector = lambda group: torch.cat([group[n].double().flatten() for n in names])  # noqa: E731
    mean, variance = vector(state["tensors"]), vector(state["variance"])
    deviations = list(map(vector, state["deviations"]))
    generator, draws = seeded(1), []
    for _ in range(1500):
        with swag.sample(generator=generator, scale=scale):
            draws.append(vector(dict(model.named_parameters())).detach())
    draws, d = torch.stack(draws), len(mean)
    cov = covariance(variance, deviations, scale)
    of_mean, of_covariance = statistics_of(draws, mean, cov)
    assert of_mean < CHI_SQUARED[d]
    assert of_covariance < CHI_SQUARED[d * (d + 1) // 2]
    wrong = [
        covariance(variance, deviations, scale * 1.3),
        covariance(variance * 1.5, deviations, scale),
    ]
    if rank:
        apart = torch.zeros(d, d)
        for start, stop in ((0, 4), (4, 6), (6, 8)):
            apart[start:stop, start:stop] = 1
        wrong += [cov * apart + 1e-12 * torch.eye(d), scale * torch.diag(variance)]
    for other in wrong:
        assert statistics_of(draws, mean, other)[1] > CHI_SQUARED[d * (d + 1) // 2]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal_states(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal_states, a, b))
    return a == b


@models
@pytest.mark.parametrize(("rank", "killed_after"), [(0, 3), (4, 0), (4, 1), (4, 3), (4, 8)])
def test_a_resumed_run_has_the_same_bits(make, rank, killed_after):
    _, whole, _ = captured(make, rank, 11)
    model, first, _ = captured(make, rank, killed_after)
    state = through_a_file(first.state_dict())
    weights = through_a_file(model.state_dict())
    del first
    model = make()  # a new process would make its model again
    model.load_state_dict(weights)
    swag = polyak.SWAG(model, rank=rank)
    swag.load_state_dict(state)
    for seed in range(killed_after, 11):
        walk(model, seed)
        swag.update()
    assert equal_states(swag.state_dict(), whole.state_dict())
    with whole.sample(generator=seeded()) as one, swag.sample(generator=seeded()) as other:
        assert equal_states(dict(one.state_dict()), dict(other.state_dict()))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_torch_distributed_checkpoint_keeps_all_of_it(tmp_path):
    _, swag, _ = captured(MODELS["plain"], 3, 5)
    dcp.save({"swag": swag.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    other = polyak.SWAG(MODELS["plain"](), rank=3)
    state = {"swag": other.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state["swag"])
    assert equal_states(other.state_dict(), swag.state_dict())


@models
def test_a_saved_file_draws_the_same(make, tmp_path):
    model, swag, _ = captured(make, 3, 5)
    swag.save(tmp_path / "swag.safetensors")
    other = polyak.SWAG(model, rank=3)
    other.load(tmp_path / "swag.safetensors")
    assert other.count == 5
    drawn = []
    for one in (swag, other):
        with one.sample(generator=seeded()):
            drawn.append({n: t.clone() for n, t in model.state_dict().items()})
    assert equal_states(*drawn)


def test_a_hook_takes_the_same_as_update():
    model = MODELS["plain"]()
    swag, by_hand = polyak.SWAG(model, rank=3), polyak.SWAG(model, rank=3, unit="steps")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swag.attach(optimizer, every=4)
    for step in range(1, 21):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        if step % 4 == 0:
            by_hand.update(4)
    swag.detach()
    ignored = {"pending", "polyak"}
    states = [
        {k: v for k, v in one.state_dict().items() if k not in ignored} for one in (swag, by_hand)
    ]
    assert equal_states(*states)
    assert swag.count == 5
