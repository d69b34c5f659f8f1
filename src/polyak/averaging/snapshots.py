"""The average over a window: the weights of its captures are kept, and evicted as they leave it.

What leaves a window must be known, so nothing short of keeping it is exact. Snapshots are kept in
the dtype of the weights (that loses nothing), on their device or another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.clock import Clock
from polyak.tensors.blend import accumulator_dtype


class Snapshots:
    """The captures in the window, each with the time since the one before it."""

    def __init__(
        self, live: Sequence[Tensor], dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        self._live = live
        self._dtype = dtype
        self._device = device
        self.kept: list[
            tuple[float, float, list[Tensor]]
        ] = []  # (from, to], the weights at its end

    def take(self, before: Clock, now: Clock) -> None:
        """Keep the weights of now, which stand for the time since the last, and evict."""
        if now.share == 0:  # the profile has not begun
            return
        start, end = float(before.time), float(now.time)
        self.kept.append((start, end, _copies(self._live, self._device)))
        profile = now.profile
        self.kept = [k for k in self.kept if profile.interval_mass(k[0], k[1], end) > 0]

    def follow(self, live: Sequence[Tensor]) -> None:
        """The live tensors were replaced by others of the same names."""
        self._live = live

    def adopt(self, values: Sequence[Tensor], now: Clock) -> None:
        """Average more tensors, which have been constant so far: one copy serves all snapshots."""
        shared = _copies(values, self._device)
        self.kept = [(start, end, tensors + shared) for start, end, tensors in self.kept]

    def groups(self) -> list[list[Tensor]]:
        """All that is kept, in lists of one tensor per weight."""
        return [tensors for _, _, tensors in self.kept]

    def is_plain(self) -> bool:
        """No tensor that is kept is the average itself."""
        return False

    def weights(self, now: Clock) -> list[float]:
        """The share of each snapshot at `now`; they sum to 1."""
        profile, time = now.profile, float(now.time)
        shares = [profile.interval_mass(start, end, time) for start, end, _ in self.kept]
        total = sum(shares)  # below 1 where the first captures came late
        return [share / total for share in shares]

    def render(self, index: int, now: Clock) -> Tensor:
        """The average of one tensor at `now`, in the accumulator's precision."""
        newest = self.kept[-1][2][index]
        result = torch.zeros_like(newest, dtype=accumulator_dtype(newest.dtype, self._dtype))
        so_far = 0.0
        for share, (_, _, tensors) in zip(self.weights(now), self.kept, strict=True):
            so_far += share
            # A running mean, not a sum: equal weights stay what they are, to the last bit.
            result.lerp_(tensors[index].to(result.dtype), share / so_far)
        return result

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain: no accumulators, but the snapshots."""
        return {
            "tensors": {},
            "snapshots": [
                {"from": start, "to": end, "tensors": dict(zip(names, tensors, strict=True))}
                for start, end, tensors in self.kept
            ],
        }

    def load(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take the values of a checked state."""
        self.kept = [
            (s["from"], s["to"], self._taken(s["tensors"], names)) for s in state["snapshots"]
        ]

    def _taken(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
        copies = _copies(self._live, self._device)
        torch._foreach_copy_(copies, [tensors[name] for name in names])
        return copies


def _copies(tensors: Sequence[Tensor], device: torch.device | None) -> list[Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        return [
            torch.empty_like(t, device=device or t.device).copy_(t)
            for t in map(Tensor.detach, tensors)
        ]
