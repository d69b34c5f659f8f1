"""What an average made from a trajectory is made of, and what it will be worth."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from polyak.checkpoints.intervals import Interval
from polyak.maths.planning import RESOLVED
from polyak.maths.profiles import Profile
from polyak.maths.text import profile_text

_ROWS = 24


@dataclass(frozen=True)
class Piece:
    """One file of a trajectory and its weight: the mean of `captures` weights in `(start, end]`."""

    path: Path
    start: float
    end: float
    captures: int
    weight: float


@dataclass(frozen=True)
class Plan:
    """An average to be made; `print(plan)` shows it.

    profile: seen from `until`, in `unit`. pieces: oldest first, those without weight included; the
    weights sum to 1. error: the planned distance from the true average, relative to that average's
    distance from the last iterate. effective_samples: as many equal weights cancel as much noise.
    mean_age: of what is made, seen from `until`. notes: what to know.
    """

    profile: Profile
    unit: str
    until: float
    pieces: tuple[Piece, ...]
    error: float
    effective_samples: float
    mean_age: float
    notes: tuple[str, ...]
    key: str

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each piece."""
        return tuple(piece.weight for piece in self.pieces)

    @property
    def resolved(self) -> bool:
        """Whether the planned error is below 0.026, that of an EMA of 3% of the run with 64 intervals."""
        return self.error <= RESOLVED

    def __str__(self) -> str:
        counted = [piece for piece in self.pieces if piece.weight]
        shown = counted[-_ROWS:]
        lines = [f"{profile_text(self.profile)} at {self.until:,g} {self.unit}"]
        if len(counted) > len(shown):
            rest = sum(piece.weight for piece in counted[: -len(shown)])
            lines.append(f"  {len(counted) - len(shown)} older pieces together {rest:.4f}")
        lines += [
            f"  {one.path.name}  {one.start:,g} to {one.end:,g}  {one.weight:.4f}" for one in shown
        ]
        lines += [
            f"planned error {self.error:.2g} of the distance between the average and the last iterate",
            f"effective samples {self.effective_samples:.1f}, mean age {self.mean_age:,.4g} {self.unit}",
        ]
        return "\n".join([*lines, *self.notes])


def key_of(intervals: tuple[Interval, ...], weights: tuple[float, ...]) -> str:
    """Sixteen hex digits of the files that count and their weights: equal keys mean equal averages."""
    pairs = zip(intervals, weights, strict=True)
    counted = [f"{one.stamp} {weight!r}" for one, weight in pairs if weight]
    newest = intervals[-1].stamp if intervals else ""  # buffers are the newest's
    return hashlib.sha256("\n".join([*counted, newest]).encode()).hexdigest()[:16]
