"""The hook: updates after an optimizer's real steps, or at a schedule's averaging points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from polyak.averaging.lr_schedule import LRSchedule
from polyak.averaging.state import profile_text
from polyak.averaging.tracker import Member, Tracker
from polyak.errors import ArgumentError, UsageError, warn


class Customer(ABC):
    """What an attachment updates. Any number of customers may share one optimizer."""

    model: Module
    unit: str | None = None

    @abstractmethod
    def update(self, dt: float, real: bool | Tensor = True) -> None:
        """The weights have moved on by `dt`, or by the part of it that `real` says was not skipped."""

    def begin(self, unit: str) -> None:
        """Time will be counted in this unit. Raises ArgumentError if it does not fit."""
        self.unit = unit

    def before_step(self) -> None:  # noqa: B027 - optional
        """An optimizer is about to overwrite the weights."""

    def is_empty(self) -> bool:
        """Whether nothing was ever taken: then a schedule may take the weights it begins with."""
        return False

    def attached(self, attachment: Attachment) -> Sequence[int | float | Sequence[int]] | None:
        """The attachment is in place; steps that a loaded state has counted, if there are any."""
        return None

    def detached(self, attachment: Attachment) -> None:  # noqa: B027 - optional
        """The attachment was removed."""


class Attachment:
    """What `attach` returns: the hooks are in place until `remove` (or the end of a `with`)."""

    def __init__(
        self,
        customer: Customer,
        optimizers: Any,
        *,
        every: int | None = None,
        at: LRSchedule | None = None,
    ) -> None:
        self._customer = customer
        self._optimizers = _unwrapped(optimizers)
        _refuse_foreign(customer.model, self._optimizers)
        self._every = _checked_every(every, at)
        customer.begin("captures" if at is not None or customer.unit == "captures" else "steps")
        self._at = at
        self._takes_entering_weights = at is not None
        self._steps = 0  # since the last update, skipped ones included,
        self._real: float | Tensor = 0.0  # and those of them that were not skipped
        self._stepped: dict[int, float | Tensor] = {}  # since the last step of all: which, how real
        self._handles = self._register()
        if (pending := customer.attached(self)) is not None:
            self.resume(pending)

    def remove(self) -> None:
        """Take the hooks away; the average keeps what it has. A second call does nothing."""
        if self._handles:
            self._customer.detached(self)
        while self._handles:
            self._handles.pop().remove()

    def pending(self) -> list[Any]:
        """Steps counted since the last update: all, the real ones, and which optimizers began one."""
        return [self._steps, float(self._real), sorted(self._stepped)]

    def resume(self, pending: Sequence[Any]) -> None:
        """Continue counting from what `pending` returned."""
        self._steps, self._real = pending[0], pending[1]
        self._stepped = dict.fromkeys(pending[2], 1.0)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _register(self) -> list[Any]:
        handles: list[Any] = []
        for index, optimizer in enumerate(self._optimizers):
            handles.append(optimizer.register_step_pre_hook(self._before_step))
            if self._at is None:
                after = partial(self._after_step, index)
                handles.append(optimizer.register_step_post_hook(after))
            handles.append(_CopyWatch(optimizer))
        if self._at is not None:
            handles.append(self._at.register_step_post_hook(self._after_schedule))
        return handles

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._customer.before_step()
        if self._takes_entering_weights:
            self._take_entering_weights()

    def _take_entering_weights(self) -> None:
        """Where the schedule averages at the very step it is attached at: for an empty average.

        A resumed one is not empty, so nothing counts twice. This waits for the first step, because
        a state may be loaded, into the schedule and into the average, after attaching.
        """
        self._takes_entering_weights = False
        lr = self._at
        begins = lr is not None and lr.schedule.averages_after(lr.last_epoch)
        if begins and self._customer.is_empty():
            self._customer.update(1.0)

    def _after_schedule(self, lr: LRSchedule) -> None:
        self._takes_entering_weights = False
        if lr.schedule.averages_after(lr.last_epoch):
            self._customer.update(1.0)

    def _after_step(self, index: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Of several optimizers one may step more often (five critics to one generator): a step of
        # all is over once each has stepped, and it is real if one of its steps was.
        self._stepped[index] = _either(self._stepped.get(index, 0.0), _was_real(optimizer))
        if len(self._stepped) < len(self._optimizers):
            return
        real: float | Tensor = 0.0
        for one in self._stepped.values():
            real = _either(real, one)
        self._stepped = {}
        self._steps += 1
        self._real = self._real + real
        if self._steps >= self._every:
            self._update()

    def _update(self) -> None:
        done = self._real
        self._steps, self._real = 0, 0.0
        one_capture = self._customer.unit == "captures"
        dt = 1.0 if one_capture else float(self._every)
        if isinstance(done, Tensor):
            self._customer.update(dt, (done > 0).to(done.dtype) if one_capture else done / dt)
        else:
            self._customer.update(dt)


class Members(Customer):
    """The members of a tracker that one attachment updates: one, or all without one of their own."""

    def __init__(self, tracker: Tracker, member: Member | None = None) -> None:
        self._tracker = tracker
        self._member = member
        self.model = tracker.tensors.model
        self.unit = self._known_unit()
        if (tracker if member is None else member).attachment is not None:
            raise UsageError(
                "This average is attached already, and would count every step twice. With several "
                "optimizers pass them all, attach([first, second]); to move it, detach() first."
            )

    def _members(self) -> list[Member]:
        if self._member is not None:
            return [self._member]
        return [member for member in self._tracker.members if member.attachment is None]

    def _known_unit(self) -> str | None:
        """The unit that was asked for, or in which something has been averaged already."""
        units = [m.unit for m in self._members() if not m.is_empty()]
        return self._tracker.unit or next((unit for unit in units if unit), None)

    def update(self, dt: float, real: bool | Tensor = True) -> None:
        """Update them in one pass."""
        if members := self._members():
            self._tracker.update(dt, real, members)

    def begin(self, unit: str) -> None:
        """Check that the unit fits their profiles, and set it."""
        _check_unit(self.unit, unit, self._members())
        self.unit = unit
        for member in self._members():
            member.unit = unit

    def before_step(self) -> None:
        """Wait for what is still being read; average what is about to train for the first time."""
        self._tracker.wait_before_step()
        self._tracker.add_unfrozen()

    def is_empty(self) -> bool:
        """Whether none of them has averaged anything."""
        return all(member.is_empty() for member in self._members())

    def attached(self, attachment: Attachment) -> Sequence[Any] | None:
        """Remember it; what a state loaded earlier has counted continues."""
        pending = next((m.pending for m in self._members() if m.pending is not None), None)
        if self._member is None:
            self._tracker.attachment = attachment
        else:
            self._member.attachment = attachment
        return pending

    def detached(self, attachment: Attachment) -> None:
        """Forget it."""
        for member in self._members():
            member.pending = attachment.pending()
        if self._member is None:
            self._tracker.attachment = None
        else:
            self._member.attachment = None


def _unwrapped(optimizers: Any) -> list[Optimizer]:
    several = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
    found = [_innermost(optimizer) for optimizer in several]
    if not found or len({id(optimizer) for optimizer in found}) < len(found):
        raise ArgumentError(
            f"attach() needs one optimizer, or several different ones; found a list of {len(found)}."
        )
    return found


def _innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside the wrappers that frameworks put around it."""
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) or not hasattr(inner, "_optimizer_step_post_hooks"):
        raise ArgumentError(
            f"attach() needs a torch optimizer; found {type(optimizer).__name__}. Without one, call "
            "update() after each step."
        )
    return inner


def _refuse_foreign(model: Module, optimizers: Sequence[Optimizer]) -> None:
    own = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in own for p in stepped):
            names = list(own.values())
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise ArgumentError(
                f"None of the {len(stepped)} parameters of this {type(optimizer).__name__} is one of "
                f"the {len(own)} of this {type(model).__name__} ({shown}). Attach after the model is in "
                "its final form (moved, copied, wrapped), to an optimizer made from its parameters."
            )


def _checked_every(every: Any, at: Any) -> int:
    if every is not None and at is not None:
        raise ArgumentError("attach() takes every= or at=, not both.")
    if at is not None and not isinstance(at, LRSchedule):
        raise ArgumentError(
            f"at= takes a polyak.LRSchedule, which knows its averaging points; found "
            f"{type(at).__name__}. For other schedulers call update() at the right moments."
        )
    steps = 1 if every is None else every
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"every is {every!r}; expected a number of steps, 1 or more.")
    return steps


def _check_unit(known: str | None, unit: str, members: Sequence[Member]) -> None:
    if unit == "steps" and known not in (None, "steps"):
        raise ArgumentError(
            f"The hook counts steps, and this average is in {known}. Call update(dt=...) after each "
            f"step with the {known} since the last, or leave out unit=."
        )
    horizons = [profile_text(m.profile) for m in members if m.profile.has_horizon]
    if unit == "captures" and known != "captures" and (known is not None or horizons):
        raise ArgumentError(
            f"attach(at=) counts captures, each as 1, and {', '.join(horizons) or 'this average'} is "
            f"in {known or 'no unit yet'}. Pass unit='captures' if its lengths count captures, or "
            "attach(every=...) to count steps."
        )


def _was_real(optimizer: Optimizer) -> float | Tensor:
    """1, or 0 on the device for a step that a fused optimizer skipped: nothing waits for it."""
    found_inf = getattr(optimizer, "found_inf", None)
    if not isinstance(found_inf, torch.Tensor):
        return 1.0
    return (found_inf.detach().reshape(()) == 0).to(torch.float64)


def _either(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    """The larger of two numbers that are 0 or 1, of which one or both may be on a device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a + b - a * b
    return max(a, b)


class _CopyWatch:
    """Warns when an optimizer is copied or pickled: torch silently drops hooks."""

    _watched: ClassVar[WeakKeyDictionary[Optimizer, int]] = WeakKeyDictionary()  # how many watch it

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        count = self._watched.get(optimizer, 0)
        self._watched[optimizer] = count + 1
        if count == 0:
            # On the instance: copy and pickle look it up there first.
            optimizer.__reduce_ex__ = partial(_warn_and_reduce, optimizer)  # type: ignore[method-assign]

    def remove(self) -> None:
        self._watched[self._optimizer] -= 1
        if self._watched[self._optimizer] == 0:
            del self._watched[self._optimizer]
            self._optimizer.__dict__.pop("__reduce_ex__", None)


def _warn_and_reduce(optimizer: Optimizer, protocol: Any) -> Any:
    warn(
        f"This {type(optimizer).__name__} is being copied or pickled, and hooks are not: the copy's "
        "steps will not reach the average that is attached here. Attach it to the copy if that one is "
        "to train; to save an optimizer, save its state_dict()."
    )
    return type(optimizer).__reduce_ex__(optimizer, protocol)
