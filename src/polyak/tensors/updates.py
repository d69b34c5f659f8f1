"""What an update does to one average: the two ways of carrying it out, by torch and by a kernel, read this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

Weight = float | Tensor


@dataclass(eq=False)
class Targets:
    """What one average changes, one tensor per live one; and the same in groups, for torch."""

    tensors: list[Tensor]
    groups: list[list[Tensor]] = field(default_factory=list)  # made when they are needed


class Update(NamedTuple):
    """One average's part in an update: its tensors, and the weight of the live ones.

    `lerp_` by that weight toward the live weights or, with `adds`, `add_` of them times the weight.
    """

    targets: Targets
    weight: Weight
    adds: bool = False
