"""The weights of one model, and the averages that track them: bound together, updated in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from polyak.averaging.accumulators import Accumulator, Options, accumulator_class
from polyak.averaging.clock import Clock
from polyak.averaging.offload import Background, in_background
from polyak.batchnorm.layers import norm_layers, trained_layers, unsupported_norm_layers
from polyak.errors import ArgumentError, UsageError, require, some, warn
from polyak.maths.arguments import number
from polyak.maths.profile import Profile
from polyak.maths.text import as_profile
from polyak.tensors.binding import BoundTensors
from polyak.tensors.blend import GroupedTensors
from polyak.tensors.finite import nonfinite, refuse_nonfinite
from polyak.tensors.gathering import Gathered, Taken
from polyak.tensors.names import require_module
from polyak.tensors.packed import Packed
from polyak.tensors.policy import Policy, patterns
from polyak.tensors.sharding import local
from polyak.tensors.swap import current_owner


@dataclass(eq=False, repr=False)
class Member:
    """One average of the weights that its tracker tracks."""

    tracker: Tracker
    clock: Clock
    held_by: type[Accumulator]
    unit: str | None = None
    accumulator: Accumulator | None = None
    own_statistics: list[Tensor] = field(default_factory=list)
    newest: Taken | None = None  # statistics that are not in these yet
    fresh_layers: set[str] = field(default_factory=set)  # whose statistics were measured on it
    measured_buffers: dict[str, Tensor] = field(default_factory=dict)  # of averaged statistics
    pending: list[Any] | None = None  # of a loaded state, until an attachment takes it over
    attachment: Any = None  # of this member alone; `tracker.attachment` updates the others
    fed: list[Any] = field(default_factory=list)  # what is fed after each update, as `Fed`
    is_applied: bool = False
    warned_empty: bool = False
    warned_stale: bool = False
    take_measured: Callable[[], None] | None = None  # while applied: keep what was measured so far

    @property
    def profile(self) -> Profile:
        """How much each moment counts."""
        return self.clock.profile

    @property
    def statistics(self) -> list[Tensor]:
        """The statistics that belong to the average, in the order of the bound ones."""
        if self.newest is not None:
            self.newest.spread(self.own_statistics)
            self.newest = None
        return self.own_statistics

    def stale_layers(self) -> list[str]:
        """Layers whose statistics are those of the newest weights, not of the average."""
        if self.take_measured is not None:
            self.take_measured()
        return sorted(self.tracker.moving_layers() - self.fresh_layers)

    def restart(self) -> None:
        """Begin to average again, as if nothing had been; what was held may be overwritten."""
        self.clock = Clock(self.profile)
        if self.accumulator is not None:
            self.accumulator.restart()

    def is_empty(self) -> bool:
        """Whether nothing has been averaged yet; this waits for a device that holds the time."""
        return self.accumulator is None or float(self.clock.count) == 0


class Tracker:
    """The weights of one model, and the averages that track them."""

    def __init__(  # noqa: PLR0913 - what Average documents, turned into policy and options here only
        self,
        model: Module,
        *,
        unit: str | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        nonfinite: str | None = None,
        average_buffers: str | Iterable[str] | None = None,
        capturable: bool = False,
        rank: int = 0,
        deviations_device: torch.device | str | None = None,
    ) -> None:
        require_module(model, "Average")
        policy = Policy(
            patterns(include, "include"),
            patterns(exclude, "exclude") or (),
            patterns(average_buffers, "average_buffers") or (),
        )
        self.tensors = BoundTensors(model, policy)
        self.options = Options(
            dtype, _device(device), nonfinite, capturable, rank, _device(deviations_device)
        )
        require(
            unit is None or isinstance(unit, str),
            f"unit is {unit!r}; expected a word such as 'samples', or None.",
        )
        self.unit = unit
        self.members: list[Member] = []
        self.skipped = 0  # updates skipped because of non-finite weights
        self.attachment: Any = None  # updates the members without an attachment of their own
        # While an average of these is lent: the weights that train, in the order of the live ones.
        self.own_weights: list[Tensor | Packed] | None = None
        self.layer_modes: dict[str, bool] | None = None  # at the last capture, if the model trained
        self._grouped = GroupedTensors((), ())
        self._grouped_at = -1
        self._background: Background | None = None  # what updates averages on the host
        self._warned_of_writes = False
        self._gathered: Gathered | None = None  # the statistics of the model

    def __getstate__(self) -> dict[str, Any]:
        """What a copy begins with: what is complete, and a thread of its own when it needs one."""
        self.finish()
        return self.__dict__ | {"_background": None, "_grouped_at": -1}

    def join(self, profile: Profile | str, held_by: type[Accumulator] | None = None) -> Member:
        """One more average of these weights. Raises ArgumentError for a profile that does not fit.

        held_by: the accumulator, instead of the one that goes with the profile.
        """
        profile = as_profile(profile)
        member = Member(self, Clock(profile), held_by or accumulator_class(profile), self.unit)
        self.members.append(member)
        return member

    def update(
        self,
        dt: float = 1.0,
        real: bool | Tensor = True,
        members: Sequence[Member] | None = None,
    ) -> None:
        """Update the members, all by default; every check comes before the first write."""
        if real is False:
            return
        self.refuse_during_loan("update()")
        if self._background is not None:
            self._background.check()
        self.tensors.refresh() if self.tensors.bound else self.tensors.bind()
        members = self.members if members is None else members
        self._check_capture(members)
        for member in members:
            self.to_device_if_capturable(member)
        part = _part(real)
        dt = float(number("dt", dt))
        moments = [member.clock.advance(dt, part) for member in members]
        if not self._may_average():
            return
        self.tensors.note_frozen()
        due = [m for m in zip(members, moments, strict=True) if m[1].on_device or m[1].share]
        if due:
            self.prepare()
            self._accumulate(members, due)
        for member, now in zip(members, moments, strict=True):
            before = member.clock
            member.clock = now.copied_into(before) if self._is_capturable() else now
            if member.fed and (now.on_device or now.share):
                for one in member.fed:
                    one.after_update(before)
        if self._background is not None and not self._is_ordered():
            self.wait_before_step()

    def prepare(self) -> None:
        """Make what the averages need, once the model is bound."""
        if self._grouped_at != self.tensors.generation:
            for attachment in self._attachments():
                attachment.check_parameters()
        live = self.tensors.live
        for member in self.members:
            if member.accumulator is None:
                member.held_by.check_model(self.tensors.model)
                member.accumulator = member.held_by(live, self.options)
                with torch.inference_mode(False):  # inference tensors could not be written to
                    member.own_statistics = [s.detach().clone() for s in self.tensors.statistics]
                member.newest = None
                self._grouped_at = -1
        if self._grouped_at != self.tensors.generation:
            self._group()

    def take_due(self) -> None:
        """Take weights that an attachment has left for later."""
        for attachment in self._attachments():
            attachment.take_due()

    def ready_to_read(self) -> None:
        """Complete what is under way, and check that the model has not changed."""
        self.take_due()
        self.finish()
        if not self.tensors.bound or self.owner_of_loan() is not None:
            return
        if self.is_attached():  # whatever was unfrozen has not been stepped yet
            self.add_unfrozen()
        self.tensors.refresh()

    def is_attached(self) -> bool:
        """Whether an attachment updates any of the members."""
        return bool(self._attachments())

    def _is_ordered(self) -> bool:
        """Whether a hook is called before anything, as far as is known, writes to the weights."""
        attachments = self._attachments()
        late = any(attachment.is_late for attachment in attachments)
        return bool(attachments) and not late and not self._warned_of_writes

    def notes(self) -> list[str]:
        """How the updates are carried out, in words."""
        return self._grouped.notes()

    def owner_of_loan(self) -> object | None:
        """Whose average is in the model now; None while it holds its own weights."""
        if self.tensors.bound:
            return current_owner(self.tensors.live)
        model = self.tensors.model  # another average may have lent it before this one took anything
        return current_owner(local(one) for one in (*model.parameters(), *model.buffers()))

    def finish(self) -> None:
        """Wait for what is done in the background. Raises UsageError if something could not be done."""
        if self._background is not None:
            self._background.finish()
            self._warn_of_writes(self._background)

    def wait_before_step(self) -> None:
        """Keep the next optimizer step from overwriting what is still being read."""
        if self._background is not None:
            self._background.wait_until_read()
            self._warn_of_writes(self._background)

    def add_unfrozen(self) -> None:
        """Average parameters that are about to train for the first time: they were constant so far."""
        if self.tensors.bound and (names := self.tensors.unfrozen()):
            self.add(names)

    def add(self, names: Iterable[str], *, known_to: Member | None = None) -> None:
        """Average these from now on, which the others than `known_to` have found constant so far."""
        self.finish()
        others = [m for m in self.members if m is not known_to and m.accumulator is not None]
        values = self.tensors.add(names, constant=known_to is None or bool(others))
        for member in self.members:
            if member.accumulator is not None:
                member.accumulator.add(values, member.clock)

    def refuse_during_loan(self, what: str) -> None:
        """Raise UsageError while another set of weights is in the model."""
        if (owner := self.owner_of_loan()) is not None:
            raise UsageError(
                f"{what} inside applied(): the model holds the weights of {owner!r}, not those "
                "that train. Leave the `with` block first."
            )

    def layers_to_refresh(self) -> list[str]:
        """The layers whose statistics follow the weights: by their modes at the last capture."""
        model, modes = self.tensors.model, self.layer_modes
        if modes is None:
            return list(trained_layers(model))
        return [name for name in norm_layers(model) if modes.get(name, True)]

    def moving_layers(self) -> set[str]:
        """The same, and those that `update_bn` cannot measure."""
        if not self.tensors.norms:
            return set()
        unsupported = unsupported_norm_layers(self.tensors.model)
        return {*self.layers_to_refresh(), *unsupported} & self.tensors.norms.keys()

    def to_device_if_capturable(self, member: Member) -> None:
        """Keep the member's time on the weights' device, where the replays of a graph move it."""
        if self.options.capturable and not member.clock.on_device:
            member.clock = member.clock.to(self._device())

    def set_clock(self, member: Member, clock: Clock) -> None:
        """Continue from a moment; replays of a graph find it where they found the one before."""
        before, member.clock = member.clock, clock
        if self.tensors.bound:
            self.to_device_if_capturable(member)
        if self._is_capturable() and before.on_device and member.clock.on_device:
            member.clock = member.clock.copied_into(before)

    def _attachments(self) -> list[Any]:
        found = [self.attachment, *(member.attachment for member in self.members)]
        return [attachment for attachment in found if attachment is not None]

    def _may_average(self) -> bool:
        mode = self.options.nonfinite
        if mode is None:
            return True
        tensors = list(zip(self.tensors.names, self.tensors.live, strict=True))
        ranks = self.tensors.ranks  # which decide together, or their counts would part ways
        if mode == "raise":
            refuse_nonfinite(tensors, "update()", "Nothing was averaged.", ranks)
        elif ranks.union(nonfinite(tensors)):
            self.skipped += 1
            return False
        return True

    def _accumulate(self, members: Sequence[Member], due: Sequence[tuple[Member, Clock]]) -> None:
        pairs = [(m.accumulator, m.clock, now) for m, now in due if m.accumulator is not None]
        taken, copies = None, list[list[Tensor]]()
        if self._gathered is not None:
            taken = self._gathered.take()
        elif self.tensors.statistics:
            copies = [member.statistics for member, _ in due]
        if self._background is not None:
            work = partial(_carry_out, self._grouped, pairs)
            self._background.start(work, partial(_set_clocks, [(m, m.clock) for m in members]))
        else:
            _carry_out(self._grouped, pairs, copies)
        if self.tensors.statistics:
            self._note_statistics([member for member, _ in due], taken)

    def _note_statistics(self, due: Sequence[Member], taken: Taken | None) -> None:
        for member in due:
            member.newest = taken
            member.fresh_layers, member.measured_buffers = set(), {}
        in_training = self.tensors.model.training
        norms = self.tensors.norms.items()
        self.layer_modes = {name: layer.training for name, layer in norms} if in_training else None

    def _group(self) -> None:
        self.finish()
        live, statistics = self.tensors.live, self.tensors.statistics
        self._background = self._background_for(live)
        held = [member.accumulator for member in self.members if member.accumulator is not None]
        targets = [tensors for accumulator in held if (tensors := accumulator.blend_targets())]
        read = None
        if self._background is not None:
            read, statistics = self._background.read, []
            in_forward = [not isinstance(tensor, Parameter) for tensor in self.tensors.whole]
            live = self._background.sources(live, in_forward)
        of = (live, targets[0]) if targets else ((), ())
        self._grouped = GroupedTensors(
            *of, n_averages=len(targets), statistics=statistics, read=read
        )
        # The replays of a CUDA graph run no host code, which is what tells them apart later.
        in_one_call = self._grouped.copies_statistics or self.options.capturable
        apart = read is not None or not in_one_call
        self._gathered = (
            Gathered(self.tensors.statistics) if apart and self.tensors.statistics else None
        )
        for accumulator in held:
            accumulator.regroup(live, self._grouped)
        self._grouped_at = self.tensors.generation

    def _background_for(self, live: Sequence[Tensor]) -> Background | None:
        if not in_background(live, self.options.device):
            return None
        there = self._background
        return there if there is not None and there.serves(live) else Background(live)

    def _warn_of_writes(self, background: Background) -> None:
        if not background.written or self._warned_of_writes:
            return
        self._warned_of_writes = True
        names = some(self.tensors.names[index] for index in sorted(background.written))
        warn(
            f"{names} were written to between an update and the next step, when an average on the host may "
            "still have been reading them: it may hold a part of what was written. From now on every "
            "update waits until the weights have been read. Where each step is followed by such writes "
            "(clipping, normalising), attach(before_next_step=True) takes what they leave."
        )

    def _check_capture(self, members: Sequence[Member]) -> None:
        capturing = self.tensors.live[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing and (reason := self._why_not_captured(members)):
            raise UsageError(f"update() in a CUDA graph, but {reason}")

    def _why_not_captured(self, members: Sequence[Member]) -> str:
        """What replays, which run no code of the host, would leave undone; empty if nothing."""
        if not self.options.capturable:
            return (
                "the time of this average is kept on the host, where no replay can advance it. "
                "Construct the average with capturable=True."
            )
        if self._background is not None:
            return (
                "this average is kept on the host, where no replay can update it. Construct it "
                "without device=."
            )
        if self.options.nonfinite is not None:
            return (
                f"nonfinite={self.options.nonfinite!r} looks at the weights on the host, which no "
                "replay does. Construct it without nonfinite=."
            )
        held = [member.accumulator for member in members]
        if any(one is None or one.block_is_open for one in held):
            return (
                "the first update() cannot be captured: it makes the accumulators, or closes the block "
                "of a loaded state. Call update() once before the capture."
            )
        if not all(one.blend_targets() for one in held if one is not None):
            return (
                "a window keeps its snapshots by code of the host, which no replay runs. Average over "
                "the window apart, and update that average after each replay."
            )
        return ""

    def _is_capturable(self) -> bool:
        """Whether a graph may hold the addresses of the time and of the accumulators."""
        return self.options.capturable and self._background is None

    def _device(self) -> torch.device:
        return self.tensors.live[0].device


def _carry_out(
    grouped: GroupedTensors,
    pairs: Sequence[tuple[Accumulator, Clock, Clock]],
    copies: Sequence[Sequence[Tensor]] = (),
) -> None:
    """Move accumulators from one moment to the next."""
    updates = [u for held, before, now in pairs if (u := held.update(before, now)) is not None]
    grouped.blend(updates, copies)
    for held, _, now in pairs:
        held.settle(now)


def _set_clocks(clocks: Sequence[tuple[Member, Clock]]) -> None:
    for member, clock in clocks:
        member.clock = clock


def _device(given: torch.device | str | int | None) -> torch.device | None:
    try:
        return None if given is None else torch.device(given)
    except (RuntimeError, TypeError, ValueError):
        raise ArgumentError(
            f"device is {given!r}; expected a device such as 'cpu' or 'cuda:0', or None."
        ) from None


def _part(real: bool | Tensor) -> Tensor | None:
    """What `Clock.advance` takes: the part that was not skipped, or None if that is certain."""
    if real is True:
        return None
    if not isinstance(real, Tensor) or real.numel() != 1:
        raise ArgumentError(
            f"real is {real!r}; expected True, False, or a tensor with one value from 0 (a skipped "
            "step) to 1."
        )
    return real.detach().reshape(()).to(torch.float64)
