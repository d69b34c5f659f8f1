"""Points between checkpoints: combinations of their weights, computed in float64, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.errors import ArgumentError, NonFiniteError, check_match, require, some
from polyak.study.evaluations import digest_of
from polyak.study.evaluator import Subject, in_file
from polyak.study.filling import (
    Weights,
    check_shapes,
    first_names_in,
    has_statistics,
    parameters_of,
)
from polyak.tensors.policy import RUNNING_STATISTICS
from polyak.tensors.spectral import is_spectral_vector

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Anchor:
    """The weights of one checkpoint. dtypes: of what is made of them, where it is not their own."""

    name: str
    tensors: Mapping[str, Tensor]
    content: str
    dtypes: Mapping[str, torch.dtype] | None = None

    def moves(self, name: str) -> bool:
        """Whether this is a coordinate: of floating point, no running statistic or spectral vector."""
        tensor = self.tensors[name]
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return False
        statistic = name.rpartition(".")[2] in RUNNING_STATISTICS
        return not statistic and not is_spectral_vector(name, self.tensors, tensor.shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of the points: this checkpoint's, or float32 where that is of half precision or less."""
        stored = (self.dtypes or {}).get(name, self.tensors[name].dtype)
        return torch.float32 if stored.is_floating_point and stored.itemsize < 4 else stored


@dataclass(frozen=True)
class Push:
    """A step away from the checkpoints: `distance` times a direction. content: what that is made of."""

    content: str
    direction: Mapping[str, Tensor]
    distance: float


class Frame:
    """Checkpoints of one model, and the points that are combinations of them.

    A point is given by one share for each checkpoint; the shares sum to 1. Floating-point tensors are
    combined in float64 and rounded once, to the dtype of the nearest checkpoint (that with the largest share),
    float32 at least. Running statistics, integers and booleans are those of the nearest.

    Raises MismatchError, naming every difference, where tensors do not line up.
    """

    def __init__(self, anchors: Sequence[Anchor], model: Module | None = None) -> None:
        self.anchors = tuple(anchors)
        first = self.anchors[0]
        for other in self.anchors[1:]:
            check_match(
                _described(other),
                _described(first),
                f"{other.name} and {first.name} are not weights of one model.",
            )
        if model is not None:
            shapes = {name: list(tensor.shape) for name, tensor in first.tensors.items()}
            check_shapes(model, shapes, f"{first.name} holds no weights of this model")
        _refuse_nonfinite(self.anchors)
        self.moving = tuple(name for name in first.tensors if first.moves(name))
        require(bool(self.moving), f"{first.name} has no weights of floating point to move.")
        self._parameters = None if model is None else parameters_of(model)

    @property
    def has_statistics(self) -> bool:
        """Whether there are running statistics, which a point between has not of its own."""
        return has_statistics(self.anchors[0].tensors)

    @property
    def parameters(self) -> tuple[str, ...]:
        """What a random direction changes: the model's parameters; without a model all that moves."""
        known = self._parameters
        return tuple(n for n in self.moving if known is None or n in known)

    def at(self, index: int) -> list[float]:
        """The shares of the point that is a checkpoint."""
        return [float(i == index) for i in range(len(self.anchors))]

    def gram(self) -> Floats:
        """Inner products of the differences from the first checkpoint, (K, K), in float64."""
        size = len(self.anchors)
        products = np.zeros((size, size))
        for name in self.moving:
            base = wide(self.anchors[0].tensors[name])
            rows = torch.stack([wide(a.tensors[name]) - base for a in self.anchors])
            flat = rows.reshape(size, -1)
            products += (flat @ flat.mH).real.numpy()
        return products

    def norm(self, index: int) -> float:
        """The length of a checkpoint's vector of what random directions change."""
        squares = (
            float(wide(self.anchors[index].tensors[n]).abs().square().sum())
            for n in self.parameters
        )
        return float(np.sqrt(sum(squares)))

    def tensors(
        self, shares: Sequence[float], push: Push | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The point's tensors, one at a time."""
        nearest = self.anchors[int(np.argmax(shares))]
        used = [(share, a) for share, a in zip(shares, self.anchors, strict=True) if share]
        for name, own in nearest.tensors.items():
            step = push.direction.get(name) if push is not None and push.distance else None
            if name not in self.moving or (len(used) == 1 and step is None):
                yield name, own.to(nearest.dtype(name)) if name in self.moving else own
                continue
            total = sum(share * wide(anchor.tensors[name]) for share, anchor in used)
            if step is not None and push is not None:
                total = total + push.distance * step
            yield name, torch.as_tensor(total).to(nearest.dtype(name))

    def subject(self, what: str, shares: Sequence[float], push: Push | None = None) -> Subject:
        """The point, to be evaluated."""
        lines = [f"{share!r} {a.content}" for share, a in zip(shares, self.anchors, strict=True)]
        if push is not None and push.distance:
            lines.append(f"{push.distance!r} {push.content}")
        return Subject(
            what,
            "\n".join(["point", *(line for line in lines if not line.startswith("0.0 "))]),
            lambda into: self.tensors(shares, push),
            lambda: in_file(self.tensors(shares, push), "point.safetensors"),
        )


def wide(tensor: Tensor) -> Tensor:
    """In float64, or complex128, on the CPU."""
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)


def anchors_of(
    points: Mapping[str, Weights] | Sequence[Weights],
    *,
    key: str | None = None,
    model: object = None,
) -> list[Anchor]:
    """Checkpoints by name: paths under their own, state dicts under those of a mapping or 1, 2, 3.

    key: as for `open_checkpoint`. model: what is tied in it has one name. Raises what that raises, and ArgumentError for anything else.
    """
    if isinstance(points, Mapping):
        named = [(str(name), weights) for name, weights in points.items()]
        require(
            len(dict(named)) == len(named), f"Two names of {list(points)} read alike. Change one."
        )
    elif isinstance(points, list | tuple):
        named = list(zip(_names(points), points, strict=True))
    else:
        raise ArgumentError(
            f"inputs is a {type(points).__name__}; expected checkpoints: a list, or a mapping from names."
        )
    return [_anchor(name, weights, key, model) for name, weights in named]


def counted(anchors: Sequence[Anchor]) -> str:
    """How many there are, as a sentence begins."""
    one = len(anchors) == 1
    return f"There {'is' if one else 'are'} {len(anchors) or 'no'} checkpoint{'' if one else 's'}"


def _anchor(name: str, weights: Any, key: str | None, model: object) -> Anchor:
    if isinstance(weights, str | Path):
        with open_checkpoint(weights, key=key) as opened:
            tensors = {one: stored.load() for one, stored in opened.tensors.items()}
    elif isinstance(weights, Mapping) and all(map(torch.is_tensor, weights.values())):
        tensors = _once(weights)
    else:
        raise ArgumentError(
            f"{name} is a {type(weights).__name__}; expected the path of a checkpoint, or a state dict of tensors."
        )
    tensors = first_names_in(model, tensors)
    return Anchor(name, tensors, content_of(tensors))


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies; a tied tensor under its first name, as files have it."""
    found, seen = {}, set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if not tensor.numel() or place not in seen:
            seen.add(place)
            found[name] = tensor.detach().clone()
    return found


def content_of(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {digest_of(tensors[name])}".encode())
    return digest.hexdigest()


def _names(points: Sequence[Weights]) -> list[str]:
    """The file's name, or as much of the path as tells it from the others."""
    paths = [Path(p) if isinstance(p, str | Path) else None for p in points]
    short = [path.name if path else f"point {i}" for i, path in enumerate(paths, 1)]
    unique = len(set(short)) == len(short)
    names = short if unique else [str(p) if p else s for p, s in zip(paths, short, strict=True)]
    again = {name for name in names if names.count(name) > 1}
    require(not again, f"{some(sorted(again))} is named twice. Name different checkpoints.")
    return names


def _described(anchor: Anchor) -> dict[str, str]:
    return {
        name: f"{list(tensor.shape)} {'numbers' if anchor.moves(name) else 'kept'}"
        for name, tensor in anchor.tensors.items()
    }


def _refuse_nonfinite(anchors: Sequence[Anchor]) -> None:
    for anchor in anchors:
        bad = [
            name
            for name, tensor in anchor.tensors.items()
            if anchor.moves(name) and not bool(torch.isfinite(wide(tensor)).all())
        ]
        if bad:
            raise NonFiniteError(
                f"{anchor.name} holds NaN or infinity in {some(bad)}: no point between it and others has a "
                "value. Leave it out."
            )
