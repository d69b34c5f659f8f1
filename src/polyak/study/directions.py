"""Random directions in weight space, normalised or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from polyak.errors import require
from polyak.study.frame import Frame, Push, wide

Normalize = Literal["filter"] | None


class Directions:
    r"""R random directions, drawn again from their seed whenever they are asked for.

    Uniform on the unit sphere of all that changes, $d = g / |g|$ with $g$ gaussian (Izmailov et al. 2018,
    arXiv 1803.05407). With `normalize="filter"` every filter, one row of a tensor of two or more dimensions, is
    as long as that of the weights $w$, $d_f = g_f |w_f| / |g_f|$, and tensors of one dimension (biases, the
    layers of BatchNorm) stay (Li et al. 2018, arXiv 1712.09913).
    """

    def __init__(self, frame: Frame, normalize: Normalize, seed: int) -> None:
        require(
            normalize in (None, "filter"),
            f"normalize is {normalize!r}; expected None or 'filter'.",
        )
        self._frame, self._normalize, self._seed = frame, normalize, seed
        if normalize == "filter":
            wider = [n for n in frame.parameters if frame.anchors[0].tensors[n].ndim > 1]
            require(
                bool(wider),
                "No tensor has two or more dimensions, so there is no filter to normalise by. Leave out normalize=.",
            )

    def pushes(self, ray: int, centre: int, distances: Sequence[float]) -> list[Push]:
        """The steps along one ray from a centre, counted as in the frame."""
        direction = self.direction(ray, centre)
        content = f"ray {self._seed} {ray} {self._normalize}"
        return [Push(content, direction, distance) for distance in distances]

    def direction(self, ray: int, centre: int) -> Mapping[str, Tensor]:
        """In float64, by the names of tensors."""
        weights = self._frame.anchors[centre].tensors
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + ray) % 2**63)
        drawn = {
            name: torch.randn(
                weights[name].shape, generator=generator, dtype=wide_dtype(weights[name])
            )
            for name in self._frame.parameters
        }
        if self._normalize == "filter":
            return {n: _as_long_as(d, wide(weights[n])) for n, d in drawn.items() if d.ndim > 1}
        length = float(torch.stack([d.abs().square().sum() for d in drawn.values()]).sum().sqrt())
        return {name: d / length for name, d in drawn.items()}


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """float64, or complex128."""
    return torch.complex128 if tensor.is_complex() else torch.float64


def _as_long_as(direction: Tensor, weights: Tensor) -> Tensor:
    """Each row scaled to the length of that row of the weights; 0 where that is 0."""
    length = [t.flatten(1).abs().square().sum(1).sqrt() for t in (weights, direction)]
    ratio = length[0] / length[1].clamp(min=torch.finfo(torch.float64).tiny)
    return direction * ratio.reshape(-1, *[1] * (direction.ndim - 1))
