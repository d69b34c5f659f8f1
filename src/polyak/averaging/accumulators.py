r"""The running average of a streaming profile, exact however small the share gets.

`average += share * (weights - average)` is exact in the reals. In float32 it stalls once
`share * |weights - average|` falls below half a unit in the last place: an equal mean of 200,000
slowly drifting weights is then off by 4e-3. So below a share of $2^{-10}$ weights are gathered in a
*block*, a plain weighted sum beside the average $A$ that was there when the block began at $T$:

$$S = \sum_i g_i w_i, \qquad g_i = M_i \, share_i, \qquad M_t = \frac{1}{1 - share(t, t - T)},$$

$M$ being how much all mass has grown since $T$, and the average is $(A + S) / M$. A sum does not
stall: what it rounds off is half a unit of the small $S$. Every 64 updates it is folded into $A$,
and what that addition rounds off is where the next sum begins, so nothing is lost (Fast2Sum,
Dekker 1971). Shorter blocks cost more folds; in longer ones the roundings of the sum add up.

The average over a window: the weights of its captures are kept, and evicted as they leave it.

What leaves a window must be known, so nothing short of keeping it is exact. Snapshots are kept in
the dtype of the weights (that loses nothing), on their device or another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.clock import Clock, Number
from polyak.tensors.blend import Cutter, Move, accumulator_dtype, blank_like, paired_parts

SMALLEST_SHARE = 2.0**-10
BLOCK_UPDATES = 64


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

    def move(self, before: Clock, now: Clock, *, in_blocks: bool) -> Move | None:
        """How this average moves at `now`; None where nothing enters."""
        if not now.on_device and now.share == 0:
            return None
        if not (in_blocks and _is_small(before, now)):
            self.close_block(before)
            return Move(self._groups, now.share)
        if not self.block_is_open:
            # The first weights enter with 1 whatever the profile says: until one has, no block. This
            # waits for a device that holds the count, but only while no block is open.
            if float(before.count) == 0:
                return Move(self._groups, now.share)
            self._open_block(before)
        grown: Any = self._growth(now)
        return Move(self._block_groups, grown * now.share, adds=True)

    def settle(self, now: Clock) -> None:
        """After the move: count it, and fold a full block."""
        if not self.block_is_open:
            return
        self.block_updates += 1
        if self.block_updates >= BLOCK_UPDATES:
            self._fold(now)

    def adopt(self, values: Sequence[Tensor], now: Clock) -> None:
        """Average more tensors, which have been constant so far."""
        own = _filled(values, self._dtype, self._device)
        self.tensors += own
        if self.block:
            gathered = float(self._growth(now.read())) - 1 if self.block_is_open else 0.0
            self.block += [value * gathered for value in own]

    def groups(self) -> list[list[Tensor]]:
        """All that is kept, in lists of one tensor per weight."""
        return [self.tensors, self.block] if self.block_is_open else [self.tensors]

    def is_plain(self) -> bool:
        """Whether `tensors` are the average as they stand, with no open block beside them."""
        return not self.block_is_open

    def render(self, index: int, now: Clock) -> Tensor:
        """The average of one tensor at `now`, in the accumulator's precision; it may be its own."""
        average = self.tensors[index]
        if not self.block_is_open:
            return average
        return average + _correction(average, self.block[index], self._growth(now.read()))

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain: name to accumulator, and the open block."""
        return {
            "tensors": dict(zip(names, self.tensors, strict=True)),
            "block": self._block_state(names) if self.block_is_open else None,
        }

    def load(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take the values of a checked state."""
        _copy(self.tensors, state["tensors"], names)
        block = state.get("block")
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

    def _open_block(self, before: Clock) -> None:
        self._make_block()
        torch._foreach_zero_(self.block)
        self.block_start, self.block_updates, self.block_is_open = before.time, 0, True

    def close_block(self, before: Clock) -> None:
        """Fold what an open block holds, and go on without one."""
        if self.block_is_open:
            self._fold(before)
            self.block_is_open = False  # what the fold rounded off is below the next rounding

    def _make_block(self) -> None:
        if not self.block:
            with torch.inference_mode(False):
                self.block = [torch.zeros_like(tensor) for tensor in self.tensors]
            self._block_groups = self._cutter.cut(self.block)

    def _fold(self, now: Clock) -> None:
        growth = self._growth(now)
        for whole, whole_block in zip(self.tensors, self.block, strict=True):
            for average, block in paired_parts(whole, whole_block):
                correction = _correction(average, block, growth)
                folded = average + correction
                torch.sub(correction, folded - average, out=block)  # what that addition rounded off
                average.copy_(folded)
        self.block_start, self.block_updates = now.time, 0

    def _growth(self, now: Clock) -> Number:
        return 1 / (1 - now.share_since(self.block_start))


def _correction(average: Tensor, block: Tensor, growth: Number) -> Tensor:
    """`(average + block) / growth - average`, without cancelling the digits of the average."""
    if isinstance(growth, Tensor):
        growth = growth.to(average.device, average.real.dtype)
    return (block - average * (growth - 1)) / growth


def _is_small(before: Clock, now: Clock) -> bool:
    """Whether a block is called for: decided on the host, from the time if nothing was skipped."""
    if not now.on_device:
        return bool(now.share < SMALLEST_SHARE)
    elapsed = now.latest - before.latest
    if now.latest <= now.profile.start or elapsed <= 0:
        return False
    return bool(now.profile.share(now.latest, min(elapsed, now.latest)) < SMALLEST_SHARE)


def _filled(
    values: Sequence[Tensor], dtype: torch.dtype | None, device: torch.device | None
) -> list[Tensor]:
    blanks = blank_like(values, dtype, device)
    torch._foreach_copy_(blanks, [value.detach() for value in values])
    return blanks


def _copy(targets: Sequence[Tensor], sources: Mapping[str, Tensor], names: Sequence[str]) -> None:
    torch._foreach_copy_(list(targets), [sources[name] for name in names])


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
