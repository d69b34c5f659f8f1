"""A torch learning-rate scheduler in closed form: the rate is a function of the step, nothing else."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from polyak.errors import ArgumentError, FormatError
from polyak.maths.arguments import numbers
from polyak.maths.schedules import Schedule, check_schedule


class LRSchedule(LRScheduler):
    r"""Sets the rate of every parameter group from a schedule: $lr_g = schedule(step) \cdot scale_g$.

    The rate is absolute, whatever `initial_lr` or the rate so far say. Call `step()` after each
    `optimizer.step()`, as with torch's schedulers; `last_epoch` counts the completed steps.

    `scales` holds one factor per group, by default 1; change the list to change the factors. A
    group that `add_param_group` brings later gets 1. Rates that are tensors are written in place,
    without waiting for their device.

    The state is the step and the scales, and loading it writes the rates. So it works in every
    order: built, loaded and stepped before or after the optimizer's own state is loaded, alone or
    with others of its kind in a `SequentialLR`. Mixed with torch's own schedulers it works when
    the optimizer's state is loaded last.

    Raises ArgumentError for groups that came with different rates and no `scales` (they would be
    flattened silently), and for scales that do not fit the groups.

    >>> import torch, polyak
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    >>> schedule = polyak.schedules.chain((2, polyak.schedules.Constant(0.1)), (2, polyak.schedules.Linear(0.1, 0.05)))
    >>> lr = polyak.LRSchedule(optimizer, schedule)
    >>> for _ in range(3):
    ...     optimizer.step()
    ...     lr.step()
    >>> [round(rate, 6) for rate in lr.get_last_lr()], lr.state_dict()
    ([0.075], {'step': 3, 'scales': [1.0]})
    """

    def __init__(
        self, optimizer: Optimizer, schedule: Schedule, *, scales: Sequence[float] | None = None
    ) -> None:
        check_schedule("LRSchedule takes", schedule)
        if not isinstance(optimizer, Optimizer):
            raise ArgumentError(f"Expected a torch optimizer; found {type(optimizer).__name__}.")
        self.schedule = schedule
        self.scales = _checked(scales, optimizer)
        self._step_post_hooks: OrderedDict[int, Callable[[LRSchedule], None]] = OrderedDict()
        super().__init__(optimizer)

    def _update_lr(self, epoch: int | None = None) -> None:
        # Where `step()` of torch's class ends, and what SequentialLR calls in its place when it
        # hands over to the next of its schedulers.
        super()._update_lr(epoch)
        if self._is_initial:  # constructed, alone or in a SequentialLR: nothing was stepped
            return
        for hook in list(self._step_post_hooks.values()):
            hook(self)

    def register_step_post_hook(self, hook: Callable[[LRSchedule], None]) -> RemovableHandle:
        """Call `hook(self)` after each `step()`, as `torch.optim.Optimizer` does after its own.

        So an average is taken at the schedule's averaging points, whether it steps once per
        optimizer step or once per epoch.
        """
        handle = RemovableHandle(self._step_post_hooks)
        self._step_post_hooks[handle.id] = hook
        return handle

    def get_lr(self) -> list[Any]:
        """The rate of each group at the present step, as floats."""
        groups = len(self.optimizer.param_groups)
        self.scales.extend([1.0] * (groups - len(self.scales)))
        rate = self.schedule(self.last_epoch)
        return [rate * scale for scale in self.scales[:groups]]

    def state_dict(self) -> dict[str, Any]:
        """`step` and `scales`: plain numbers, which `torch.load(weights_only=True)` reads."""
        return {"step": self.last_epoch, "scales": list(self.scales)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the state's step and write its rates into the optimizer.

        Raises FormatError for the state of another kind of scheduler; nothing is changed then.
        """
        step, scales = _read(state_dict)
        self.scales = scales
        self.last_epoch = step
        self._step_count = step + 1
        # -1 is a scheduler that waits for its turn in a SequentialLR: the rates are another's.
        if step >= 0:
            super()._update_lr(step)  # nothing was stepped, so no hook is called


def averaging_schedule(at: Any) -> LRSchedule:
    """The LRSchedule that says when to average: `at` itself, or the one inside a wrapper of it.

    Wrappers are recognised by what they hold: SequentialLR, ChainedScheduler, Accelerate's.
    Raises ArgumentError if none is there, if it never averages, or if several do.
    """
    found = _schedules_in(at)
    averaging = [lr for lr in found if _averages(lr.schedule)]
    if len(averaging) == 1:
        return averaging[0]
    if not found:
        raise ArgumentError(
            f"at= takes a polyak.LRSchedule, which knows its averaging points; found "
            f"{type(at).__name__}. For other schedulers call update() at the right moments."
        )
    said = " and ".join(str(lr.schedule) for lr in averaging or found)
    if averaging:
        raise ArgumentError(
            f"at= is a {type(at).__name__} of {len(averaging)} schedules that average, {said}. Pass "
            "the LRSchedule whose points count, or one LRSchedule of their chain()."
        )
    raise ArgumentError(
        f"at= never averages: {said} has no averaging points. Add a piece that has, such as "
        "CyclicLinear, Sawtooth or Triangular, or use attach(optimizer, every=...)."
    )


def _schedules_in(scheduler: Any, depth: int = 3) -> list[LRSchedule]:
    if isinstance(scheduler, LRSchedule):
        return [scheduler]
    if depth == 0 or not callable(getattr(scheduler, "step", None)):
        return []
    held = [
        value
        for one in getattr(scheduler, "__dict__", {}).values()
        for value in (one if isinstance(one, (list, tuple)) else [one])
    ]
    found = {id(lr): lr for value in held for lr in _schedules_in(value, depth - 1)}
    return list(found.values())


def _averages(schedule: Schedule) -> bool:
    """Whether it has averaging points in its own length; endless ones have."""
    try:
        return bool(schedule.averaging_points()) or _says_only_where(schedule)
    except ArgumentError:
        return True


def _says_only_where(schedule: Schedule) -> bool:
    # A schedule of the user's may override the one method of which the hook needs the answer.
    kind = type(schedule)
    lists, says = kind.averaging_points, kind.averages_after
    return lists is Schedule.averaging_points and says is not Schedule.averages_after


def _checked(scales: Sequence[float] | None, optimizer: Optimizer) -> list[float]:
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if scales is None:
        if len(set(rates)) > 1:
            raise ArgumentError(
                f"The optimizer's groups have different learning rates, {rates}, and one schedule "
                "would flatten them. Pass scales=, one factor per group: "
                f"scales={_ratios(rates)} keeps their ratios."
            )
        return [1.0] * len(rates)
    factors = numbers("scales", scales).reshape(-1).tolist()
    if len(factors) != len(rates):
        raise ArgumentError(f"scales has {len(factors)} factors for {len(rates)} parameter groups.")
    if not all(0 <= factor < math.inf for factor in factors):
        raise ArgumentError(f"scales is {factors}; expected finite factors, 0 or more.")
    return factors


def _ratios(rates: list[float]) -> list[float]:
    highest = max(rates)
    return [float(f"{rate / highest:.6g}") for rate in rates]


def _read(state: Any) -> tuple[int, list[float]]:
    try:
        step = operator.index(state["step"])
        scales = [float(scale) for scale in state["scales"]]
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, IndexError):
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise FormatError(
            "This is not the state of an LRSchedule: expected 'step' and 'scales', found "
            f"{found}. The state of another scheduler does not carry over; "
            "LRSchedule needs only the step: {'step': 1000, 'scales': [1.0]}."
        ) from None
    if step < -1 or not all(0 <= scale < math.inf for scale in scales):
        raise FormatError(f"An LRSchedule cannot be at step {step} with the scales {scales}.")
    return step, scales
