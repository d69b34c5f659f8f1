"""Averages made after the run, in float64 and without thought for speed: sums over a fine grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from polyak.maths.profiles import Profile


def centred_weights(profile: Profile, steps: Sequence[float]) -> NDArray[np.float64]:
    """Each snapshot's weight: the mean of F over the gap after it minus that over the gap before it."""
    origin = 2 * steps[0] - steps[1]
    now = steps[-1] - origin
    means = [0.0]
    for begin, end in itertools.pairwise(steps):
        n = 20_000
        inside = [begin - origin + (end - begin) * (i + 0.5) / n for i in range(n)]
        means.append(sum(profile.mass(x, now) for x in inside) / n)
    return np.diff([*means, 1.0])


def planned_error(
    profile: Profile,
    intervals: Sequence[tuple[float, float, int]],
    weights: Sequence[float],
    now: float,
) -> float:
    """sqrt(integral of (F_made - F)^2 / integral of F^2), F_made a step at every capture."""
    n, last = 8_000, max(now, intervals[-1][1])
    above = below = 0.0
    for x in ((i + 0.5) * last / n for i in range(n)):
        made = 0.0
        for (begin, end, captures), weight in zip(intervals, weights, strict=True):
            for j in range(1, captures + 1):
                place = 1 if captures == 1 else (j - 0.5) / captures
                if begin + (end - begin) * place <= x:
                    made += weight / captures
        wanted = profile.mass(x, now) if x < now else 1.0
        above += (made - wanted) ** 2
        below += wanted**2 if x < now else 0.0
    return math.sqrt(above / below)
