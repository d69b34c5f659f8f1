"""The plane that a scan is drawn on: where checkpoints are on it, and what its points are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from polyak.errors import ArgumentError
from polyak.study.frame import Anchor, Floats, Frame

_ROUNDING = 1e-6  # of a distance; nearer to a line than that, or than float32 tells, is on it


class Axes:
    """The plane through the first three checkpoints, in shares of them."""

    def __init__(self, frame: Frame) -> None:
        self._frame, self._gram = frame, (gram := frame.gram())
        first, second, third = (a.name for a in frame.anchors[:3])
        self._length = math.sqrt(gram[1, 1])
        rounding = 2 * sum(_resolution(a, frame) for a in frame.anchors[:3])
        for one, other in itertools.combinations(range(3), 2):
            if are_same(frame.anchors, gram, one, other):
                names = [frame.anchors[i].name for i in (one, other)]
                raise ArgumentError(
                    f"{names[0]} and {names[1]} are the same weights. Pass three that differ."
                )
        self._along = float(gram[1, 2] / gram[1, 1])
        self._height = math.sqrt(max(0.0, gram[2, 2] - self._along * gram[1, 2]))
        if self._height <= max(_ROUNDING * math.sqrt(gram[2, 2]), rounding):
            raise ArgumentError(
                f"{first}, {second} and {third} are on one line, which does not determine a plane. Pass three "
                "that are not (the mean of two is on the line between them), or draw the line."
            )

    def shares(self, x: float, y: float) -> list[float]:
        """The checkpoints' shares in the weights at a point, which sum to 1."""
        third = y / self._height
        second = x / self._length - third * self._along
        return [1 - second - third, second, third, *[0.0] * (len(self._gram) - 3)]

    def feet(self) -> tuple[dict[str, Floats], dict[str, float]]:
        """Of each checkpoint its place on the plane, (1, 2), and its distance from it."""
        found = {a.name: self._foot(i) for i, a in enumerate(self._frame.anchors)}
        places = {name: foot[:2][None] for name, foot in found.items()}
        return places, {name: float(foot[2]) for name, foot in found.items()}

    def _foot(self, index: int) -> Floats:
        row = self._gram[index]
        x = row[1] / self._length
        y = (row[2] - self._along * row[1]) / self._height
        return np.array([x, y, math.sqrt(max(0.0, row[index] - x * x - y * y))])


def _resolution(anchor: Anchor, frame: Frame) -> float:
    """How far the weights may be from where they should be because they are rounded."""
    squares = 0.0
    for name in frame.moving:
        tensor = anchor.tensors[name]
        squares += (torch.finfo(tensor.dtype).eps / 2 * float(tensor.abs().double().norm())) ** 2
    return math.sqrt(squares)


def are_same(anchors: Sequence[Anchor], gram: Floats, i: int, j: int) -> bool:
    """Whether two checkpoints have the same weights."""
    apart = gram[i, i] + gram[j, j] - 2 * gram[i, j]
    return bool(apart <= 0 or anchors[i].content == anchors[j].content)


def square(feet: Floats, points: int, margin: float) -> tuple[Floats, Floats]:
    """One scale for both axes."""
    low, high = feet.min(axis=0), feet.max(axis=0)
    half = (0.5 + margin) * float((high - low).max())
    x, y = (evenly(m - half, m + half, points) for m in (low + high) / 2)
    return x, y


def evenly(start: float, end: float, points: int) -> Floats:
    """Rounded to 12 digits, so that a finer scan meets the points of this one and knows their scores."""
    return np.array([float(f"{value:.12g}") for value in np.linspace(start, end, points)])
