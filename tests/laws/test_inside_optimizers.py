"""Which average is inside which optimizer: each line of docs/inside-optimizers.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import inside_optimizers as twin

from polyak import EMA, SWA, PowerEMA

SCALES = np.array([0.2, 1.0, 3.0])
START = np.array([1.0, -2.0, 0.5])


def gradient(w, n):
    """Of a noisy quadratic."""
    return SCALES * w + np.random.default_rng(n).normal(size=3)


def weighted(profile, iterates, first):
    times = list(range(first, first + len(iterates)))
    return profile.weights(times) @ np.stack(iterates)


def kept(decay):
    return EMA(decay, keep_initial=True)


def schedule_free(power, n_steps):
    """The z and the last x of the package itself."""
    schedulefree = pytest.importorskip("schedulefree")
    w = torch.nn.Parameter(torch.tensor(START))
    optimizer = schedulefree.SGDScheduleFree([w], lr=0.1, r=power)
    optimizer.train()
    iterates = []
    for n in range(n_steps):
        w.grad = torch.tensor(gradient(w.detach().numpy(), n))
        optimizer.step()
        iterates.append(optimizer.state[w]["z"].numpy().copy())
    optimizer.eval()
    return iterates, w.detach().numpy()


def test_schedule_free_is_the_mean_of_z():
    iterates, x = schedule_free(0.0, 60)
    np.testing.assert_allclose(x, weighted(SWA(), iterates, 1), atol=1e-12)
    np.testing.assert_allclose(x, weighted(PowerEMA(gamma=0), iterates, 1), atol=1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_schedule_free_with_a_power_is_the_power_average_in_the_limit(power):
    for n_steps in (60, 240):
        iterates, x = schedule_free(power, n_steps)
        own = np.arange(1, n_steps + 1) ** power
        np.testing.assert_allclose(x, own / own.sum() @ np.stack(iterates), atol=1e-12)
        off = np.abs(own / own.sum() - PowerEMA(gamma=power).weights(range(1, n_steps + 1))).sum()
        assert 0.1 * power / n_steps < off < 2 * power / n_steps
        largest = np.abs(np.stack(iterates)).max()
        assert np.abs(x - weighted(PowerEMA(gamma=power), iterates, 1)).max() < off * largest


@pytest.mark.parametrize(("mu_x", "mu_y"), [(0.9967, 0.7), (0.9, 0.9), (0.5, 0.0)])
def test_gpa_is_an_ema_of_z(mu_x, mu_y):
    xs, zs = twin.gpa(START, gradient, 80, lr=0.1, mu_x=mu_x, mu_y=mu_y)
    for n in (1, 2, 10, 80):
        np.testing.assert_allclose(xs[n], weighted(kept(mu_x), zs[: n + 1], 0), atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_momentum_is_an_average_of_weights(beta, nesterov):
    weights, taken = twin.momentum_sgd(START, gradient, 50, lr=0.05, beta=beta, nesterov=nesterov)
    assert_same_as_torch(weights[-1], beta, nesterov)
    zs = [START]
    for g in taken:
        zs.append(zs[-1] - 0.05 / (1 - beta) * g)
    for n in (1, 2, 10, 50):
        x = weighted(kept(beta), zs[: n + 1], 0)
        expected = beta * x + (1 - beta) * zs[n] if nesterov else x
        np.testing.assert_allclose(weights[n], expected, atol=1e-12)


def assert_same_as_torch(last, beta, nesterov):
    w = torch.nn.Parameter(torch.tensor(START))
    optimizer = torch.optim.SGD([w], lr=0.05, momentum=beta, nesterov=nesterov)
    for n in range(50):
        w.grad = torch.tensor(gradient(w.detach().numpy(), n))
        optimizer.step()
    np.testing.assert_allclose(w.detach().numpy(), last, atol=1e-12)


@pytest.mark.parametrize(("n_local", "n_workers"), [(1, 1), (8, 1), (32, 3)])
def test_diloco_is_an_ema_with_the_root_of_its_momentum(n_local, n_workers):
    weights, taken = twin.diloco(START, gradient, 12, n_local=n_local, n_workers=n_workers)
    zs = [START]
    for g in taken:
        zs.append(zs[-1] - 0.7 / (1 - 0.9) * g)
    decay = 0.9 ** (1 / n_local)
    for n in (1, 2, 12):
        times = [n_local * i for i in range(n + 1)]
        x = kept(decay).weights(times) @ np.stack(zs[: n + 1])
        np.testing.assert_allclose(weights[n], 0.9 * x + 0.1 * zs[n], atol=1e-11)
    if n_local == 32:
        assert round(decay, 4) == 0.9967  # GPA's default


@pytest.mark.parametrize(("alpha", "k"), [(0.5, 5), (0.8, 3)])
def test_the_slow_weights_of_lookahead_are_an_ema_of_the_fast(alpha, k):
    slow = fast = START
    seen = [START]
    for n in range(1, 41):
        fast = fast - 0.1 * gradient(fast, n)
        if n % k == 0:
            seen.append(fast)
            slow = slow + alpha * (fast - slow)
            fast = slow
            times = [k * i for i in range(len(seen))]
            expected = kept((1 - alpha) ** (1 / k)).weights(times) @ np.stack(seen)
            np.testing.assert_allclose(slow, expected, atol=1e-12)
