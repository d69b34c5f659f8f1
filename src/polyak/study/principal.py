"""Points of a record: the first, the last, the mean, any average; and the plane that it moves in most."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polyak.errors import ArgumentError, StaleStatistics, require
from polyak.maths.arguments import number
from polyak.study.frame import Anchor, Floats, content_of, wide
from polyak.study.trajectory import Trajectory

_FEWEST = 3
_RANK = 1e-12  # of the leading variance; below it there is no second direction


@dataclass(frozen=True)
class Principal:
    """The plane of a record: the mean and a point along each direction, one standard deviation away.

    feet: the intervals (K, 2) and named ones (1, 2), in the plane; distance: the largest from it. explained: of the intervals' variance.
    """

    anchors: list[Anchor]
    feet: dict[str, Floats]
    distance: dict[str, float]
    explained: float


def named_points(trajectory: Trajectory, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Points of a record by name: first, last, mean, or a profile, with @ and a moment where not at the end.

    >>> import tempfile, torch, polyak
    >>> model, folder = torch.nn.Linear(1, 1), tempfile.mkdtemp()
    >>> with polyak.Recorder(model, folder, interval=10) as recorder:
    ...     for value in range(30):
    ...         _ = torch.nn.init.constant_(model.weight, value)
    ...         recorder.update()
    >>> found = named_points(polyak.Trajectory(folder), ["first", "mean", "swa@20"])
    >>> {name: float(state["weight"]) for name, state in found.items()}
    {'first': 4.5, 'mean': 14.5, 'swa@20': 9.5}
    """
    found = {}
    for name in names:
        require(name not in found, f"{name} is named twice. Name different points of the record.")
        found[name] = _named(trajectory, name)
    return found


def _named(trajectory: Trajectory, name: str) -> dict[str, Tensor]:
    if name in ("first", "last"):
        interval = trajectory.intervals[0 if name == "first" else -1]
        with interval.open() as opened:
            return {one: stored.load() for one, stored in opened.tensors.items()}
    profile, at, moment = name.partition("@")
    profile = "swa" if profile == "mean" else profile
    if at:
        try:
            until = float(moment)
        except ValueError:
            raise ArgumentError(
                f"{name!r} names no moment after @; expected a number of {trajectory.unit}, as in mean@3000."
            ) from None
        number("until", until)
    plan = trajectory.plan(profile, until if at else None)
    with warnings.catch_warnings():  # whoever evaluates the point refreshes them, or says so
        warnings.simplefilter("ignore", StaleStatistics)
        return dict(trajectory.tensors(plan))


def principal_points(trajectory: Trajectory) -> Principal:
    """The leading two principal directions of the interval means, each of which counts equally.

    One tensor of all intervals is in memory at a time. Raises ArgumentError for fewer than three intervals,
    or intervals on one line.
    """
    intervals = trajectory.intervals
    if len(intervals) < _FEWEST:
        raise ArgumentError(
            f"The record has {len(intervals)} intervals; a plane of its own needs {_FEWEST}."
        )
    with ExitStack() as stack:
        opened = [stack.enter_context(one.open()) for one in intervals]
        newest = {name: stored.load() for name, stored in opened[-1].tensors.items()}
        frame = Anchor("newest", newest, "")
        moving = [name for name in newest if frame.moves(name)]

        def rows(name: str) -> Tensor:
            found = torch.stack([one.tensors[name].load() for one in opened])
            return wide(found).reshape(len(opened), -1)

        gram = np.zeros((len(opened), len(opened)))
        for name in moving:
            away = rows(name)
            away = away - away.mean(0)
            gram += (away @ away.mH).real.numpy()
        variances, vectors = np.linalg.eigh(gram)
        if variances[-2] <= _RANK * variances[-1]:
            raise ArgumentError(
                "The intervals of the record are on one line, which does not determine a plane. Draw the line."
            )
        loads = _signed(vectors[:, [-1, -2]])
        scale = np.sqrt(variances[[-1, -2]])  # the length of all of them along it
        points: list[dict[str, Tensor]] = [dict(newest), dict(newest), dict(newest)]
        for name in moving:
            found, shape = rows(name), newest[name].shape
            centre = found.mean(0)
            points[0][name] = centre.reshape(shape)
            for k in (0, 1):
                step = torch.from_numpy(loads[:, k]).to(found.dtype) @ (found - centre)
                points[k + 1][name] = (centre + step / np.sqrt(len(opened))).reshape(shape)
    dtypes = {name: tensor.dtype for name, tensor in newest.items()}
    names = ("mean", "direction 1", "direction 2")
    anchors = [Anchor(n, p, content_of(p), dtypes) for n, p in zip(names, points, strict=True)]
    feet = loads * scale
    marks = {"intervals": feet, "mean": np.zeros((1, 2)), "last": feet[-1:]}
    off = np.sqrt(np.maximum(np.diag(gram) - (feet**2).sum(axis=1), 0))
    distance = {"intervals": float(off.max()), "mean": 0.0, "last": float(off[-1])}
    return Principal(anchors, marks, distance, float(variances[-2:].sum() / variances.sum()))


def _signed(loads: Floats) -> Floats:
    """Directions whose last interval is on the positive side: eigenvectors have no sign of their own."""
    return loads * np.where(loads[-1] < 0, -1.0, 1.0)
