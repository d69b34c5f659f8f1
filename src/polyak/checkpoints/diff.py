"""`diff_checkpoints`: names, shapes, dtypes, and the distance between the values of two checkpoints."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.stored import TORCH_DTYPES, Checkpoint, StoredTensor, iter_values


@dataclass(frozen=True, slots=True)
class Distance:
    r"""How far the values `b` are from the values `a`; sums are taken in float64.

    unequal: values that differ (two NaNs are equal, whatever their bits). largest: $\max |b_i - a_i|$.
    squared_a, squared_b: $|a|^2, |b|^2$; squared: $|b - a|^2$; along: $a \cdot (b - a)$.
    The sum of several distances is that of all their tensors taken as one vector.
    """

    unequal: int = 0
    largest: float = 0.0
    squared_a: float = 0.0
    squared_b: float = 0.0
    squared: float = 0.0
    along: float = 0.0

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.unequal + other.unequal,
            _larger(self.largest, other.largest),
            self.squared_a + other.squared_a,
            self.squared_b + other.squared_b,
            self.squared + other.squared,
            self.along + other.along,
        )

    @property
    def l2(self) -> float:
        r"""The distance $|b - a|$."""
        return math.sqrt(self.squared)

    @property
    def relative(self) -> float:
        r"""$|b - a| / |a|$; infinite if `a` is zero and `b` is not."""
        if not self.squared:
            return 0.0
        return math.sqrt(self.squared / self.squared_a) if self.squared_a else math.inf

    @property
    def degrees(self) -> float:
        r"""The angle between `a` and `b`; NaN if one of them is zero.

        From the part of $d = b - a$ across `a`, which stays precise where the cosine is almost 1:
        $\tan \varphi = \sqrt{|d|^2 - (a \cdot d)^2 / |a|^2} \, / \, (|a| + a \cdot d / |a|)$.
        """
        if not (self.squared_a and self.squared_b):
            return math.nan
        length = math.sqrt(self.squared_a)
        along = self.along / length
        across = math.sqrt(max(0.0, self.squared - along * along))
        return math.degrees(math.atan2(across, length + along))


@dataclass(frozen=True, slots=True)
class CheckpointDiff:
    """The differences of two checkpoints.

    only_a, only_b: names that the other lacks. shapes, dtypes: name -> the two of them, if they differ.
    distances: name -> distance, for all tensors of equal shape. extra: names of state that is no tensor
    and differs.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: dict[str, tuple[str, str]]
    distances: dict[str, Distance]
    extra: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether names, shapes, dtypes, values and all other state are equal."""
        described = self.only_a or self.only_b or self.shapes or self.dtypes or self.extra
        return not described and not any(entry.unequal for entry in self.distances.values())

    @property
    def total(self) -> Distance:
        """All tensors that were compared, as one vector."""
        return sum(self.distances.values(), Distance())


def diff_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    key_a: str | None = None,
    key_b: str | None = None,
) -> CheckpointDiff:
    """Compare two checkpoints of any formats, a mebibyte at a time; tied tensors are compared once.

    a, b, key_a, key_b: path and key of each, as for `open_checkpoint`, whose errors are raised.

    >>> import tempfile, pathlib, torch
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> torch.save({"w": torch.tensor([1.0, 0.0])}, folder / "a.pt")
    >>> torch.save({"w": torch.tensor([1.0, 1.0])}, folder / "b.pt")
    >>> distance = diff_checkpoints(folder / "a.pt", folder / "b.pt").distances["w"]
    >>> distance.l2, distance.relative, round(distance.degrees, 9)
    (1.0, 1.0, 45.0)
    """
    with open_checkpoint(a, key=key_a) as first, open_checkpoint(b, key=key_b) as second:
        result = _compare(first, second)
        first.check_unchanged()
        second.check_unchanged()
    return result


def distance(a: StoredTensor, b: StoredTensor) -> Distance:
    """The distance of two stored tensors of one shape, whatever their dtypes."""
    total = Distance()
    decoded = a.dtype in TORCH_DTYPES and b.dtype in TORCH_DTYPES
    for left, right in iter_values(a, b):
        total += _distance(left, right) if decoded else Distance(int((left != right).sum()))
    return total


def _distance(left: torch.Tensor, right: torch.Tensor) -> Distance:
    a, b = left.to(torch.float64), right.to(torch.float64)
    d = b - a
    equal = left == right if left.dtype == right.dtype and not left.is_floating_point() else a == b
    differs = ~(equal | (a.isnan() & b.isnan()))
    d.masked_fill_(~differs, 0.0)  # infinity minus itself would be NaN
    return Distance(
        unequal=int(differs.sum()),
        largest=float(d.abs().max()),
        squared_a=float(a.dot(a)),
        squared_b=float(b.dot(b)),
        squared=float(d.dot(d)),
        along=float(a.dot(d)),
    )


def _compare(first: Checkpoint, second: Checkpoint) -> CheckpointDiff:
    names_a = first.tensors.keys() | first.ties.keys()
    names_b = second.tensors.keys() | second.ties.keys()
    everything_a, everything_b = names_a | first.extra.keys(), names_b | second.extra.keys()
    shapes, dtypes, distances = {}, {}, {}
    compared: set[tuple[str, str]] = set()
    for name in sorted(names_a & names_b):
        a, b = _find(first, name), _find(second, name)
        if (a.name, b.name) in compared:
            continue
        compared.add((a.name, b.name))
        if a.dtype != b.dtype:
            dtypes[name] = (a.dtype, b.dtype)
        if a.shape != b.shape:
            shapes[name] = (a.shape, b.shape)
        elif _comparable(a, b):
            distances[name] = distance(a, b)
    return CheckpointDiff(
        only_a=tuple(sorted(everything_a - everything_b)),
        only_b=tuple(sorted(everything_b - everything_a)),
        shapes=shapes,
        dtypes=dtypes,
        distances=distances,
        extra=tuple(
            name
            for name in sorted((everything_a & everything_b) - (names_a & names_b))
            if not _same_state(name, first, second)
        ),
    )


def _same_state(name: str, first: Checkpoint, second: Checkpoint) -> bool:
    """Whether state that is no tensor is equal; compared as text, in which NaN is equal to NaN."""
    in_both = name in first.extra and name in second.extra
    return in_both and repr(first.extra[name]) == repr(second.extra[name])


def _find(checkpoint: Checkpoint, name: str) -> StoredTensor:
    return checkpoint.tensors[checkpoint.ties.get(name, name)]


def _comparable(a: StoredTensor, b: StoredTensor) -> bool:
    """Real with real, complex with complex, packed values below a byte only with their own dtype."""
    if a.dtype == b.dtype:
        return True
    known = a.dtype in TORCH_DTYPES and b.dtype in TORCH_DTYPES
    return known and a.dtype.startswith("C") == b.dtype.startswith("C")


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
