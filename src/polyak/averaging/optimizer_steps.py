"""The real steps of an optimizer, however it is wrapped: where one begins, and where it is over."""

from __future__ import annotations

import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from polyak.errors import ArgumentError, UsageError

# The function that torch puts around `step`, and which calls the hooks.
_HOOKED: Any = Optimizer.profile_hook_step(lambda: None).__code__
_ABSENT = object()


class StepWatch:
    """Calls `before()` where a step of an optimizer begins, and `after(real)` where it is over.

    A step is real if an innermost optimizer has stepped, and over when the outermost call around it
    returns: wrappers change the weights after the step inside them (Lookahead), leave it out
    (gradient accumulation) or spread it over two calls (SAM). torch's hooks are used where they
    fire; elsewhere the object's own `step` is replaced, until `remove`.
    """

    def __init__(
        self,
        optimizer: Any,
        before: Callable[[], None],
        after: Callable[[float | Tensor], None],
    ) -> None:
        self.layers = layers(optimizer)
        self._before, self._after = before, after
        self._depth = 0  # how many of the calls that we watch are under way, one in the other
        self._real: float | Tensor | None = None  # of this step, once an innermost one is over
        self._hooked: list[Any] = []  # the layers of which torch's hooks are used
        self._handles: list[Any] = []
        try:
            for layer in self.layers:
                self._handles.extend(self._watch(layer))
        except ArgumentError:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the hooks away, the last first."""
        while self._handles:
            self._handles.pop().remove()

    def parameters(self) -> Iterator[Tensor]:
        """All that any of the layers steps."""
        for layer in self.layers:
            for group in getattr(layer, "param_groups", ()):
                yield from group["params"]

    def _watch(self, layer: Any) -> Iterator[Any]:
        position = self.layers.index(layer)
        wraps = any(self.layers.index(inner) > position for inner in _inside(layer))
        replaced = list(_partial_steps(layer)) if wraps else []
        if fires_hooks(layer):
            self._hooked.append(layer)
            last = layer.register_step_post_hook(partial(self._hooked_leave, not wraps))
            yield last
            yield layer.register_step_pre_hook(partial(self._hooked_enter, last.id))
            if not getattr(layer.step, "hooked", False):
                replaced.append("step")
        else:
            replaced.append("step")
        for name in replaced:
            yield Replaced(layer, name, partial(self._around, layer, innermost=not wraps))

    def _hooked_enter(self, last: int, layer: Any, args: Any, kwargs: Any) -> None:
        hooks = layer._optimizer_step_post_hooks
        if last in hooks:  # behind those registered since, which may change the weights
            hooks[last] = hooks.pop(last)
        self._enter()

    def _hooked_leave(self, innermost: bool, layer: Any, args: Any, kwargs: Any) -> None:
        self._leave(layer, innermost=innermost)

    def _around(self, layer: Any, call: Callable[[], Any], *, innermost: bool) -> Any:
        self._enter()
        result = call()
        self._leave(layer, innermost=innermost)
        return result

    def _enter(self) -> None:
        # What looks like a step within a step may be the first since one that raised: the call
        # stack tells. A subclass that calls `super().step()` really is within its own.
        self._depth = self._under_way() if self._depth else 1
        if self._depth == 1:
            self._real = None
            self._before()

    def _leave(self, layer: Any, *, innermost: bool) -> None:
        if innermost and not _is_rehearsal(layer):
            self._real = either(0.0 if self._real is None else self._real, _was_real(layer))
        self._depth -= 1
        if self._depth <= 0 and self._real is not None:
            real, self._real = self._real, None
            self._after(real)

    def _under_way(self) -> int:
        frame, found = sys._getframe(1), 0
        while frame is not None:
            if frame.f_code is _HOOKED:
                found += any(frame.f_locals.get("self") is layer for layer in self._hooked)
            elif frame.f_code is StepWatch._around.__code__:
                found += frame.f_locals["self"] is self
            frame = frame.f_back  # type: ignore[assignment] # the loop ends at None
        return max(found, 1)


class Replaced:
    """A method of one object, of which `around(call)` decides what happens, until `remove`."""

    def __init__(self, owner: Any, name: str, around: Callable[[Callable[[], Any]], Any]) -> None:
        self._owner, self._name = owner, name
        self._kept = getattr(owner, "__dict__", {}).get(name, _ABSENT)
        self._removed = False
        original = getattr(owner, name)
        is_own = getattr(original, "__self__", None) is owner

        @functools.wraps(original)
        def method(this: Any, *args: Any, **kwargs: Any) -> Any:
            # A copy of the owner takes this function along, and is to act on itself.
            call = partial(original.__func__, this) if is_own else original
            if self._removed or this is not owner:
                return call(*args, **kwargs)
            return around(partial(call, *args, **kwargs))

        method._replaced_by = self  # type: ignore[attr-defined] # found again by `remove`
        try:
            setattr(owner, name, MethodType(method, owner))
        except AttributeError:
            raise ArgumentError(
                f"{type(owner).__name__} has no hooks and its {name}() cannot be watched. Call "
                "update() after each step instead of attach()."
            ) from None

    def remove(self) -> None:
        """Put back what was there, unless somebody else has replaced it since: then do nothing more."""
        self._removed = True
        own: dict[str, Any] = self._owner.__dict__
        while (top := getattr(own.get(self._name), "_replaced_by", None)) and top._removed:
            own.pop(self._name)
            if top._kept is not _ABSENT:
                own[self._name] = top._kept


def layers(optimizer: Any) -> list[Any]:
    """The optimizer and all those inside it, from the outside in.

    Raises ArgumentError for what has no `step()`, or neither parameters nor an optimizer in it.
    """
    if not callable(getattr(optimizer, "step", None)) or not (
        _is_optimizer(optimizer) or _inside(optimizer)
    ):
        raise ArgumentError(
            f"attach() needs a torch optimizer; found {type(optimizer).__name__}. Pass what your loop "
            "calls step() on, or call update() after each step."
        )
    found = [optimizer]
    for layer in found:  # grows on the way
        found += [inner for inner in _inside(layer) if all(inner is not one for one in found)]
    return found


def fires_hooks(optimizer: Any) -> bool:
    """Whether torch's step hooks can be used: only where torch's own constructor has run."""
    hooks = getattr(optimizer, "__dict__", {}).get("_optimizer_step_post_hooks")
    return isinstance(hooks, OrderedDict) and getattr(type(optimizer).step, "hooked", False)


def partial_steps(optimizer: Any) -> list[str]:
    """Further steps of an optimizer that works alone: `second_step`, which `step()` may never see."""
    return [] if _inside(optimizer) else list(_partial_steps(optimizer))


def has_own_step(optimizer: Any) -> bool:
    """Whether `step` is more than what torch's base class has, which raises."""
    step: Any = inspect.unwrap(type(optimizer).step)
    return step is not inspect.unwrap(Optimizer.step)


def guard_modes(
    layer: Any, before: Callable[[], None], is_lent: Callable[[], bool]
) -> Iterator[Replaced]:
    """Refuse `eval()` and `train()` of schedule-free optimizers, which convert the weights in place.

    `before` is called before they do. Only where they do: wrappers have these methods for others, and on most they change nothing.
    """
    if _has_modes(layer):
        both = {"eval": layer.train, "train": layer.eval}  # each with what undoes it
        for name, undo in both.items():
            yield Replaced(layer, name, partial(_refuse_mode, layer, name, undo, before, is_lent))


def in_evaluation_mode(layer: Any) -> bool:
    """Whether a schedule-free optimizer has put its evaluation weights into the model."""
    flags = [vars(layer).get("train_mode"), *(g.get("train_mode") for g in _groups(layer))]
    return _has_modes(layer) and bool(getattr(layer, "state", None)) and False in flags


def either(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    """The larger of two numbers that are 0 or 1, of which one or both may be on a device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a + b - a * b
    return max(a, b)


def _was_real(optimizer: Any) -> float | Tensor:
    """1, or 0 on the device for a step that a fused optimizer skipped: nothing waits for it."""
    found_inf = getattr(optimizer, "found_inf", None)
    if not isinstance(found_inf, Tensor):
        return 1.0
    return (found_inf.detach().reshape(()) == 0).to(torch.float64)


def _is_rehearsal(optimizer: Any) -> bool:
    """Whether `torch.distributed.checkpoint` steps it with rates of 0, to make room for its state.

    A warm-up may begin with a rate of 0 too, and such a step is real: the call stack tells.
    """
    for group in getattr(optimizer, "param_groups", ()):
        rate = group.get("lr")
        on_host = isinstance(rate, float) or (
            isinstance(rate, Tensor) and rate.device.type == "cpu"
        )
        if not on_host or rate != 0:
            return False
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name == "_init_optim_state" and "checkpoint" in frame.f_globals["__name__"]:
            return True
        frame = frame.f_back  # type: ignore[assignment] # the loop ends at None
    return False


def _is_optimizer(value: Any) -> bool:
    if isinstance(value, (type, Module)):
        return False
    if isinstance(value, Optimizer):
        return True
    has = all(callable(getattr(value, name, None)) for name in ("step", "zero_grad"))
    return has and hasattr(value, "param_groups")


def _inside(wrapper: Any) -> list[Any]:
    """The optimizers that this object holds, alone, in a list or in a dict; by what they are."""
    values = [getattr(wrapper, "optimizer", None)]  # which may be a property
    for name, value in getattr(wrapper, "__dict__", {}).items():
        if name in ("state", "param_groups", "defaults"):
            continue
        several = value.values() if isinstance(value, dict) else value
        values += several if isinstance(value, (dict, list, tuple)) else [value]
    found: dict[int, Any] = {id(v): v for v in values if v is not wrapper and _is_optimizer(v)}
    return list(found.values())


def _partial_steps(optimizer: Any) -> Iterator[str]:
    """Public methods named like a part of a step, which can be called without arguments."""
    for name in dir(type(optimizer)):
        method = inspect.getattr_static(type(optimizer), name)
        own = name.endswith("_step") and not name.startswith("_") and not hasattr(Optimizer, name)
        if own and inspect.isfunction(method):
            needed = list(inspect.signature(method).parameters.values())[1:]
            if all(p.default is not p.empty or p.kind in (2, 4) for p in needed):
                yield name


def _has_modes(layer: Any) -> bool:
    modes = (getattr(layer, "train", None), getattr(layer, "eval", None))
    return all(map(callable, modes)) and not isinstance(layer, Module)


def _groups(layer: Any) -> list[dict[str, Any]]:
    return list(getattr(layer, "param_groups", ()))


def _flags(layer: Any) -> list[bool]:
    values = [v for holder in (vars(layer), *_groups(layer)) for v in holder.values()]
    return [v for v in values if isinstance(v, bool)]


def _refuse_mode(
    layer: Any,
    name: str,
    undo: Callable[[], Any],
    before: Callable[[], None],
    is_lent: Callable[[], bool],
    call: Callable[[], Any],
) -> Any:
    before()
    flags = _flags(layer)
    result = call()
    if is_lent() and _flags(layer) != flags:
        undo()
        raise UsageError(
            f"{type(layer).__name__}.{name}() inside applied(): it converts the weights in place, and "
            "the model holds the average, of which it knows nothing. Evaluate either the average or "
            f"the optimizer's own weights: call {name}() outside the `with` block."
        )
    return result
