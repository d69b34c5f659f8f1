"""What an average keeps of the weights: one class for each way of keeping it.

`RunningAverage` serves every streaming profile, `WindowAverage` the profiles that must know what
leaves them. A further one is a subclass of `Accumulator` and a line in `accumulator_class`, or is named
where the average joins its tracker (`SpreadAverage`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from polyak.averaging.clock import Clock, Number
from polyak.errors import ArgumentError
from polyak.maths.arguments import flag
from polyak.maths.profile import Profile
from polyak.maths.profiles import Window
from polyak.tensors.blend import (
    GroupedTensors,
    accumulator_dtype,
    blank_like,
    correction,
)
from polyak.tensors.packed import Packed
from polyak.tensors.sharding import Span, narrowed
from polyak.tensors.updates import Update

Part = Sequence[Span]  # of a tensor: from, to in each dimension; all of it if empty
SMALLEST_SHARE = 2.0**-10
BLOCK_UPDATES = 64


@dataclass(frozen=True)
class Options:
    """How averages are kept: dtype, device, what to do about non-finite weights, CUDA graphs.

    rank: how many deviations are kept, and on which device, where the spread is.
    """

    dtype: torch.dtype | None = None
    device: torch.device | None = None
    nonfinite: str | None = None
    capturable: bool = False
    rank: int = 0
    deviations_device: torch.device | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float32, torch.float64):
            raise ArgumentError(
                f"dtype is {self.dtype}; expected torch.float32 or torch.float64: an average kept "
                "in fewer bits stalls. Results come in the dtype of the weights anyway."
            )
        flag("capturable", self.capturable)
        mode: object = self.nonfinite
        if mode is not None and not (isinstance(mode, str) and mode in ("skip", "raise")):
            raise ArgumentError(
                f"nonfinite is {self.nonfinite!r}; expected 'skip', 'raise', or None."
            )


class Accumulator(ABC):
    """What one average keeps, in lists of one tensor per averaged weight, in their order.

    While it is lent, `packed` are those of its `swap_targets` that hold a weight as well, by index.
    `block_is_open` while a part of the average is not in the tensors that it is to end in.
    """

    packed: Mapping[int, Packed] = MappingProxyType({})
    block_is_open: bool = False

    @abstractmethod
    def __init__(self, live: Sequence[Tensor], options: Options) -> None:
        """Make room for tensors like the live ones."""

    @classmethod  # noqa: B027 - nothing to do for most
    def check_model(cls, model: Module) -> None:
        """Raise ArgumentError for a model whose tensors it cannot keep."""

    @abstractmethod
    def update(self, before: Clock, now: Clock) -> Update | None:
        """Take the weights of `now`, by itself or by the update that is returned; None if it did."""

    def restart(self) -> None:  # noqa: B027 - nothing to do for most
        """Time begins again: the next weights enter with share 1, whatever is held now."""

    def settle(self, now: Clock) -> None:  # noqa: B027 - nothing to do for most
        """Called once the returned update has been applied."""

    @abstractmethod
    def regroup(self, live: Sequence[Tensor], grouped: GroupedTensors) -> None:
        """The live tensors are others than before, or are grouped differently."""

    @abstractmethod
    def add(self, values: Sequence[Tensor], now: Clock) -> None:
        """Average more tensors, which have been constant so far."""

    def blend_targets(self) -> list[Tensor]:
        """The tensors that returned updates change; empty if it never returns one."""
        return []

    @abstractmethod
    def tensors_held(self) -> list[list[Tensor]]:
        """All tensors, in lists of one per weight."""

    def tensors_to_check(self) -> list[list[Tensor]]:
        """The same, or tensors that are finite if these are."""
        return self.tensors_held()

    @abstractmethod
    def value(self, index: int, now: Clock, part: Part = ()) -> Tensor:
        """The average of one tensor at `now`, or of a part of it, in its own precision.

        It may be a tensor that the accumulator holds.
        """

    def swap_targets(self) -> list[Tensor]:
        """The tensors that are the average as they stand, to swap into the model; empty if none are.

        An in-place swap moves their contents to the live tensors, and puts those into this list.
        """
        return []

    @abstractmethod
    def effective_samples(self, now: Clock) -> float:
        """1 / (sum of squared shares)."""

    @abstractmethod
    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain values and tensors by name, which `load_state` takes; "tensors" is always there."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take the values of a checked state."""

    @classmethod
    @abstractmethod
    def check_state(cls, state: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
        """The groups of tensors in a state, each by name.

        Raises TypeError, KeyError, ValueError or AttributeError if it is damaged.
        """

    @classmethod
    @abstractmethod
    def dtype_held(cls, dtype: torch.dtype, options: Options) -> torch.dtype:
        """In what dtype weights of `dtype` are held."""

    @classmethod
    def tensors_per_weight(cls, options: Options) -> int:
        """How many it keeps for each weight; 1 where that depends on the course of the run."""
        return 1

    @classmethod
    @abstractmethod
    def describe(cls, nbytes: int, options: Options, held: Accumulator | None) -> list[str]:
        """What it costs, with `nbytes` for one tensor per weight, and how exact it is."""


class RunningAverage(Accumulator):
    r"""The running average of a streaming profile, exact however small the share gets.

    `average += share * (weights - average)` is exact in the reals. In float32 it stalls once
    `share * |weights - average|` falls below half a unit in the last place: an equal mean of 200,000
    slowly drifting weights is then off by 4e-3. So below a share of $2^{-10}$ weights are gathered in
    a *block*, a plain weighted sum beside the average $A$ at the time $T$ when the block began:

    $$S = \sum_i g_i w_i, \qquad g_i = M_i \, share_i, \qquad M_t = \frac{1}{1 - share(t, t - T)},$$

    $M$ being how much all mass has grown since $T$, and the average is $(A + S) / M$. A sum does not
    stall: what it rounds off is half a unit of the small $S$. Every 64 updates it is folded into $A$,
    and what that addition rounds off is where the next sum begins, so nothing is lost (Fast2Sum,
    Dekker 1971). Shorter blocks cost more folds; in longer ones the roundings of the sum add up.
    """

    def __init__(self, live: Sequence[Tensor], options: Options) -> None:
        self._options = options
        self.tensors = blank_like(live, options.dtype, options.device)
        self.block: list[Tensor] = []  # made when the first block opens, kept from then on
        self.block_is_open = False
        self.block_updates = 0
        self.block_start: Number = 0.0
        self.packed: Mapping[
            int, Packed
        ] = {}  # while lent: which hold their weight as well, by index

    def update(self, before: Clock, now: Clock) -> Update | None:
        """A step of the average toward the weights or, in a block, a sum."""
        if not now.on_device and now.share == 0:
            return None
        # The replays of a CUDA graph run no host code, which is what opens blocks and folds them.
        if self._options.capturable or not _is_small(before, now):
            if self.block_is_open:
                self._close_block(before)
            return Update(self._groups, now.share)
        if not self.block_is_open:
            # The first weights enter with 1 whatever the profile says: until one has, no block. This
            # waits for a device that holds the count, but only while no block is open.
            if float(before.count) == 0:
                return Update(self._groups, now.share)
            self._open_block(before)
        grown: Any = self._growth(now)
        return Update(self._block_groups, grown * now.share, adds=True)

    def settle(self, now: Clock) -> None:
        """Count the update, and fold a full block."""
        if not self.block_is_open or not (now.on_device or now.share):
            return
        self.block_updates += 1
        if self.block_updates >= BLOCK_UPDATES:
            self._fold(now)

    def restart(self) -> None:
        """The open block belongs to the time before."""
        self.block_is_open = False

    def regroup(self, live: Sequence[Tensor], grouped: GroupedTensors) -> None:
        """Group the accumulators as the live tensors are grouped."""
        self._grouped = grouped
        self._groups = grouped.group(self.tensors)
        self._block_groups = grouped.group(self.block)

    def add(self, values: Sequence[Tensor], now: Clock) -> None:
        """Average more tensors, which have been constant so far."""
        own = blank_like(values, self._options.dtype, self._options.device)
        torch._foreach_copy_(own, [value.detach() for value in values])
        self.tensors += own
        if self.block:
            gathered = float(self._growth(now.on_host())) - 1 if self.block_is_open else 0.0
            self.block += [value * gathered for value in own]

    def blend_targets(self) -> list[Tensor]:
        """The average itself: a block is laid out alike."""
        return self.tensors

    def tensors_held(self) -> list[list[Tensor]]:
        """The average, and the open block."""
        tensors = self._unpacked()
        return [tensors, self.block] if self.block_is_open else [tensors]

    def tensors_to_check(self) -> list[list[Tensor]]:
        """The same, without copies of what is packed, as a rule."""
        packed = self.packed
        if not packed:
            return RunningAverage.tensors_held(self)
        # No block is open then.
        return [[packed[i].finite() if i in packed else t for i, t in enumerate(self.tensors)]]

    def value(self, index: int, now: Clock, part: Part = ()) -> Tensor:
        """The average of one tensor at `now`: its own where no block is open."""
        whole = self.packed[index].average() if index in self.packed else self.tensors[index]
        average = narrowed(whole, part)
        if not self.block_is_open:
            return average
        return average + correction(average, narrowed(self.block[index], part), self._growth(now))

    def swap_targets(self) -> list[Tensor]:
        """The average, unless an open block holds a part of it."""
        return [] if self.block_is_open else self.tensors

    def effective_samples(self, now: Clock) -> float:
        """1 / (sum of squared shares), which the clock keeps."""
        return 1 / float(now.sum_squared_shares)

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """Name to accumulator, and the open block."""
        block = {
            "updates": self.block_updates,
            "start": float(self.block_start),
            "tensors": dict(zip(names, self.block, strict=False)),
        }
        tensors = dict(zip(names, self._unpacked(), strict=True))
        return {"tensors": tensors, "block": (block,) if self.block_is_open else ()}

    def load_state(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take the values of a checked state."""
        copy_by_name(self.tensors, state["tensors"], names)
        self.block_is_open = bool(state["block"])
        for block in state["block"] or ():
            self.block_updates, self.block_start = block["updates"], block["start"]
            self._make_block()
            copy_by_name(self.block, block["tensors"], names)

    @classmethod
    def check_state(cls, state: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
        """The accumulators and the open block."""
        groups = {"tensors": state["tensors"]}
        for block in state["block"] or ():
            float(block["start"] + block["updates"])
            groups["block"] = block["tensors"]
        return groups

    @classmethod
    def dtype_held(cls, dtype: torch.dtype, options: Options) -> torch.dtype:
        """Float32 at least."""
        return accumulator_dtype(dtype, options.dtype)

    @classmethod
    def describe(cls, nbytes: int, options: Options, held: Accumulator | None) -> list[str]:
        """One copy of the weights, two in blocks."""
        digits = 1.1e-16 if options.dtype is torch.float64 else 6.0e-8
        return [
            f"keeps {megabytes(nbytes)}; twice that once a share falls below {SMALLEST_SHARE:.1e}, "
            f"when weights are gathered in blocks of {BLOCK_UPDATES} updates",
            f"resolution: accumulators of float32 weights hold {digits:.1e} of a value in blocks, and "
            f"{13 * digits:.0e} before, while no share is below {SMALLEST_SHARE:.1e}",
        ]

    def _unpacked(self) -> list[Tensor]:
        """The average; copies of what is packed."""
        packed = self.packed
        return [packed[i].average() if i in packed else t for i, t in enumerate(self.tensors)]

    def _open_block(self, before: Clock) -> None:
        self._make_block()
        torch._foreach_zero_(self.block)
        self.block_start, self.block_updates, self.block_is_open = before.time, 0, True

    def _close_block(self, before: Clock) -> None:
        self._fold(before)
        self.block_is_open = False  # what the fold rounded off is below the next rounding

    def _make_block(self) -> None:
        if not self.block:
            with torch.inference_mode(False):
                self.block = [torch.zeros_like(tensor) for tensor in self.tensors]
            self._block_groups = self._grouped.group(self.block)

    def _fold(self, now: Clock) -> None:
        self._grouped.fold(self._groups, self._block_groups, self._growth(now))
        self.block_start, self.block_updates = now.time, 0

    def _growth(self, now: Clock) -> Number:
        return 1 / (1 - now.share_since(self.block_start))


class WindowAverage(Accumulator):
    """The average over a window: the weights of its captures are kept, and evicted as they leave it.

    What leaves a window must be known, so nothing short of keeping it is exact. Snapshots are kept
    in the dtype of the weights (that loses nothing), on their device or another one.
    """

    def __init__(self, live: Sequence[Tensor], options: Options) -> None:
        self._live = live
        self._options = options
        # (from, to], and the weights at its end
        self.kept: list[tuple[float, float, list[Tensor]]] = []

    def update(self, before: Clock, now: Clock) -> Update | None:
        """Keep the weights of now, which stand for the time since the last, and evict."""
        now = now.on_host()
        if now.share == 0:  # the profile has not begun, or the step was skipped
            return None
        start, end = float(before.time), float(now.time)
        self.kept.append((start, end, self._copies(self._live)))
        profile = now.profile
        self.kept = [k for k in self.kept if profile.interval_mass(k[0], k[1], end) > 0]
        return None

    def restart(self) -> None:
        """No snapshot is in the window."""
        self.kept = []

    def regroup(self, live: Sequence[Tensor], grouped: GroupedTensors) -> None:
        """Copy these from now on."""
        self._live = live

    def add(self, values: Sequence[Tensor], now: Clock) -> None:
        """Average more tensors, which have been constant so far: one copy serves all snapshots."""
        shared = self._copies(values)
        self.kept = [(start, end, tensors + shared) for start, end, tensors in self.kept]

    def tensors_held(self) -> list[list[Tensor]]:
        """The snapshots."""
        return [tensors for _, _, tensors in self.kept]

    def value(self, index: int, now: Clock, part: Part = ()) -> Tensor:
        """The average of one tensor at `now`, in the precision of a running average."""
        newest = narrowed(self.kept[-1][2][index], part)
        dtype = accumulator_dtype(newest.dtype, self._options.dtype)
        result = torch.zeros_like(newest, dtype=dtype)
        copy = None if newest.dtype == dtype else torch.empty_like(result)
        so_far = 0.0
        for share, (_, _, tensors) in zip(self._shares(now), self.kept, strict=True):
            so_far += share
            # A running mean, not a sum: equal weights stay what they are, to the last bit.
            held = narrowed(tensors[index], part)
            result.lerp_(held if copy is None else copy.copy_(held), share / so_far)
        return result

    def effective_samples(self, now: Clock) -> float:
        """1 / (sum of squared shares of the snapshots)."""
        return 1 / sum(share**2 for share in self._shares(now))

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """No accumulators, but the snapshots."""
        snapshots = tuple(
            {"from": start, "to": end, "tensors": dict(zip(names, tensors, strict=True))}
            for start, end, tensors in self.kept
        )
        return {"tensors": {}, "snapshots": snapshots}

    def load_state(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take the values of a checked state."""
        self.kept = []
        for snapshot in state["snapshots"]:
            tensors = self._copies(self._live)
            copy_by_name(tensors, snapshot["tensors"], names)
            self.kept.append((snapshot["from"], snapshot["to"], tensors))

    @classmethod
    def check_state(cls, state: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
        """The snapshots."""
        snapshots = state["snapshots"]
        sum(snapshot["to"] - snapshot["from"] for snapshot in snapshots)
        return {f"snapshots[{i}]": snapshot["tensors"] for i, snapshot in enumerate(snapshots)}

    @classmethod
    def dtype_held(cls, dtype: torch.dtype, options: Options) -> torch.dtype:
        """The dtype of the weights."""
        return dtype

    @classmethod
    def describe(cls, nbytes: int, options: Options, held: Accumulator | None) -> list[str]:
        """One copy of the weights per capture."""
        kept = len(held.kept) if isinstance(held, cls) else 0
        return [
            f"keeps {megabytes(nbytes)} for each capture in the window; {kept} now",
            "resolution: snapshots are exact",
        ]

    def _shares(self, now: Clock) -> list[float]:
        """The share of each snapshot at `now`; they sum to 1."""
        profile, time = now.profile, float(now.time)
        shares = [profile.interval_mass(start, end, time) for start, end, _ in self.kept]
        total = sum(shares)  # below 1 where the first captures came late
        return [share / total for share in shares]

    def _copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        device = self._options.device
        with torch.inference_mode(False), torch.no_grad():
            return [
                torch.empty_like(t, device=device or t.device).copy_(t)
                for t in map(Tensor.detach, tensors)
            ]


def accumulator_class(profile: Profile) -> type[Accumulator]:
    """The accumulator of a profile. Raises ArgumentError for one that cannot be averaged on the fly."""
    if profile.streaming:
        return RunningAverage
    if isinstance(profile.innermost, Window):
        return WindowAverage
    raise ArgumentError(
        f"{profile} cannot be averaged during training: what each weight counts is known only at the "
        "end. Save checkpoints and use polyak.average_checkpoints."
    )


def _is_small(before: Clock, now: Clock) -> bool:
    """Whether a block is called for: decided on the host, from the time if nothing was skipped."""
    if not now.on_device:
        return bool(now.share < SMALLEST_SHARE)
    elapsed = now.time_if_none_skipped - before.time_if_none_skipped
    if now.time_if_none_skipped <= now.profile.start or elapsed <= 0:
        return False
    dt = min(elapsed, now.time_if_none_skipped)
    return bool(now.profile.share(now.time_if_none_skipped, dt) < SMALLEST_SHARE)


def copy_by_name(
    targets: Sequence[Tensor], sources: Mapping[str, Tensor], names: Sequence[str]
) -> None:
    """Copy what is stored by name into tensors in the order of the names."""
    torch._foreach_copy_(list(targets), [sources[name] for name in names])


def megabytes(nbytes: int) -> str:
    """Bytes as they are shown."""
    return f"{nbytes / 2**20:,.1f} MiB"
