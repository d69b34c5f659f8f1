"""Permutations and augmentations, each a pure function of (seed, epoch, index).

The draws for an epoch come from a counter-based generator keyed by (seed, epoch, purpose), of which
image `index` takes the index-th: nothing carries over from one epoch to the next, so a resumed run
sees what an uninterrupted one does, and so do the arms of one seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_PERMUTATION, _FLIPS, _SHIFTS = 0, 1, 2


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order in which an epoch takes `n` images, int64 `(n,)`.

    >>> sorted(permutation(0, 5, 4).tolist())
    [0, 1, 2, 3]
    """
    return torch.from_numpy(_generator(seed, epoch, _PERMUTATION).permutation(n))


@dataclass(frozen=True)
class Augmentation:
    """Random flips and shifts for one epoch: what each image gets depends on its index alone.

    `flipped` is bool `(n,)`, `shifts` int64 `(n, 2)`, rows and columns in pixels, or None for
    neither. Shifted images are filled with the value at their top left corner, their background.
    """

    flipped: Tensor | None
    shifts: Tensor | None

    @classmethod
    def draw(cls, seed: int, epoch: int, n: int, *, flips: bool, shift: int) -> Augmentation:
        """Flips with probability 1/2; shifts uniform over -shift to shift in each direction."""
        flipped = _generator(seed, epoch, _FLIPS).random(n) < 0.5
        shifts = _generator(seed, epoch, _SHIFTS).integers(-shift, shift + 1, size=(n, 2))
        return cls(
            flipped=torch.from_numpy(flipped) if flips else None,
            shifts=torch.from_numpy(shifts) if shift else None,
        )

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """The images `(b, c, h, w)` that stand at `indices` in the data, augmented."""
        if self.flipped is not None:
            flipped = self.flipped[indices].to(images.device)
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        if self.shifts is not None:
            images = shifted(images, self.shifts[indices].to(images.device))
        return images


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Each image `(b, c, h, w)` moved down and right by its row of `shifts`, int64 `(b, 2)`.

    >>> shifted(torch.tensor([[[[0.0, 0.0], [7.0, 8.0]]]]), torch.tensor([[-1, 1]]))
    tensor([[[[0., 7.],
              [0., 0.]]]])
    """
    n, _, height, width = images.shape
    margin = int(shifts.abs().max())
    background = images[:, :, :1, :1]
    padded = pad(images - background, (margin,) * 4)
    rows = torch.arange(height, device=images.device) + margin - shifts[:, :1]
    columns = torch.arange(width, device=images.device) + margin - shifts[:, 1:]
    picked = padded[
        torch.arange(n, device=images.device)[:, None, None],
        :,
        rows[:, :, None],
        columns[:, None, :],
    ]  # (b, h, w, c): advanced indices come first
    return picked.permute(0, 3, 1, 2) + background


def _generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    key = np.random.SeedSequence([seed, epoch, purpose])
    return np.random.Generator(np.random.Philox(key))
