"""The hook: updates after an optimizer's real steps, or at a schedule's averaging points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from polyak.averaging.lr_schedule import LRSchedule, averaging_schedule
from polyak.averaging.optimizer_steps import (
    StepWatch,
    either,
    fires_hooks,
    guard_modes,
    has_own_step,
    in_evaluation_mode,
    partial_steps,
)
from polyak.averaging.tracker import Member, Tracker
from polyak.errors import ArgumentError, UsageError, some, warn
from polyak.maths.text import profile_text
from polyak.tensors.fsdp import reshard


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
        """An attached optimizer is about to overwrite the weights."""

    def before_writing(self) -> None:  # noqa: B027 - optional
        """The same, and weights that were due before the step have been taken."""

    def before_foreign_step(self) -> None:  # noqa: B027 - optional
        """Another optimizer is about to step, this model or another one."""

    def trained_parameters(self) -> Mapping[str, Tensor]:
        """The parameters that the attached optimizers are expected to step, by name."""
        return {}

    def is_lent(self) -> bool:
        """Whether the model holds other weights than those that train: nothing can be taken now."""
        return False

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
        at: LRScheduler | None = None,
        before_next_step: bool = False,
        by_hand: bool = False,
    ) -> None:
        self._customer = customer
        several = isinstance(optimizers, (list, tuple))
        self._optimizers = list(optimizers) if several else [optimizers]
        self._every = _checked_every(every, at, by_hand=by_hand)
        self._by_hand = by_hand
        self._at = None if at is None else averaging_schedule(at)
        self._before_next_step = before_next_step
        self._due: tuple[float, bool | Tensor] | None = None  # to be taken before the next step
        self._takes_entering_weights = at is not None
        self._has_stepped = False
        self._warned_mode = False
        self._steps = 0  # since the last update, skipped ones included,
        self._real: float | Tensor = 0.0  # and those of them that were not skipped
        self._stepped: dict[int, float | Tensor] = {}  # since the last step of all: which, how real
        self._handles: list[Any] = []
        self._connect()

    def remove(self) -> None:
        """Take the hooks away; the average keeps what it has. A second call does nothing."""
        if self._handles:
            try:
                self.take_due()
            finally:
                self._customer.detached(self)
                self._remove_hooks()

    def take_due(self) -> None:
        """Take the weights that wait for the next step, as the loop has left them."""
        if self._due is not None and not self._customer.is_lent():
            due, self._due = self._due, None
            self._customer.update(*due)

    def pending(self) -> list[Any]:
        """Steps counted since the last update: all, the real ones, and which optimizers began one."""
        return [self._steps, float(self._real), sorted(self._stepped)]

    def check_parameters(self) -> None:
        """Refuse a model whose parameters have been replaced since: the optimizer steps the old ones."""
        for optimizer, watch in zip(self._optimizers, self._watches, strict=True):
            _refuse_foreign(self._customer.model, optimizer, watch)

    def resume(self, pending: Sequence[Any]) -> None:
        """Continue counting from what `pending` returned."""
        self._due = None
        self._steps, self._real = pending[0], pending[1]
        self._stepped = dict.fromkeys(pending[2], 1.0)

    @property
    def is_late(self) -> bool:
        """Whether weights are taken as late as possible, when the next step begins."""
        return self._before_next_step

    def unused(self) -> str:
        """What to say of an average that is empty because no step was ever seen; often nothing."""
        if self._has_stepped:
            return ""
        names = " and ".join(type(optimizer).__name__ for optimizer in self._optimizers)
        return (
            f" step() of {names}, to which it is attached, has not been called: attach what your loop "
            "calls step() on, or call update()."
        )

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:
            self._due = None
        self.remove()

    def _connect(self) -> None:
        customer = self._customer
        captures = self._at is not None or customer.unit == "captures"
        try:
            self._watches = self._register()
            _check_optimizers(customer, self._optimizers, self._watches)
            if not self._by_hand:
                customer.begin("captures" if captures else "steps")
            self._warn_evaluation_mode()
        except BaseException:
            self._remove_hooks()
            raise
        if (pending := customer.attached(self)) is not None:
            self.resume(pending)

    def _register(self) -> list[StepWatch]:
        watches: list[StepWatch] = []
        customer = self._customer
        for index, optimizer in enumerate(self._optimizers):
            watch = StepWatch(optimizer, self._before_step, partial(self._after_step, index))
            watches.append(watch)
            self._handles.append(watch)
            for layer in watch.layers:
                self._handles.extend(guard_modes(layer, customer.before_writing, customer.is_lent))
            if hooked := next(filter(fires_hooks, watch.layers), None):
                self._handles.append(_CopyWatch(hooked))
        self._handles.append(_AnyStep(self))
        if self._at is not None:
            self._handles.append(self._at.register_step_post_hook(self._after_schedule))
        return watches

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _before_step(self) -> None:
        self._customer.before_step()
        self._has_stepped = True
        self.take_due()
        if self._takes_entering_weights:
            self._take_entering_weights()
        self._customer.before_writing()

    def before_foreign_step(self, optimizer: Optimizer) -> None:
        """Any optimizer is about to step; those that it is attached to are none of its business here."""
        if not any(optimizer is layer for watch in self._watches for layer in watch.layers):
            self._customer.before_foreign_step()

    def _take_entering_weights(self) -> None:
        """Where the schedule averages at the very step it is attached at: for an empty average.

        A resumed one is not empty, so nothing counts twice. This waits for the first step, because
        a state may be loaded, into the schedule and into the average, after attaching, and because
        the schedule may be put into a SequentialLR, where it waits for its turn at step -1.
        """
        self._takes_entering_weights = False
        lr = self._at
        begins = lr is not None and lr.last_epoch >= 0 and lr.schedule.averages_after(lr.last_epoch)
        if begins and self._customer.is_empty():
            self._customer.update(1.0)

    def _after_schedule(self, lr: LRSchedule) -> None:
        self._takes_entering_weights = False
        if lr.schedule.averages_after(lr.last_epoch):
            self._warn_evaluation_mode()
            self._take(1.0)

    def _after_step(self, index: int, real: float | Tensor) -> None:
        # Of several optimizers one may step more often (five critics to one generator): a step of
        # all is over once each has stepped, and it is real if one of its steps was.
        if self._at is not None or self._by_hand:
            return
        self._stepped[index] = either(self._stepped.get(index, 0.0), real)
        if len(self._stepped) < len(self._optimizers):
            return
        real = 0.0
        for one in self._stepped.values():
            real = either(real, one)
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
            self._take(dt, (done > 0).to(done.dtype) if one_capture else done / dt)
        else:
            self._take(dt)

    def _take(self, dt: float, real: bool | Tensor = True) -> None:
        if self._before_next_step:
            self.take_due()
            self._due = (dt, real)
        else:
            self._customer.update(dt, real)

    def _warn_evaluation_mode(self) -> None:
        layers = [layer for watch in self._watches for layer in watch.layers]
        found = next(filter(in_evaluation_mode, layers), None)
        if found is not None and not self._warned_mode:
            self._warned_mode = True
            warn(
                f"{type(found).__name__} is in its evaluation mode: the model holds that optimizer's "
                "own average, not the weights that train. Call its train() before weights are taken."
            )


class _AnyStep:
    """torch's hook of all optimizers, one for all attachments.

    torch keeps such hooks for good, so it must not keep an attachment alive, whose model and average would stay
    in memory where nobody calls `detach`. One that is gone must not take a hook away either: the garbage may
    be collected while torch walks through them.
    """

    _attachments: ClassVar[WeakSet[Attachment]] = WeakSet()
    _handle: ClassVar[Any] = None

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._attachments.add(attachment)
        if _AnyStep._handle is None:
            _AnyStep._handle = register_optimizer_step_pre_hook(self._before_step)

    def remove(self) -> None:
        self._attachments.discard(self._attachment)
        if not self._attachments and _AnyStep._handle is not None:  # a copy has registered nothing
            _AnyStep._handle.remove()
            _AnyStep._handle = None

    @classmethod
    def _before_step(cls, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for attachment in list(cls._attachments):
            attachment.before_foreign_step(optimizer)


class Members(Customer):
    """The members of a tracker that one attachment updates: one, or all without one of their own."""

    def __init__(self, tracker: Tracker, member: Member | None = None) -> None:
        self._tracker = tracker
        self._member = member
        self._owner = tracker if member is None else member  # of the attachment
        self.model = tracker.tensors.model
        self.unit = self._known_unit()
        if self._owner.attachment is not None:
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
        """Average what is about to train for the first time."""
        self._tracker.refuse_during_loan("step()")
        self._tracker.add_unfrozen()

    def before_writing(self) -> None:
        """Wait for what is still being read."""
        self._tracker.wait_before_step()

    def before_foreign_step(self) -> None:
        """Both: what is unfrozen may be stepped by an optimizer of its own first."""
        if not self.is_lent():
            self._tracker.wait_before_step()
            self._tracker.add_unfrozen()

    def trained_parameters(self) -> Mapping[str, Tensor]:
        """What is averaged and takes gradients."""
        return self._tracker.tensors.trained_parameters()

    def is_lent(self) -> bool:
        """Whether an average is swapped in."""
        return self._tracker.owner_of_loan() is not None

    def is_empty(self) -> bool:
        """Whether none of them has averaged anything."""
        return all(member.is_empty() for member in self._members())

    def attached(self, attachment: Attachment) -> Sequence[Any] | None:
        """Remember it; what a state loaded earlier has counted continues."""
        pending = next((m.pending for m in self._members() if m.pending is not None), None)
        self._owner.attachment = attachment
        return pending

    def detached(self, attachment: Attachment) -> None:
        """Forget it; no hook orders what comes next."""
        self._tracker.wait_before_step()
        for member in self._members():
            member.pending = attachment.pending()
        self._owner.attachment = None


def _check_optimizers(
    customer: Customer, optimizers: Sequence[Any], watches: Sequence[StepWatch]
) -> None:
    reshard(customer.model)  # gathered parameters are not those that an optimizer steps
    counted = [layer for watch in watches for layer in watch.layers]
    if not watches or len({id(layer) for layer in counted}) < len(counted):
        raise ArgumentError(
            "attach() needs one optimizer, or several different ones; found a list of "
            f"{len(optimizers)}."
        )
    for layer in counted:
        if isinstance(layer, Optimizer) and not has_own_step(layer):
            raise ArgumentError(
                f"{type(layer).__name__} has no step() of its own, so no hook can tell when it has "
                "stepped. Call update() after each step instead of attach()."
            )
    for optimizer, watch in zip(optimizers, watches, strict=True):
        _refuse_foreign(customer.model, optimizer, watch)
        _warn_partial_steps(optimizer)
    _warn_unstepped(customer, optimizers, watches)


def _refuse_foreign(model: Module, optimizer: Any, watch: StepWatch) -> None:
    own = {id(p): name for name, p in model.named_parameters()}
    stepped = list(watch.parameters())
    if not any(id(p) in own for p in stepped):
        raise ArgumentError(
            f"None of the {len(stepped)} parameters of this {type(optimizer).__name__} is one of "
            f"the {len(own)} of this {type(model).__name__} ({some(own.values())}). Attach after the "
            "model is in its final form (moved, copied, wrapped, sharded), to an optimizer made from its "
            "parameters then. If a framework steps copies of them (float32 master weights), call update() "
            "after each step that it has taken; with DeepSpeed ZeRO stages 1 and 2, "
            "average.update() after engine.step() if engine.was_step_applied()."
        )


def _warn_partial_steps(optimizer: Any) -> None:
    if parts := partial_steps(optimizer):
        calls = " and ".join(f"{name}()" for name in parts)
        warn(
            f"{type(optimizer).__name__} has {calls} besides step(), and attach() sees only step(). If "
            "your loop calls those instead, detach() and call update() after the last of them."
        )


def _warn_unstepped(
    customer: Customer, optimizers: Sequence[Any], watches: Sequence[StepWatch]
) -> None:
    stepped = {id(p) for watch in watches for p in watch.parameters()}
    trained = customer.trained_parameters()
    left = [name for name, parameter in trained.items() if id(parameter) not in stepped]
    if left:
        names = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
        warn(
            f"{names} steps {len(trained) - len(left)} of the {len(trained)} parameters that train and "
            f"are averaged, not {some(left)}. These enter the average as they are whenever the others "
            "have stepped. Pass all optimizers in a list, attach([first, second]). If nothing trains "
            "them, freeze them, requires_grad_(False), or leave them out with exclude=."
        )


def _checked_every(every: Any, at: Any, *, by_hand: bool) -> int:
    if every is not None and at is not None:
        raise ArgumentError("attach() takes every= or at=, not both.")
    if by_hand and (every is not None or at is not None):
        raise ArgumentError(
            "attach(by_hand=True) never updates, so it takes neither every= nor at=."
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
        left = self._watched.pop(self._optimizer, 1) - 1  # a copy has registered nothing
        if left:
            self._watched[self._optimizer] = left
        else:
            self._optimizer.__dict__.pop("__reduce_ex__", None)


def _warn_and_reduce(optimizer: Optimizer, protocol: Any) -> Any:
    warn(
        f"This {type(optimizer).__name__} is being copied or pickled, and hooks are not: the copy's "
        "steps will not reach the average that is attached here. Attach it to the copy if that one is "
        "to train; to save an optimizer, save its state_dict()."
    )
    return type(optimizer).__reduce_ex__(optimizer, protocol)
