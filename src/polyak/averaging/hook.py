"""The hook: an average that follows an optimizer's real steps, or a schedule's averaging points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from polyak.averaging.lr_schedule import LRSchedule
from polyak.averaging.state import spelled
from polyak.averaging.tracker import Following
from polyak.errors import ArgumentError, UsageError, warn


class Attachment:
    """What `attach` gives: the hooks are in place until `remove` (or the end of a `with`)."""

    def __init__(
        self,
        following: Following,
        optimizer: Any,
        *,
        every: int | None,
        at: LRSchedule | None,
    ) -> None:
        if following.attachment is not None:
            raise UsageError(
                "This average is attached already, and would count every step twice. With several "
                "optimizers attach it to the one whose steps are to count; to move it, remove() first."
            )
        self._following = following
        self._optimizer = unwrapped(optimizer)
        _refuse_foreign(following, self._optimizer)
        self._every = _checked_every(every, at)
        following.unit = _unit(following, at)
        self._at = at
        self._takes_first = at is not None and at.last_epoch == 0 and at.schedule.averages_after(0)
        following.attachment = self
        self._handles = [self._optimizer.register_step_pre_hook(self._before_step)]
        if at is None:
            self._handles.append(self._optimizer.register_step_post_hook(self._after_step))
        else:
            self._handles.append(at.register_step_post_hook(self._after_schedule))
        self._unwatch = _watch_copies(self._optimizer, self)

    def remove(self) -> None:
        """Take the hooks away; the average keeps what it has. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        if self._following.attachment is self:
            self._following.attachment = None
            self._unwatch()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._following.wait_before_step()
        self._following.adopt_thawed()
        if self._takes_first:
            self._take_first()

    def _take_first(self) -> None:
        """A schedule that averages from the start: these are the weights that enter it."""
        self._takes_first = False
        was_resumed = self._at is None or self._at.last_epoch > 0
        if not was_resumed and all(held.is_empty() for held in self._following.members):
            self._following.update(1.0)

    def _after_schedule(self, lr: LRSchedule) -> None:
        self._takes_first = False
        if lr.schedule.averages_after(lr.last_epoch):
            self._following.update(1.0)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        following = self._following
        following.pending_steps += 1
        following.pending_real = following.pending_real + self._was_real()
        if following.pending_steps < self._every:
            return
        done = following.pending_real
        following.pending_steps, following.pending_real = 0, 0.0
        one_capture = following.unit == "captures"
        dt = 1.0 if one_capture else float(self._every)
        if isinstance(done, torch.Tensor):
            following.update(dt, (done > 0).to(done.dtype) if one_capture else done / self._every)
        else:
            following.update(dt)

    def _was_real(self) -> float | torch.Tensor:
        """1, or 0 on the device for a step that a fused optimizer skipped: nothing waits for it."""
        found_inf = getattr(self._optimizer, "found_inf", None)
        if not isinstance(found_inf, torch.Tensor):
            return 1.0
        return (found_inf.detach().reshape(()) == 0).to(torch.float64)


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside the wrappers that frameworks put around it.

    Raises ArgumentError if there is none.
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) or not hasattr(inner, "_optimizer_step_post_hooks"):
        raise ArgumentError(
            f"attach() needs a torch optimizer; found {type(optimizer).__name__}. Without one, call "
            "update() after each step."
        )
    return inner


def _refuse_foreign(following: Following, optimizer: Optimizer) -> None:
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    model = following.roster.model
    own = {id(p): name for name, p in model.named_parameters()}
    if not any(id(p) in own for p in stepped):
        names = list(own.values())
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise ArgumentError(
            f"None of the {len(stepped)} parameters of this {type(optimizer).__name__} is one of the "
            f"{len(own)} of this {type(model).__name__} ({shown}). Attach after the model is in its "
            "final form (moved, copied, wrapped), to an optimizer made from its parameters."
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


def _unit(following: Following, at: LRSchedule | None) -> str:
    unit = following.unit
    if at is None:
        if unit not in (None, "steps", "captures"):
            raise ArgumentError(
                f"The hook counts steps, and this average is in {unit}. Call update(dt=...) after "
                f"each step with the {unit} since the last, or leave out unit=."
            )
        return unit or "steps"
    horizons = [spelled(held.profile) for held in following.members if held.profile.has_horizon]
    if unit != "captures" and (unit is not None or horizons):
        raise ArgumentError(
            f"attach(at=) counts captures, each as 1, and {', '.join(horizons) or 'this average'} is "
            f"in {unit or 'no unit yet'}. Say Average(..., unit='captures') if its lengths are meant "
            "in captures, or attach(every=...) to count steps."
        )
    return "captures"


def _watch_copies(optimizer: Optimizer, attachment: Attachment) -> Callable[[], None]:
    """Warn when the optimizer is copied or pickled: torch leaves hooks behind without a word."""
    reduce = optimizer.__reduce_ex__

    def noticed(protocol: Any) -> Any:
        warn(
            f"This {type(optimizer).__name__} is being copied or pickled, and hooks are not: the copy's "
            "steps will not reach the average that is attached here. Attach it to the copy if that one "
            "is to train; to save an optimizer, save its state_dict().",
        )
        return reduce(protocol)

    # On the instance: copy and pickle look it up there first.
    optimizer.__reduce_ex__ = noticed  # type: ignore[method-assign]
    return lambda: _unwatch(optimizer, noticed)


def _unwatch(optimizer: Optimizer, noticed: object) -> None:
    if optimizer.__dict__.get("__reduce_ex__") is noticed:
        del optimizer.__reduce_ex__
