"""Each average as its own source writes it: unit steps, plain lists, float64, nothing clever."""

from __future__ import annotations

import math
from collections.abc import Sequence


def swa(weights: Sequence[float]) -> float:
    """Algorithm 1 of Izmailov et al. 2018, arXiv 1803.05407."""
    w_swa = 0.0
    for n_models, w in enumerate(weights):
        w_swa = (w_swa * n_models + w) / (n_models + 1)
    return w_swa


def ema_debiased(weights: Sequence[float], decay: float) -> float:
    """As Adam does with its moments: from zero, divided by what has come in."""
    moment = 0.0
    for w in weights:
        moment = decay * moment + (1 - decay) * w
    return moment / (1 - decay ** len(weights))


def ema_as_torch(weights: Sequence[float], decay: float) -> float:
    """`get_ema_multi_avg_fn(decay)`: the first weights are copied, the rest folded in."""
    average = weights[0]
    for w in weights[1:]:
        average = decay * average + (1 - decay) * w
    return average


def power_ema(weights: Sequence[float], gamma: float) -> float:
    """EDM2's update, arXiv 2312.02696: beta = (1 - 1 / t) ** (gamma + 1)."""
    average = 0.0
    for t, w in enumerate(weights, start=1):
        beta = (1 - 1 / t) ** (gamma + 1)
        average = beta * average + (1 - beta) * w
    return average


def polynomial_ema(weights: Sequence[float], c: float, k: float) -> float:
    """The share of each weight is the difference of E over its interval, of the total that has come in."""
    now = len(weights)
    e = [math.exp(-c * (now ** (1 - k) - x ** (1 - k)) / (1 - k)) for x in range(now + 1)]
    return sum((e[i + 1] - e[i]) * w for i, w in enumerate(weights)) / (1 - e[0])


def p_ema(weights: Sequence[float], p: float) -> float:
    """arXiv 2505.10605: the n-th weights enter with (n + 1)^-p, after the first as they are."""
    average = weights[0]
    for n, w in enumerate(weights[1:], start=1):
        average += (n + 1) ** -p * (w - average)
    return average


def window(weights: Sequence[float], length: int) -> float:
    """LAWA: the mean of the last `length`."""
    last = weights[-length:]
    return sum(last) / len(last)


def annealed_cosine(weights: Sequence[float]) -> float:
    """WSM, arXiv 2507.17634: c_j = w_j - w_(j+1) for the decay w that is emulated."""
    n = len(weights)
    decay = [(1 + math.cos(math.pi * j / n)) / 2 for j in range(n + 1)]
    return sum((decay[j] - decay[j + 1]) * weights[j] for j in range(n))


def annealed_sqrt(weights: Sequence[float]) -> float:
    """The same for the 1 - sqrt decay."""
    n = len(weights)
    decay = [1 - math.sqrt(j / n) for j in range(n + 1)]
    return sum((decay[j] - decay[j + 1]) * weights[j] for j in range(n))
