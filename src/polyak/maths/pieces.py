r"""Pieces: how much each stored set of weights counts in an average made afterwards.

Weights saved at steps $s_1 < s_2 < \dots < s_n$ represent the training between them: those of
$s_i$ the interval $(s_{i-1}, s_i]$, the first an interval as long as the next. Time begins where
the first interval does, $s_0 = s_1 - (s_2 - s_1)$, and a profile with cumulative share $F$
gives

$$c_i = F(s_i - s_0,\; s_n - s_0) - F(s_{i-1} - s_0,\; s_n - s_0), \qquad \sum_i c_i = 1.$$

So irregular spacing is handled: weights that represent a longer interval count more. Only `SWA`
counts all stored weights equally, as its paper does.

For a *centred* profile (`EMA`, `PowerEMA`) that interval is around the weights instead: with
$\bar F_i$ the mean of $F$ over the gap $(s_i, s_{i+1}]$,

$$c_1 = \bar F_1, \qquad c_i = \bar F_i - \bar F_{i-1}, \qquad c_n = 1 - \bar F_{n-1}.$$

No other step function that is 0 before the first weights is closer to $F$ in the mean square, which
is what the error of an average of weights that move like a random walk depends on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from polyak.errors import ArgumentError
from polyak.maths.arguments import numbers
from polyak.maths.profile import Profile, check_profile
from polyak.maths.profiles import SWA, After


def piece_weights(profile: Profile, steps: Sequence[float]) -> NDArray[np.float64]:
    """The share of each of the weights stored at `steps`, which increase; float64, they sum to 1.

    profile: any; its `start` is a training step. steps: when each was stored, at least one.
    Raises ArgumentError if the steps do not increase, or all of them are before the start.

    >>> from polyak.maths.profiles import EMA, SWA, Window
    >>> piece_weights(Window(length=1000), [1000, 1500, 2000, 3000]).tolist()
    [0.0, 0.0, 0.0, 1.0]
    >>> piece_weights(Window(length=1500), [1000, 1500, 2000, 3000]).round(3).tolist()
    [0.0, 0.0, 0.333, 0.667]
    >>> piece_weights(SWA(), [1000, 1500, 3000]).round(3).tolist()
    [0.333, 0.333, 0.333]
    """
    check_profile(profile)
    moments = _moments(steps)
    later = isinstance(profile, After)
    counted = moments > profile.start if later else np.full(moments.shape, True)
    if not counted.any():
        raise ArgumentError(
            f"{profile} is empty: it starts at step {profile.start:g}, and the last weights were "
            f"stored at step {moments[-1]:g}. Start earlier, or add later weights."
        )
    if isinstance(profile.innermost, SWA):
        return np.asarray(counted / counted.sum())
    if len(moments) == 1:
        return np.ones(1)
    if profile.innermost.centred and profile.streaming:
        return _centred(profile.innermost, moments, counted, profile.start if later else None)
    origin = 2 * moments[0] - moments[1]
    weights = since(profile, origin).weights((moments - origin).tolist())
    return np.asarray(weights / weights.sum())


def _centred(
    profile: Profile, moments: NDArray[np.float64], counted: NDArray[np.bool_], start: float | None
) -> NDArray[np.float64]:
    """The mean of F over the gap after each of the weights minus that over the gap before it."""
    weights = np.zeros(len(moments))
    if counted.sum() == 1:
        return np.asarray(counted / 1.0)
    origin = 2 * moments[0] - moments[1]
    times = moments[counted] - (origin if start is None else max(start, origin))
    now = float(times[-1])
    # A streaming F(x, now) is F(x, t) F(t, now), so its integral up to t is F(t, now) mean_age(t).
    areas = np.array([float(profile.mass(t, now) * profile.mean_age(t)) for t in times.tolist()])
    means = np.diff(areas) / np.diff(times)
    weights[counted] = np.diff(np.clip(means, 0.0, 1.0), prepend=0.0, append=1.0)
    return np.asarray(np.maximum(weights, 0.0) / np.maximum(weights, 0.0).sum())


def effective_samples(weights: Sequence[float] | NDArray[np.float64]) -> float:
    r"""The number of equal weights that would cancel as much noise: $(\sum c_i)^2 / \sum c_i^2$.

    Raises ArgumentError if all are zero.

    >>> effective_samples([0.25, 0.25, 0.25, 0.25]), round(effective_samples([0.5, 0.25, 0.25]), 3)
    (4.0, 2.667)
    """
    shares = numbers("weights", weights)
    power = float(np.square(shares).sum())
    if not 0 < power < np.inf:
        raise ArgumentError(
            f"The weights are {shares.tolist()}; expected finite ones, at least one of them not zero."
        )
    return float(shares.sum() ** 2) / power


def _moments(steps: Sequence[float]) -> NDArray[np.float64]:
    moments = numbers("steps", steps)
    if moments.ndim != 1 or not moments.size or not np.isfinite(moments).all():
        raise ArgumentError(f"Expected a list of finite steps; found {moments.tolist()}.")
    if not (np.diff(moments) > 0).all():
        at = int(np.argmin(np.diff(moments) > 0))
        raise ArgumentError(
            f"The steps must increase; found {moments[at + 1]:g} after {moments[at]:g}."
        )
    return moments


def since(profile: Profile, origin: float) -> Profile:
    """The same profile with time counted from `origin`, before which nothing was stored."""
    if not isinstance(profile, After):
        return profile
    inner, start = profile.innermost, profile.start - origin
    return After(start, inner) if start > 0 else inner
