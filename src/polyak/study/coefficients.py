r"""The coefficients of a soup from the scores of its ingredients and the distances between them.

In a basin that curves alike in all directions, with loss $\frac h2 |w - w^*|^2$ plus a constant, a mix has

$$L\Big(\sum_i a_i x_i\Big) = \sum_i a_i L_i - \frac h4 \sum_{ij} a_i a_j |x_i - x_j|^2$$

for $a_i$ that sum to 1. Of a network this is a model with one unknown, the curvature $h$ on the plane of the
inputs; which one serves best is found by evaluating the mix that is best under each of a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polyak.checkpoints.merging.measure import Inputs, gram_matrix

_STEPS = 100_000


def squared_distances(inputs: Inputs) -> Any:
    """|x_i - x_j|^2 of every two inputs, summed over the tensors that are averaged; one reading, in float64."""
    tensors = inputs.each(lambda tensor: gram_matrix(tensor, has_base=True)).values()
    count = len(inputs.weights)
    gram = np.zeros((count, count))  # of the differences to the first
    for one in tensors:
        gram[1:, 1:] += one
    norms = np.diag(gram)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0)


def curvature_of(
    losses: Sequence[float], distances: Any, mix: Sequence[float], loss: float
) -> float:
    """The h with which the model gives this mix the loss that it has; 0 or less where it bends no way up."""
    weights = np.array(mix)
    apart = float(weights @ distances @ weights)
    return 4 * (float(weights @ np.array(losses)) - loss) / apart if apart > 0 else 0.0


def best_mix(losses: Sequence[float], distances: Any, curvature: float) -> tuple[float, ...]:
    """The coefficients, not negative and of sum 1, with the least loss under the model.

    From the best single one, weight moves between the two that gain most, by the exact amount.

    >>> best_mix([0.0, 0.0], np.array([[0, 1.0], [1.0, 0]]), 1.0)
    (0.5, 0.5)
    """
    found = np.zeros(len(losses))
    found[int(np.argmin(losses))] = 1.0
    slope = np.array(losses, dtype=float) - curvature / 2 * distances @ found
    scale = max(1e-300, float(np.abs(slope).max()))
    for _ in range(_STEPS):
        to, source = int(slope.argmin()), int(np.where(found > 0, slope, -np.inf).argmax())
        gain = slope[source] - slope[to]
        if gain <= 1e-13 * scale:
            break
        bend = curvature * distances[to, source]
        moved = min(found[source], gain / bend if bend > 0 else np.inf)
        found[to] += moved
        found[source] = 0.0 if moved == found[source] else found[source] - moved
        slope -= curvature / 2 * moved * (distances[:, to] - distances[:, source])
    found[found < 1e-9] = 0.0
    return tuple((found / found.sum()).tolist())
