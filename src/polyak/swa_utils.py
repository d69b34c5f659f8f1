"""The drop-in for `torch.optim.swa_utils`: change the import, keep the script.

Every name of torch's module is here, with the same arguments and meaning, and state dicts load both
ways. What torch gets wrong is corrected; the page "Differences from torch" lists each case.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR as _TorchSWALR  # noqa: N811 - both have this name
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from polyak.batchnorm import update_bn as pooled_update_bn
from polyak.batchnorm.batches import moved
from polyak.errors import ArgumentError, UsageError, check_match
from polyak.maths.arguments import number
from polyak.tensors.blend import accumulator_dtype, lerp_
from polyak.tensors.memory import odd_form, shape_of
from polyak.tensors.names import named_tensors, overwrite, require_module

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]


Tensors = tuple[Tensor, ...] | list[Tensor]
AvgFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]
MultiAvgFn = Callable[[Tensors, Tensors, Tensor | int], None]

_WIDE = "polyak_accumulators"  # in the state dict's metadata, which torch's class ignores


class _Pair(NamedTuple):
    name: str
    held: Tensor  # by the copy of the model
    average: Tensor
    current: Tensor
    is_parameter: bool


class AveragedModel(Module):
    """A copy of `model` that averages its weights: SWA by default, EMA with another function.

    With n updates so far and w the current weights, the default is ``a += (w - a) / (n + 1)``; the
    first update copies. Tensors are matched by name; 16-bit weights are averaged in float32 and
    rounded once; integer and boolean buffers are those of the newest model.

    Args:
        model: the model to average; it is copied.
        device: where to keep the copy; beside the model by default.
        avg_fn: ``avg_fn(averaged, current, num_averaged)`` returns the new average of one tensor.
        multi_avg_fn: ``multi_avg_fn(averaged_list, current_list, num_averaged)`` moves lists in
            place.
        use_buffers: average floating buffers too, instead of copying them.

    Raises:
        ArgumentError: both functions are passed.
        UsageError: a model that cannot be copied, such as one sharded by FSDP2.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> averaged = AveragedModel(model)
        >>> for value in (1.0, 3.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        ...     averaged.update_parameters(model)
        >>> averaged.module.weight.item()
        2.0

    """

    n_averaged: Tensor

    def __init__(
        self,
        model: Module,
        device: int | torch.device | str | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise ArgumentError("Both avg_fn and multi_avg_fn were passed; pass only one of them.")
        self.module = _copied(model)
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers
        # float32 accumulators of 16-bit weights, and the identity of the weights they were rounded to
        self._wide: dict[str, tuple[Tensor, tuple[int, int]]] = {}
        self._loaded_wide: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged model."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Update the average with the current weights of `model`.

        Raises:
            MismatchError: tensors are missing, unexpected or of another shape; the message names
                all of them, and nothing is changed.

        """
        require_module(model, "update_parameters()")
        pairs = self._aligned(model)
        copied = [pair for pair in pairs if not self._is_averaged(pair)]
        averaged = [pair for pair in pairs if self._is_averaged(pair)]
        _refuse_odd_forms(averaged)
        accumulators = [self._accumulator(pair) for pair in averaged]
        if int(self.n_averaged) == 0:
            for accumulator, pair in zip(accumulators, averaged, strict=True):
                accumulator.copy_(pair.current)
        else:
            self._average(accumulators, [pair.current for pair in averaged])
        for accumulator, pair in zip(accumulators, averaged, strict=True):
            if accumulator is not pair.average:
                pair.average.copy_(accumulator)
                self._wide[pair.name] = (accumulator, _identity(pair.average))
        for pair in copied:
            overwrite(self.module, pair.held, pair.current)
        self.n_averaged += 1

    def _aligned(self, model: Module) -> list[_Pair]:
        """Averaged and current tensors, matched by name without the prefixes of wrappers."""
        mine, theirs = named_tensors(self.module).slots, named_tensors(model).slots
        check_match(
            {name: shape_of(slot.tensor) for name, slot in theirs.items()},
            {name: shape_of(slot.tensor) for name, slot in mine.items()},
            "This model does not match the one that the AveragedModel was built from.",
            "Nothing was averaged. Build the AveragedModel when the model is complete.",
        )
        return [
            _Pair(n, s.tensor, s.tensor.detach(), theirs[n].tensor.detach(), s.is_parameter)
            for n, s in mine.items()
        ]

    def _is_averaged(self, pair: _Pair) -> bool:
        can_average = pair.average.is_floating_point() or pair.average.is_complex()
        asked = pair.is_parameter or (self.use_buffers and not odd_form(pair.average))
        return can_average and asked

    def _accumulator(self, pair: _Pair) -> Tensor:
        """What to average in: the tensor itself, or for 16 bits a float32 one beside it."""
        average = pair.average
        dtype = accumulator_dtype(average.dtype, None)
        if dtype == average.dtype:
            return average
        wide, identity = self._wide.get(pair.name, (None, None))
        if wide is not None and identity == _identity(average):
            return wide
        loaded = self._loaded_wide.pop(pair.name, None)
        if loaded is not None:
            loaded = loaded.to(average.device)
            if torch.equal(loaded.to(average.dtype), average):
                return loaded.clone()
        return average.to(dtype)  # the weights were changed from outside: continue from them

    def _average(self, averages: list[Tensor], currents: list[Tensor]) -> None:
        """Move the averages in place, by the user's function or by the default."""
        pairs = zip(averages, currents, strict=True)
        here = [current.to(average.device, average.dtype) for average, current in pairs]
        if self.avg_fn is not None:
            for average, current in zip(averages, here, strict=True):
                n_averaged = self.n_averaged.to(average.device)
                average.copy_(self.avg_fn(average, current, n_averaged))
            return
        move: Any = self.multi_avg_fn or get_swa_multi_avg_fn()
        lists: Any = [averages, here]
        for (device, _), (group, _) in _group_tensors_by_device_and_dtype(lists).items():
            move(group[0], group[1], self.n_averaged.to(device))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose tensors are others: accumulators are found by their values."""
        wide = self._loaded_wide | dict(self._fresh_wide())
        return {**self.__dict__, "_wide": {}, "_loaded_wide": wide}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and self._wide:
            wide = {n: tensor.detach().clone() for n, tensor in self._fresh_wide()}
            metadata[prefix[:-1]][_WIDE] = wide

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        compiled = f"{prefix}module._orig_mod."  # in torch's states of compiled models
        for key in [k for k in state_dict if k.startswith(compiled)]:
            state_dict[f"{prefix}module.{key.removeprefix(compiled)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._wide, self._loaded_wide = {}, dict(rest[0].get(_WIDE, {}))

    def _fresh_wide(self) -> Iterator[tuple[str, Tensor]]:
        slots = named_tensors(self.module).slots
        for name, (wide, identity) in self._wide.items():
            if identity == _identity(slots[name].tensor):
                yield name, wide


def _refuse_odd_forms(pairs: Iterable[_Pair]) -> None:
    """UsageError for parameters without plain values, except classes that carry arithmetic over."""
    forms = {
        pair.name: form
        for pair in pairs
        if (form := odd_form(pair.average))
        and (pair.average.is_nested or not is_traceable_wrapper_subclass(pair.average))
    }
    if forms:
        raise UsageError(
            "AveragedModel averages dense tensors; not "
            f"{', '.join(f'{name} ({form})' for name, form in forms.items())}. Nothing was averaged. "
            "Use polyak.Average(model, polyak.SWA(), exclude=...), which leaves such tensors in the model."
        )


def _copied(model: Module) -> Module:
    """A deep copy; what `torch.compile` wraps, without the wrapper, so that names stay plain."""
    require_module(model, "AveragedModel")
    model = getattr(model, "_orig_mod", model)
    try:
        return copy.deepcopy(model, _derived_tensors(model))
    except (AssertionError, RuntimeError) as error:
        slots = named_tensors(model).slots
        odd = [f"{n} is {form}; " for n, s in slots.items() if (form := odd_form(s.tensor))]
        raise UsageError(
            f"AveragedModel copies the model, and this {type(model).__name__} cannot be copied "
            f"({''.join(odd)}{str(error).splitlines()[0]}). Use polyak.Average(model, "
            "polyak.SWA()), which copies nothing and averages sharded models as they are."
        ) from error


def _derived_tensors(model: Module) -> dict[int, Any]:
    """Copies of computed tensors that modules store (old weight_norm), which refuse deepcopy."""
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Changes when the tensor's memory is replaced or written to."""
    return tensor.data_ptr(), tensor._version


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    """A function that moves lists of tensors, in place: ``a = decay * a + (1 - decay) * w``.

    Integer and boolean tensors become those of `w`: a count has no average.

    Raises:
        ArgumentError: a decay outside [0, 1].

    """
    _check(decay)

    def ema_update(ema_param_list: Tensors, current_param_list: Tensors, _: Tensor | int) -> None:
        _move(ema_param_list, current_param_list, 1 - decay)

    return ema_update


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """A function that moves lists of tensors, in place: ``a += (w - a) / (num_averaged + 1)``.

    Integer and boolean tensors become those of `w`: a count has no average.
    """

    def swa_update(
        averaged_param_list: Tensors, current_param_list: Tensors, num_averaged: Tensor | int
    ) -> None:
        _move(averaged_param_list, current_param_list, 1 / (int(num_averaged) + 1))

    return swa_update


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    """A function of one tensor: ``decay * a + (1 - decay) * w``.

    Raises:
        ArgumentError: a decay outside [0, 1].

    """
    _check(decay)

    @torch.no_grad()
    def ema_update(ema_param: Tensor, current_param: Tensor, _: Tensor | int) -> Tensor:
        return decay * ema_param + (1 - decay) * current_param

    return ema_update


def get_swa_avg_fn() -> AvgFn:
    """A function of one tensor: ``a + (w - a) / (num_averaged + 1)``."""

    @torch.no_grad()
    def swa_update(
        averaged_param: Tensor, current_param: Tensor, num_averaged: Tensor | int
    ) -> Tensor:
        return averaged_param + (current_param - averaged_param) / (num_averaged + 1)

    return swa_update


@torch.no_grad()
def _move(averages: Tensors, sources: Tensors, share: float) -> None:
    can_average = [a.is_floating_point() or a.is_complex() for a in averages]
    pairs = list(zip(averages, sources, can_average, strict=True))
    if moving := [(a, w) for a, w, can in pairs if can]:
        lerp_([a for a, _ in moving], [w for _, w in moving], share)
    for average, source, can in pairs:
        if not can:
            average.copy_(source)


def _check(decay: float) -> None:
    if not 0 <= number("decay", decay) <= 1:
        raise ArgumentError(f"decay is {decay}; expected a number from 0 to 1.")


def update_bn(
    loader: Iterable[Any], model: Module, device: int | torch.device | str | None = None
) -> None:
    """Set the running statistics of the model's normalisation layers to those of the data.

    A batch is passed to the model as it is, a list or tuple by its first entry, as in torch. The
    statistics are those of `polyak.update_bn`: exact for any split into batches, and frozen layers
    and everything else are left as they were.

    Args:
        loader: the batches.
        model: the model, or an `AveragedModel`.
        device: where to move the batches; the model's device by default.

    """
    batches = loader if device is None else _on(loader, torch.device(device))
    pooled_update_bn(model, batches, forward=_forward)


def _forward(model: Module, batch: Any) -> object:
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _on(loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    return (moved(batch, device) for batch in loader)


class SWALR(_TorchSWALR):
    r"""Anneal each group's learning rate to `swa_lr` over `anneal_epochs` calls of `step()`.

    With :math:`\eta_0` the rate found at the first step and :math:`a(x)` either x or
    :math:`(1 - \cos \pi x) / 2`, the rate after n steps is
    :math:`a(t)\,\eta_{swa} + (1 - a(t))\,\eta_0`, :math:`t = \min(1, n / anneal\_epochs)`.

    torch's class computes :math:`\eta_0` at each step from the current rate; here it is stored, so
    other code that changes the rate in between does not bend the curve. The target is stored in the
    scheduler, not in the optimizer: loading an optimizer's state does not replace it, and groups
    that are added later anneal to it too.

    Args:
        optimizer: the optimizer whose rates are set.
        swa_lr: the final rate, one for all groups or one for each.
        anneal_epochs: the number of steps the annealing takes.
        anneal_strategy: "cos" or "linear".
        last_epoch: as in every torch scheduler.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float | list[float],
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        last_epoch: int = -1,
    ) -> None:
        n_groups = len(optimizer.param_groups)
        targets = swa_lr if isinstance(swa_lr, (list, tuple)) else [swa_lr] * n_groups
        self._targets: list[float | Tensor] = _copies(targets)
        self._starts: list[float | Tensor | None] = []  # None for those that have not begun
        # The groups that both lists are about, by the lists of their parameters, which stay the same
        # ones when the optimizer loads a state.
        self._groups: list[Any] = [group["params"] for group in optimizer.param_groups]
        super().__init__(optimizer, swa_lr, anneal_epochs, anneal_strategy, last_epoch)  # type: ignore[arg-type] # torch takes a list too

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the step that has just begun; `get_last_lr()` returns the current ones."""
        step = self._step_count - 1
        if self.anneal_epochs == 0:
            step = max(1, step)
        self._follow_groups()
        if step <= 1:
            self._starts = [None] * len(
                self._groups
            )  # not begun: the current rate is where it will start
        starts = self._starting_rates(step)
        alpha = self._alpha(step)
        return [
            target * alpha + start * (1 - alpha)
            for target, start in zip(self._targets, starts, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the targets and where each group's annealing started; all copies."""
        state = super().state_dict()
        del state["_groups"]
        return {name: _copies(v) if isinstance(v, list) else v for name, v in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's, which does not store where it started."""
        self._starts = []
        own = {n: _copies(v) if isinstance(v, list) else v for n, v in state_dict.items()}
        super().load_state_dict(own)
        self._groups = [group["params"] for group in self.optimizer.param_groups]
        if "_targets" not in state_dict:
            self._targets = _copies([group["swa_lr"] for group in self.optimizer.param_groups])

    def _alpha(self, step: int) -> float:
        anneal: Any = self.anneal_func
        alpha: float = anneal(max(0, min(1, step / max(1, self.anneal_epochs))))
        return alpha

    def _starting_rates(self, step: int) -> list[float | Tensor]:
        """Where each group's annealing started; computed as in torch if it was not stored."""
        have_begun = any(start is not None for start in self._starts)
        starts: list[float | Tensor] = []
        groups = self.optimizer.param_groups
        for group, target, start in zip(groups, self._targets, self._starts, strict=True):
            if start is None:
                rate = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
                alpha = 0.0 if have_begun else self._alpha(step - 1)  # 0: a group that came later
                start = target if alpha == 1 else (rate - alpha * target) / (1 - alpha)  # noqa: PLW2901
            starts.append(start)
        if step >= 1:
            self._starts = list(starts)
        return starts

    def _follow_groups(self) -> None:
        """Forget groups that were removed, and give those that came later the last target."""
        now = [group["params"] for group in self.optimizer.param_groups]
        known = {id(group): index for index, group in enumerate(self._groups)}
        order = [known.get(id(group)) for group in now]
        if all(index is None for index in order):  # a copy, with an optimizer of its own
            order = [index if index < len(self._targets) else None for index in range(len(now))]
        targets, starts = self._targets, [*self._starts, *[None] * len(known)]
        self._targets = [targets[-1 if i is None or i >= len(targets) else i] for i in order]
        self._starts = [None if i is None else starts[i] for i in order]
        self._groups = now


def _copies(values: Iterable[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in values]
