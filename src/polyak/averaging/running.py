r"""The running average of a streaming profile, exact however small the share gets.

`average += share * (weights - average)` is exact in the reals. In float32 it stalls once
`share * |weights - average|` falls below half a unit in the last place: an equal mean of 200,000
smoothly drifting weights is then off by 4e-3. So below a share of $2^{-12}$ weights are gathered in
a *block*: a second average, of the profile restricted to the time since the block began at $T$,

$$share_{block}(t) = \frac{share(t, dt)}{share(t, t - T)},$$

which is near $1 / n$ for the $n$-th weights of the block, and is folded into the first with
$share(t, t - T)$ every 512 updates (later, at most every 4096, while that too is below $2^{-12}$).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.clock import Clock, Number
from polyak.tensors.blend import Cutter, Move, blank_like, toward

SMALLEST_SHARE = 2.0**-12
BLOCK_UPDATES = 512
LONGEST_BLOCK = 4096


class Running:
    """One tensor per weight, and a second one while a block is open."""

    def __init__(
        self, live: Sequence[Tensor], dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        self._dtype = dtype
        self._device = device
        self.tensors = blank_like(live, dtype, device)
        self.block: list[Tensor] = []  # made when the first block opens, kept from then on
        self.block_is_open = False
        self.block_updates = 0
        self.block_start: Number = 0.0

    def cut(self, cutter: Cutter) -> None:
        """Take up a new way of cutting the tensors."""
        self._cutter = cutter
        self._groups = cutter.cut(self.tensors)
        self._block_groups = cutter.cut(self.block) if self.block else []

    def move(self, before: Clock, now: Clock, *, capturing: bool = False) -> Move | None:
        """How this average moves at `now`; None where nothing enters."""
        if not now.on_device and now.share == 0:
            return None
        if not (self.block_is_open or capturing) and _is_small(before, now):
            self._open_block(before.time, zeros=now.on_device)
        if self.block_is_open:
            return Move(self._block_groups, self._share_in_block(now))
        return Move(self._groups, now.share)

    def settle(self, now: Clock) -> None:
        """After the move: count it, and fold a full block."""
        if not self.block_is_open:
            return
        self.block_updates += 1
        if self.block_updates >= LONGEST_BLOCK or (
            self.block_updates >= BLOCK_UPDATES and self._fold_is_large(now)
        ):
            for group, block in zip(self._groups, self._block_groups, strict=True):
                toward(group, block, now.share_since(self.block_start))
            self.block_is_open = False

    def adopt(self, values: Sequence[Tensor]) -> None:
        """Average more tensors, which have been constant so far."""
        self.tensors += _filled(values, self._dtype, self._device)
        if self.block:
            self.block += _filled(values, self._dtype, self._device)

    def is_plain(self) -> bool:
        """Whether `tensors` are the average as they stand, with no open block beside them."""
        return not self.block_is_open

    def render(self, index: int, now: Clock) -> Tensor:
        """The average of one tensor at `now`, in the accumulator's precision; it may be its own."""
        if not self.block_is_open:
            return self.tensors[index]
        share = now.read().share_since(float(self.block_start))
        return torch.lerp(self.tensors[index], self.block[index], float(share))

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain: name to accumulator, and the open block."""
        return {
            "tensors": dict(zip(names, self.tensors, strict=True)),
            "block": self._block_state(names) if self.block_is_open else None,
        }

    def load(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take the values of a checked state."""
        _copy(self.tensors, state["tensors"], names)
        block = state["block"]
        self.block_is_open = block is not None
        if block is not None:
            self.block_updates, self.block_start = block["updates"], block["start"]
            self._make_block()
            _copy(self.block, block["tensors"], names)

    def _block_state(self, names: Sequence[str]) -> dict[str, Any]:
        return {
            "updates": self.block_updates,
            "start": float(self.block_start),
            "tensors": dict(zip(names, self.block, strict=True)),
        }

    def _open_block(self, start: Number, *, zeros: bool) -> None:
        if not self.block:
            self._make_block()
        if zeros:  # on the device path the first weight may be 0 or 1: only zeros suit both
            torch._foreach_zero_(self.block)
        self.block_start, self.block_updates, self.block_is_open = start, 0, True

    def _make_block(self) -> None:
        if not self.block:
            with torch.inference_mode(False):
                self.block = [torch.zeros_like(tensor) for tensor in self.tensors]
            self._block_groups = self._cutter.cut(self.block)

    def _share_in_block(self, now: Clock) -> Number:
        if not self.block_updates and not now.on_device:
            return 1.0
        whole: Any = now.share_since(self.block_start)
        if isinstance(whole, Tensor):
            return torch.where(whole > 0, now.share / whole, 0.0)
        return float(now.share) / float(whole)

    def _fold_is_large(self, now: Clock) -> bool:
        if now.on_device:  # decided without asking the device
            return True
        return bool(now.share_since(self.block_start) >= SMALLEST_SHARE)


def _is_small(before: Clock, now: Clock) -> bool:
    """Whether a block is called for: decided on the host, from the time if nothing was skipped."""
    if not now.on_device:
        return bool(now.share < SMALLEST_SHARE)
    elapsed = now.latest - before.latest
    if now.latest <= now.profile.start or elapsed <= 0:
        return False
    # The first weights enter with 1 whatever the profile says; asked only until it is so.
    small = now.profile.share(now.latest, min(elapsed, now.latest)) < SMALLEST_SHARE
    return small and bool(before.count > 0)


def _filled(
    values: Sequence[Tensor], dtype: torch.dtype | None, device: torch.device | None
) -> list[Tensor]:
    blanks = blank_like(values, dtype, device)
    torch._foreach_copy_(blanks, [value.detach() for value in values])
    return blanks


def _copy(targets: Sequence[Tensor], sources: Mapping[str, Tensor], names: Sequence[str]) -> None:
    torch._foreach_copy_(list(targets), [sources[name] for name in names])
