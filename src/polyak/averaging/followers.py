"""What an average feeds after each update: another module that follows it, or the model itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from polyak.averaging.clock import Clock
from polyak.averaging.tracker import Member
from polyak.averaging.values import refuse_nonfinite_average
from polyak.errors import ArgumentError, MismatchError, UsageError, some
from polyak.maths.arguments import flag, number
from polyak.tensors.binding import Structure
from polyak.tensors.fsdp import reshard
from polyak.tensors.memory import odd_form, shape_of
from polyak.tensors.names import named_modules, named_tensors, require_module
from polyak.tensors.rounding import copy_rounded
from polyak.tensors.sharding import (
    fits,
    is_sharded,
    layout,
    local,
    refuse_flat_modules,
    refuse_partitioned,
)
from polyak.tensors.swap import current_owner, recompute_derived


class Fed(ABC):
    """What is fed after each update of an average, until `remove`; also a context manager."""

    def __init__(self, member: Member) -> None:
        self._member = member

    @abstractmethod
    def after_update(self, before: Clock) -> None:
        """The average has moved on from `before`."""

    def after_load(self) -> None:  # noqa: B027 - nothing to do for most
        """The average continues from a loaded state."""

    def remove(self) -> None:
        """Feed it no more; it keeps what it has. A second call does nothing."""
        if self in self._member.fed:
            self._member.fed.remove(self)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class Follower(Fed):
    """A module that is kept equal to the average after each update; made by `average.follower(module)`.

    Its tensors are matched with the model's by name. It may hold fewer than the model, in other dtypes
    and on other devices. What is averaged is copied from the accumulators, in full precision and without
    a copy of them, also while they gather a block; other parameters (frozen ones) are the model's. It is
    set at once, after each update, and when a state is loaded. While nothing has been averaged it stays
    as it is: begin with a copy of the model. Of a sharded model it is sharded in the same way: each rank
    copies its shards, and nothing is gathered.

    Args:
        module: a module of its own, such as `copy.deepcopy(model)`.
        part: the name of the module in the model of which it is a copy, such as "encoder".
        buffers: its buffers follow too: statistics as the average has them, others as the model.
        freeze: its parameters take no gradients, from now on.
        evaluation: put it into evaluation mode, now.

    `remove()` ends it, and so does the end of a `with` block; the module keeps what it has.

    Raises:
        ArgumentError: parameters of the model itself, or none of its names.
        MismatchError: tensors that the model does not have, in other shapes, or sharded otherwise, all by
            name.
        UsageError: at an update, while another average is swapped into the module.

    >>> import copy, torch, polyak
    >>> student = torch.nn.Linear(2, 1)
    >>> teacher = copy.deepcopy(student)
    >>> average = polyak.Average(student, polyak.EMA(decay=0.5, keep_initial=True))
    >>> follower = average.follower(teacher, freeze=True, evaluation=True)
    >>> for value in (0.0, 1.0, 1.0):
    ...     _ = torch.nn.init.constant_(student.weight, value)
    ...     average.update()
    >>> teacher.weight.tolist()
    [[0.75, 0.75]]

    """

    def __init__(
        self,
        member: Member,
        module: Module,
        *,
        part: str | None = None,
        buffers: bool = False,
        freeze: bool = False,
        evaluation: bool = False,
    ) -> None:
        super().__init__(member)
        require_module(module, "follower()")
        for name, value in (("buffers", buffers), ("freeze", freeze), ("evaluation", evaluation)):
            flag(name, value)
        self.module = module
        self._prefix = _checked_part(member, part)
        self._buffers = buffers
        self._has_begun = False
        self._match()
        if freeze:
            module.requires_grad_(requires_grad=False)
        if evaluation:
            module.eval()
        member.tracker.ready_to_read()
        self.after_load()
        member.fed.append(self)

    def after_load(self) -> None:
        """Take the average as it is; of an empty one nothing."""
        self._has_begun = False
        self.after_update(self._member.clock)

    @torch.no_grad()
    def after_update(self, before: Clock) -> None:
        """Copy the average into the module."""
        member = self._member
        # Where the count is on a device this waits for it, until the first weights have entered.
        self._has_begun = self._has_begun or not member.is_empty()
        if not self._has_begun or member.accumulator is None:
            return
        tracker = member.tracker
        tracker.finish()
        if self._is_sharded:  # what a forward pass has gathered holds the values of before
            reshard(self.module)
            tracker.tensors.settle()
        if self._generation != tracker.tensors.generation or not self._structure.holds():
            self._match()
        if (owner := current_owner(self._targets)) is not None:
            raise UsageError(
                f"The module that follows this average holds the weights of {owner!r} now. Leave its "
                "applied() first."
            )
        for index, target in self._averaged:
            measured = member.measured_buffers.get(tracker.tensors.names[index])
            value = member.accumulator.value(index, member.clock) if measured is None else measured
            copy_rounded(target, value)
        for index, target in self._statistics:
            target.copy_(member.statistics[index])
        for source, target in self._others:
            target.copy_(source)
        if self._derives:
            recompute_derived(self.module)

    def _match(self) -> None:
        """Find by name what each tensor of the module follows. Raises MismatchError, naming all."""
        tensors = self._member.tracker.tensors
        refuse_flat_modules(self.module)
        reshard(self.module)
        tensors.settle()
        named, kinds = tensors.inspect()
        own = named_tensors(self.module)
        wanted = {n: s.tensor for n, s in own.slots.items() if s.is_parameter}
        if self._buffers:
            wanted |= {n: s.tensor for n, s in own.slots.items() if s.persistent}
        names = {n: named.ties.get(self._prefix + n, self._prefix + n) for n in wanted}
        self._check(named, own.ties, wanted, names)
        live = {
            id(s.tensor): n for n, s in named.slots.items() if kinds[n].kind.value == "averaged"
        }
        if shared := sorted(n for n, t in wanted.items() if id(t) in live):
            raise ArgumentError(
                f"{', '.join(shared[:4])}: averaged parameters of the model itself, which the average "
                "would overwrite. Give follower() a module of its own, such as copy.deepcopy(model); "
                "where it is a part of the model, freeze it or exclude= it from the average. "
                "write_back() puts the average into the model."
            )
        self._sort(wanted, names, named)

    def _check(
        self, named: Any, own_ties: dict[str, str], wanted: dict[str, Tensor], names: dict[str, str]
    ) -> None:
        kind = type(self.module).__name__
        if not any(name in named.slots for name in names.values()):
            raise ArgumentError(
                f"None of the {len(wanted)} tensors of this {kind} ({some(wanted)}) has the name of "
                f"one of the model ({some(named.slots)}). If it is a copy of a part of the model, say of "
                "which: part='encoder'."
            )
        changed = {}
        for name, tensor in wanted.items():
            refuse_partitioned(name, tensor)
            if (slot := named.slots.get(names[name])) is None:
                continue
            have, expected = _form(tensor), _form(slot.tensor)
            same = have == expected and fits(tensor, slot.tensor)
            if not same and tensor is not slot.tensor:
                changed[name] = f"{have}, but the model's is {expected}"
        for alias, first in own_ties.items():
            full = self._prefix + alias
            if first in names and named.ties.get(full, full) != names[first]:
                changed[alias] = f"is tied to {first} here, and not in the model"
        unknown = {name for name in wanted if names[name] not in named.slots}
        if changed or unknown:
            raise MismatchError.of(
                f"This {kind} cannot follow an average of {type(self._member.tracker.tensors.model).__name__}.",
                unexpected=unknown,
                changed=changed,
                advice="A follower may hold fewer tensors than the model, not others, and is sharded over "
                "the same mesh as the model. Nothing was copied.",
            )

    def _sort(self, wanted: dict[str, Tensor], names: dict[str, str], named: Any) -> None:
        tensors = self._member.tracker.tensors
        at = {name: index for index, name in enumerate(tensors.names)}
        statistic_at = {name: index for index, name in enumerate(tensors.statistic_names)}
        self._averaged: list[tuple[int, Tensor]] = []
        self._statistics: list[tuple[int, Tensor]] = []
        self._others: list[tuple[Tensor, Tensor]] = []
        for name, tensor in wanted.items():
            source, target = named.slots[names[name]].tensor, local(tensor)
            if names[name] in at:
                self._averaged.append((at[names[name]], target))
            elif names[name] in statistic_at:
                self._statistics.append((statistic_at[names[name]], target))
            elif source is not tensor and not odd_form(source):
                self._others.append((local(source), target))
        self._targets = list(map(local, wanted.values()))
        self._is_sharded = any(map(is_sharded, wanted.values()))
        self._generation = tensors.generation
        self._structure = Structure.of(self.module)
        self._derives = any(m._forward_pre_hooks for m in self.module.modules())


class WriteBack(Fed):
    """Puts the average into its model every so often; made by `average.write_back(every=...)`.

    Training goes on from there: Switch EMA, and with a profile to match Lookahead. `every` is in the
    unit of the average, as all lengths of time (steps, captures, samples): the average is written after
    the update that completes a multiple of it, to all that is averaged. The average, its time, the
    optimizer's state and the BatchNorm statistics of the model stay as they are. Where it writes is a
    function of the average's time, so a resumed run continues bitwise; a step that only the device
    knows to be skipped counts. `copy_to(model)` does the same once.

    Of a sharded model each rank writes to its shards. It asks all ranks for NaN and infinities first, so
    all update together.

    `remove()` ends it, and so does the end of a `with` block.

    Raises:
        ArgumentError: `every` is not positive and finite.
        UsageError: an average of these weights is written back already; at an update with
            `attach(before_next_step=True)`.
        NonFiniteError: at an update, before anything is written.

    >>> import torch, polyak
    >>> model = torch.nn.Linear(2, 1)
    >>> average = polyak.Average(model, polyak.SWA())
    >>> written = average.write_back(every=2)
    >>> for value in (1.0, 3.0):
    ...     _ = torch.nn.init.constant_(model.weight, value)
    ...     average.update()
    >>> model.weight.tolist()
    [[2.0, 2.0]]

    """

    def __init__(self, member: Member, every: float) -> None:
        super().__init__(member)
        self._every = number("every", every)
        if not 0 < self._every < float("inf"):
            raise ArgumentError(
                f"every is {every!r}; expected a positive time, in the unit of the average."
            )
        fed = (one for other in member.tracker.members for one in other.fed)
        if any(isinstance(one, WriteBack) for one in fed):
            raise UsageError(
                "An average of this model is written back already, and a second one would overwrite "
                "it. Call remove() on what that write_back() returned."
            )
        # In front: a follower is set from the average, which this leaves as it is.
        member.fed.insert(0, self)

    @torch.no_grad()
    def after_update(self, before: Clock) -> None:
        """Write the average into the model if the time has passed a multiple of `every`."""
        member = self._member
        tracker = member.tracker
        if any(a is not None and a.is_late for a in (tracker.attachment, member.attachment)):
            raise UsageError(
                "write_back() does not fit attach(before_next_step=True): the weights would change "
                "between the gradient and the step that it is for. Nothing was written."
            )
        now = member.clock
        # Both are on the host, and in the state: where a resumed run writes is where it would have.
        passed = (
            now.time_if_none_skipped // self._every > before.time_if_none_skipped // self._every
        )
        if not passed or member.is_empty() or member.accumulator is None:
            return
        tracker.finish()
        tracker.tensors.settle()
        refuse_nonfinite_average(member, "write_back()")
        for index, live in enumerate(tracker.tensors.live):
            copy_rounded(live.detach(), member.accumulator.value(index, now))
        recompute_derived(tracker.tensors.model)


def _checked_part(member: Member, part: str | None) -> str:
    if part is None:
        return ""
    names = {n for n, _ in named_modules(member.tracker.tensors.model)}
    prefix = f"{part}."
    if prefix not in names:
        raise ArgumentError(
            f"part is {part!r}; expected the name of a module in the model, such as "
            f"{some(n.removesuffix('.') for n in sorted(names) if n)}."
        )
    return prefix


def _form(tensor: Tensor) -> str:
    complex_ = "complex" if tensor.is_complex() else ""
    form = odd_form(tensor) or layout(tensor)
    return f"shape {shape_of(tensor)} {complex_} {form}".strip()
