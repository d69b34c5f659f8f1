"""Slow float64 twins of `polyak.study.landscape`, for a loss given as a formula of a NumPy vector."""

import numpy as np


def line(loss, start, end, positions):
    return np.array([loss((1 - t) * start + t * end) for t in positions])


def barrier(loss, start, end, n=1001):
    t = np.linspace(0, 1, n)
    chord = (1 - t) * loss(start) + t * loss(end)
    return float((line(loss, start, end, t) - chord).max())


def plane_basis(w1, w2, w3):
    u = (w2 - w1) / np.sqrt(((w2 - w1) ** 2).sum())
    v = w3 - w1 - ((w3 - w1) * u).sum() * u
    return u, v / np.sqrt((v**2).sum())
