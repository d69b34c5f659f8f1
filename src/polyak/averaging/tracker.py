"""How averages are kept, and what each of them keeps.

One or several averages that follow the same weights: bound together, updated in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module

from polyak.averaging.accumulators import Running, Snapshots
from polyak.averaging.clock import Clock, Number
from polyak.averaging.offload import Staging, stages
from polyak.batchnorm import norm_layers, trained_layers, unsupported_norm_layers
from polyak.errors import ArgumentError, UsageError
from polyak.maths.profiles import After, Profile, Window
from polyak.tensors.binding import Roster
from polyak.tensors.blend import Cutter, Move
from polyak.tensors.finite import nonfinite, refuse_nonfinite
from polyak.tensors.policy import Policy
from polyak.tensors.swap import owner_of_loan


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


class Following:
    """The weights of one model, and the averages that follow them."""

    def __init__(
        self, model: Module, policy: Policy, options: Options, *, unit: str | None
    ) -> None:
        if not isinstance(model, Module):
            raise ArgumentError(f"Average needs a torch module; found {type(model).__name__}.")
        self.roster = Roster(model, policy)
        self.options = options
        self.members: list[Held] = []
        self.unit = unit
        self.in_blocks = True  # where shares are small
        self.skipped = 0  # updates skipped because of non-finite weights
        self.pending_steps = 0  # by the hook: steps since the last update, skipped ones included,
        self.pending_real: Number = 0.0  # and those of them that were not skipped
        self.attachment: object | None = None
        self.layer_modes: dict[str, bool] | None = None  # at the last capture, if the model trained
        self._cutter: Cutter | None = None
        self._cut_at = -1
        self._staging: Staging | None = None

    def join(self, profile: Profile) -> Held:
        """One more average of these weights. Raises ArgumentError for a profile nothing can follow."""
        _refuse_annealed(profile)
        held = Held(Clock(profile))
        self.members.append(held)
        return held

    def update(self, dt: float = 1.0, real: Tensor | None = None) -> None:
        """Let the present weights enter every average; all checks come before the first write."""
        self.refuse_during_loan("update()")
        self.finish()
        self.roster.refresh() if self.roster.bound else self.roster.bind()
        capturing = self._is_capturing()
        moments = [held.clock.advanced(dt, real) for held in self.members]
        if not self._may_enter():
            return
        if any(now.on_device or now.share for now in moments):
            self.prepare()
            self._enter(moments)
        for held, now in zip(self.members, moments, strict=True):
            held.clock = now.written_over(held.clock) if capturing else now

    def prepare(self) -> None:
        """Make what the averages need, once the model is bound."""
        live, options = self.roster.live, self.options
        for held in self.members:
            if held.store is None:
                kind = Running if held.profile.streaming else Snapshots
                held.store = kind(live, options.dtype, options.device)
                held.statistics = [s.detach().clone() for s in self.roster.statistics]
                self._cut_at = -1
        if self._cut_at != self.roster.generation:
            self._cut()

    def ready_to_read(self) -> None:
        """Complete what is under way, and check that the model is still the one that is followed."""
        self.finish()
        if not self.roster.bound or self.owner_of_loan() is not None:
            return
        if self.attachment is not None:  # whatever is thawed has not been stepped yet
            self.adopt_thawed()
        self.roster.refresh()

    def owner_of_loan(self) -> object | None:
        """Whose average is in the model now; None while it holds its own weights."""
        return owner_of_loan(self.roster.live)

    def finish(self) -> None:
        """Complete an update whose weights were still on their way to another device."""
        if self._staging is not None:
            self._staging.finish()

    def wait_before_step(self) -> None:
        """Keep the next optimizer step from overwriting what is still being read."""
        if self._staging is not None:
            self._staging.order_after_reading()

    def adopt_thawed(self) -> None:
        """Take up parameters that are about to train for the first time: they were constant so far."""
        if not self.roster.bound or not (names := self.roster.thawed()):
            return
        self.finish()
        values = self.roster.adopt(names)
        for held in self.members:
            if held.store is not None:
                held.store.adopt(values, held.clock)

    def refuse_during_loan(self, what: str) -> None:
        """Raise UsageError while another set of weights is in the model."""
        if (owner := self.owner_of_loan()) is not None:
            raise UsageError(
                f"{what} inside applied(): the model holds the weights of {owner!r}, not those "
                "that train. Leave the `with` block first."
            )

    def keep_time_on_device(self) -> None:
        """Move every clock to the weights' device, for good; and use no blocks.

        The replays of a graph run no host code, which is what opens blocks and folds them.
        """
        if not self.roster.bound:
            raise UsageError("keep_time_on_device() needs a first update(), which binds the model.")
        self.finish()
        self.in_blocks = False
        for held in self.members:
            if isinstance(held.store, Running):
                held.store.close_block(held.clock)
            held.clock = held.clock.moved(self._device())

    def layers_to_refresh(self) -> list[str] | None:
        """The normalisation layers whose statistics follow the average; None lets update_bn choose."""
        model = self.roster.model
        if model.training or self.layer_modes is None:
            return None
        return [name for name in trained_layers(model) if self.layer_modes.get(name, True)]

    def statistics_go_stale(self) -> bool:
        """Whether there are statistics that follow the weights."""
        if not self.roster.statistics:
            return False
        if unsupported_norm_layers(self.roster.model):
            return True
        layers = self.layers_to_refresh()
        return bool(trained_layers(self.roster.model) if layers is None else layers)

    def _may_enter(self) -> bool:
        mode = self.options.nonfinite
        if mode is None:
            return True
        tensors = list(zip(self.roster.names, self.roster.live, strict=True))
        if mode == "raise":
            refuse_nonfinite(tensors, "update()", "Nothing was averaged.")
        elif nonfinite(tensors):
            self.skipped += 1
            return False
        return True

    @torch.no_grad()
    def _enter(self, moments: Sequence[Clock]) -> None:
        moves = self._moves(moments)
        if self._staging is not None:
            self._staging.start(self.roster.live, lambda: self._blend(moves, moments))
        else:
            self._blend(moves, moments)
        for held, now in zip(self.members, moments, strict=True):
            if isinstance(held.store, Snapshots):
                held.store.take(held.clock, now.read())
            if self.roster.statistics and (now.on_device or now.share):
                torch._foreach_copy_(held.statistics, self.roster.statistics)
                held.statistics_are_fresh = False
        self._note_modes()

    def _moves(self, moments: Sequence[Clock]) -> list[Move]:
        moves = [
            held.store.move(held.clock, now, in_blocks=self.in_blocks)
            for held, now in zip(self.members, moments, strict=True)
            if isinstance(held.store, Running)
        ]
        return [move for move in moves if move is not None]

    def _blend(self, moves: Sequence[Move], moments: Sequence[Clock]) -> None:
        if self._cutter is not None:
            self._cutter.blend(moves)
        for held, now in zip(self.members, moments, strict=True):
            if isinstance(held.store, Running) and (now.on_device or now.share):
                held.store.settle(now)

    def _cut(self) -> None:
        stores = [held.store for held in self.members if isinstance(held.store, Running)]
        source: Sequence[Tensor] = self.roster.live
        if stores and stages(self.roster.live, self.options.device):
            self._staging = Staging(self.roster.live)
            source = self._staging.tensors
        if stores:
            self._cutter = Cutter(source, stores[0].tensors, n_averages=len(stores))
        for held in self.members:
            if isinstance(held.store, Running) and self._cutter is not None:
                held.store.cut(self._cutter)
            elif isinstance(held.store, Snapshots):
                held.store.follow(self.roster.live)
        self._norms = list(norm_layers(self.roster.model).items()) if self.roster.statistics else []
        self._cut_at = self.roster.generation

    def _note_modes(self) -> None:
        if self.roster.statistics:
            in_training = self.roster.model.training
            modes = {name: layer.training for name, layer in self._norms} if in_training else None
            self.layer_modes = modes

    def _is_capturing(self) -> bool:
        if self._device().type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return False
        if not all(held.clock.on_device for held in self.members):
            raise UsageError(
                "update() in a CUDA graph, but the time of this average is kept on the host, where "
                "no replay can move it. Call keep_time_on_device() before the capture."
            )
        return True

    def _device(self) -> torch.device:
        return self.roster.live[0].device


def _refuse_annealed(profile: Profile) -> None:
    inner = profile
    while isinstance(inner, After):
        inner = inner.profile
    if not (inner.streaming or isinstance(inner, Window)):
        raise ArgumentError(
            f"{profile} cannot be followed while training: what each weight counts is known only "
            "at the end. Save checkpoints and use polyak.average_checkpoints."
        )
