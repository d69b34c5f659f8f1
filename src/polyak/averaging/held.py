"""How averages are kept, and what each of them keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyak.averaging.clock import Clock
from polyak.averaging.running import Running
from polyak.averaging.snapshots import Snapshots
from polyak.errors import ArgumentError
from polyak.maths.profiles import Profile


@dataclass(frozen=True)
class Options:
    """How averages are kept: their dtype and device, and what to do about non-finite weights."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None
    nonfinite: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float32, torch.float64):
            raise ArgumentError(
                f"dtype is {self.dtype}; expected torch.float32 or torch.float64: an average kept "
                "in fewer bits stalls. Results come in the dtype of the weights anyway."
            )
        if self.nonfinite not in (None, "skip", "raise"):
            raise ArgumentError(
                f"nonfinite is {self.nonfinite!r}; expected 'skip', 'raise', or None."
            )


@dataclass
class Held:
    """What one average keeps."""

    clock: Clock
    store: Running | Snapshots | None = None
    statistics: list[Tensor] = field(default_factory=list)
    statistics_are_fresh: bool = False
    is_lent: bool = False  # to the model, by `applied`
    said_empty: bool = False

    @property
    def profile(self) -> Profile:
        """How much each moment counts."""
        return self.clock.profile

    def is_empty(self) -> bool:
        """Whether nothing has been averaged yet; this waits for a device that holds the time."""
        return self.store is None or float(self.clock.count) == 0
