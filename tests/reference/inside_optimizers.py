"""Optimizers that hold an average, each as its paper writes it: lists, float64, nothing clever."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Gradient = Callable[[Vector, int], Vector]


def gpa(
    start: Vector, gradient: Gradient, n_steps: int, *, lr: float, mu_x: float, mu_y: float
) -> tuple[list[Vector], list[Vector]]:
    """arXiv 2512.17131 around SGD: y = mu_y x + (1 - mu_y) z, z -= lr g(y), x = mu_x x + (1 - mu_x) z."""
    x, z = start.copy(), start.copy()
    xs, zs = [x], [z]
    for n in range(n_steps):
        y = mu_y * x + (1 - mu_y) * z
        z = z - lr * gradient(y, n)
        x = mu_x * x + (1 - mu_x) * z
        xs.append(x)
        zs.append(z)
    return xs, zs


def momentum_sgd(
    start: Vector, gradient: Gradient, n_steps: int, *, lr: float, beta: float, nesterov: bool
) -> tuple[list[Vector], list[Vector]]:
    """As torch does it: b = beta b + g, w -= lr b, or w -= lr (g + beta b); the weights, and the g."""
    w, b = start.copy(), np.zeros_like(start)
    weights, taken = [w], []
    for n in range(n_steps):
        g = gradient(w, n)
        b = beta * b + g
        w = w - lr * (g + beta * b if nesterov else b)
        weights.append(w)
        taken.append(g)
    return weights, taken


def diloco(
    start: Vector, gradient: Gradient, n_rounds: int, *, n_local: int, n_workers: int
) -> tuple[list[Vector], list[Vector]]:
    """arXiv 2311.08105 around SGD: the outer weights after each round, and the outer gradients."""

    def outer_gradient(w: Vector, round_: int) -> Vector:
        ends = []
        for worker in range(n_workers):
            local = w.copy()
            for step in range(n_local):
                local = local - 0.05 * gradient(
                    local, (round_ * n_local + step) * n_workers + worker
                )
            ends.append(local)
        return w - sum(ends) / n_workers

    return momentum_sgd(start, outer_gradient, n_rounds, lr=0.7, beta=0.9, nesterov=True)
