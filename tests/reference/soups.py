"""Greedy and learned soups in float64, whole arrays at a time, as the paper and the algebra write them."""

import itertools

import numpy as np


def greedy(arrays, loss):
    """The places of the ingredients, and their mean: sorted by loss, kept unless the loss rises."""
    order = sorted(range(len(arrays)), key=lambda place: loss(arrays[place]))
    chosen = order[:1]
    for place in order[1:]:
        trial = np.mean([arrays[p] for p in (*chosen, place)], axis=0)
        if loss(trial) <= loss(np.mean([arrays[p] for p in chosen], axis=0)):
            chosen.append(place)
    return chosen, np.mean([arrays[p] for p in chosen], axis=0)


def nearest_mix(vectors, target):
    """The coefficients, not negative and of sum 1, of the mix nearest to the target: every support is tried."""
    best = None
    count = len(vectors)
    for size in range(1, count + 1):
        for support in itertools.combinations(range(count), size):
            chosen = np.stack([vectors[place] - target for place in support])
            bordered = np.ones((size + 1, size + 1))
            bordered[:size, :size], bordered[size, size] = chosen @ chosen.T, 0
            solved = np.linalg.lstsq(bordered, np.eye(size + 1)[size], rcond=None)[0][:size]
            if (solved < -1e-12).any():
                continue
            distance = np.linalg.norm(solved @ chosen)
            if best is None or distance < best[0] - 1e-12:
                best = distance, dict(zip(support, solved, strict=True))
    return [best[1].get(place, 0.0) for place in range(count)]
