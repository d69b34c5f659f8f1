"""Averages that validation scores steer: SWAD, and two-tailed averaging."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from polyak.averaging.average import Average
from polyak.averaging.averages import Averages
from polyak.averaging.hook import Attachment
from polyak.batchnorm.layers import norm_layers
from polyak.errors import ArgumentError, FormatError, NonFiniteError, UsageError
from polyak.maths.overfit_window import OverfitWindow
from polyak.maths.profiles import SWA
from polyak.tensors.fsdp import reshard
from polyak.tensors.modes import evaluation_mode
from polyak.tensors.ranks import ShardRanks

State = dict[str, Any]
_SUMS = ("time", "count", "time_if_none_skipped")


class SWAD:
    """The mean of all weights from where the validation loss stops falling to where it overfits.

    Attach it to the optimizer, and tell it each validation loss of the model's own weights: `average` is then
    an `Average` of the window so far. The weights between two losses are one segment; the window holds the
    segments from the one that ends where the window begins to the one that ends where it ends, each weight counted
    equally. Until it begins, the average is of the newest segment; once it has ended, further weights do not count.

    On a sharded model (FSDP2) every rank calls `score`, and the mean of their losses counts.

    It holds up to `n_end` + 3 copies of the averaged weights (`n_start` + 3 if that is more).

    Args:
        model: As for `Average`.
        n_start: The loss has to be the lowest of so many, itself first, to begin the window.
        n_end: So many losses in a row above the threshold end it, before the first of them.
        tolerance: The threshold, as a factor of the mean of the `n_start` losses.
        options: Those of `Average`: `include`, `exclude`, `dtype`, `device`, ...

    Raises ArgumentError for an option outside its domain. Source: Cha et al. 2021, arXiv 2102.08604; see
    `polyak.study.OverfitWindow`.

    >>> import torch, polyak
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> swad = polyak.SWAD(model, n_start=2, n_end=2)
    >>> for value, loss in enumerate([3, 2, 1, 1.1, 1.2, 1.9, 2.0]):
    ...     _ = torch.nn.init.constant_(model.weight, value)
    ...     swad.update()
    ...     swad.score(loss)
    >>> swad.window, swad.ended
    ((2, 4), True)
    >>> with swad.average.applied():
    ...     model.weight.item()
    3.0

    """

    def __init__(
        self,
        model: Module,
        *,
        n_start: int = 3,
        n_end: int = 6,
        tolerance: float = 1.3,
        **options: Any,
    ) -> None:
        self.rule = OverfitWindow(n_start, n_end, tolerance)
        self._segment = Average(model, SWA(), **options)
        self.average = Average(model, SWA(), **options)
        self.losses: list[float] = []
        self._kept: State | None = None  # the segments that are in the window for sure
        self._newer: list[State] = []  # those that may be, the newest last

    def attach(self, optimizer: Any, **options: Any) -> Attachment:
        """Take the weights after each step of an optimizer; see `Average.attach`."""
        return self._segment.attach(optimizer, **options)

    def detach(self) -> None:
        """Take no more weights."""
        self._segment.detach()

    def update(self, dt: float = 1) -> None:
        """Take the model's current weights; see `Average.update`."""
        self._segment.update(dt)

    @property
    def window(self) -> tuple[int | None, int | None]:
        """The losses, counted from 0, at which the window begins and ends; None where it has not yet."""
        return self.rule.of(self.losses)

    @property
    def ended(self) -> bool:
        """Whether the window has ended: training further does not change the average."""
        return self.window[1] is not None

    def score(self, loss: float) -> None:
        """A validation loss of the model's own weights, which ends a segment.

        Raises UsageError if no weights were taken since the last one, ArgumentError for anything but a number
        or for losses that are not positive where the window begins.
        """
        value = _number_on_all(loss, self.average.model)
        if self.ended:
            self.losses.append(value)
            return
        if self._segment.empty:
            raise UsageError(
                "No weights were taken since the last score. Attach SWAD to the optimizer, or call update() "
                "after each step."
            )
        start, end = self.rule.of([*self.losses, value])
        self.losses.append(value)
        self._newer.append(copy.deepcopy(self._segment.state_dict()))
        self._segment.reset()
        self._settle(start, end)
        self._show(start, end)

    def state_dict(self) -> State:
        """Everything needed to resume, as plain values that `torch.load(weights_only=True)` reads."""
        return {
            "rule": [self.rule.n_start, self.rule.n_end, self.rule.tolerance],
            "losses": list(self.losses),
            "segment": self._segment.state_dict(),
            "average": self.average.state_dict(),
            "kept": self._kept,
            "newer": list(self._newer),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises FormatError if it is not one, MismatchError if it belongs to another model, ArgumentError if its
        window has another rule.
        """
        _check_keys(state_dict, ("rule", "losses", "segment", "average", "kept", "newer"), "SWAD")
        rule = OverfitWindow(*state_dict["rule"])
        if rule != self.rule:
            raise ArgumentError(f"The state is of {rule}, and this is {self.rule}. Make it alike.")
        _load_both((self._segment, state_dict["segment"]), (self.average, state_dict["average"]))
        self.losses = list(state_dict["losses"])
        self._kept = copy.deepcopy(state_dict["kept"])
        self._newer = copy.deepcopy(list(state_dict["newer"]))

    def _settle(self, start: int | None, end: int | None) -> None:
        """Put together the segments that no later loss can take out, and drop those that are out."""
        first = len(self.losses) - len(
            self._newer
        )  # the number of the oldest of the newer segments
        if start is None:
            del self._newer[: -self.rule.n_start]
            return
        if self._kept is None:
            del self._newer[: start - first]
            first = start
        last = end if end is not None else max(start, len(self.losses) - self.rule.n_end)
        sure = [self._newer.pop(0) for _ in range(first, last + 1)]
        self._kept = (
            _together([*([self._kept] if self._kept else []), *sure]) if sure else self._kept
        )
        if end is not None:
            self._newer.clear()
            self.detach()

    def _show(self, start: int | None, end: int | None) -> None:
        if start is None:
            parts = self._newer[-1:]
        else:
            parts = [*([self._kept] if self._kept else []), *self._newer]
        self.average.load_state_dict(_together(parts))


class TwoTailed:
    """Two-tailed averaging: two means of the newest weights, of which scores choose where they begin.

    A short one and a long one. Whenever the short one is at least as good on validation data, it becomes the long
    one, and a new short one begins. `average`, the long one, is the answer at any moment: no start has to be chosen.
    On a sharded model (FSDP2) every rank calls `score`, and the mean of their scores counts.

    Args:
        model: As for `Average`.
        minimize: Whether lower scores are better.
        options: Those of `Average`: `include`, `exclude`, `dtype`, `device`, ...

    Source: Melis 2022, arXiv 2209.12581, algorithm 1.

    >>> import torch, polyak
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> tails = polyak.TwoTailed(model)
    >>> for value in (9.0, 5.0, 1.0, -1.0, 1.0):
    ...     _ = torch.nn.init.constant_(model.weight, value)
    ...     tails.update()
    ...     _ = tails.score(lambda model: model.weight.abs())
    >>> with tails.average.applied():  # of the last two
    ...     model.weight.item()
    0.0

    """

    def __init__(self, model: Module, *, minimize: bool = True, **options: Any) -> None:
        self.minimize = minimize
        self._pair = Averages(model, {"a": SWA(), "b": SWA()}, **options)
        self._long, self._short = "a", "b"

    @property
    def average(self) -> Average:
        """The long average; until the first score, of all weights."""
        return self._pair[self._long]

    @property
    def short(self) -> Average:
        """The short one; empty right after it became the long one."""
        return self._pair[self._short]

    def attach(self, optimizer: Any, **options: Any) -> Attachment:
        """Take the weights after each step of an optimizer; see `Average.attach`."""
        return self._pair.attach(optimizer, **options)

    def detach(self) -> None:
        """Take no more weights."""
        self._pair.detach()

    def update(self, dt: float = 1) -> None:
        """Take the model's current weights; see `Average.update`."""
        self._pair.update(dt)

    def score(self, evaluate: Callable[[Module], Any], data: Iterable[Any] | None = None) -> bool:
        """Evaluate both averages on the model, and let the short one take over if it is as good.

        Args:
            evaluate: `evaluate(model)`, in evaluation mode; a number, or a tensor of them, of which the mean counts.
            data: Training batches, to refresh the BatchNorm statistics of both before.

        Returns whether it took over. Raises UsageError if no weights were taken since it last did, NonFiniteError
        if the long one's score is NaN while the short one's is too.

        """
        if self.short.empty:
            raise UsageError(
                "No weights were taken since the short average began. Attach it to the optimizer, or call "
                "update() after each step."
            )
        short, long = (self._evaluated(one, evaluate, data) for one in (self.short, self.average))
        return self.choose(short, long)

    def choose(self, short: float, long: float) -> bool:
        """As `score`, from the scores of `short` and `average` that you have evaluated yourself."""
        short, long = (_number_on_all(score, self.average.model) for score in (short, long))
        if math.isnan(short) and math.isnan(long):
            raise NonFiniteError(
                "Both averages have a score that is NaN. Check the data and the learning rate."
            )
        as_good = short <= long if self.minimize else short >= long
        if as_good or math.isnan(long):
            self._long, self._short = self._short, self._long
            self.short.reset()
            return True
        return False

    def state_dict(self) -> State:
        """Everything needed to resume bitwise, as plain values that `torch.load(weights_only=True)` reads."""
        return {
            "long": self.average.state_dict(),
            "short": self.short.state_dict(),
            "minimize": self.minimize,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises FormatError if it is not one, MismatchError if it belongs to another model, ArgumentError if its
        scores have the other direction.
        """
        _check_keys(state_dict, ("long", "short", "minimize"), "two-tailed averaging")
        if bool(state_dict["minimize"]) != self.minimize:
            raise ArgumentError(
                f"The state has minimize={state_dict['minimize']}, and this has minimize={self.minimize}. Make it "
                "alike."
            )
        _load_both((self.average, state_dict["long"]), (self.short, state_dict["short"]))

    def _evaluated(
        self, average: Average, evaluate: Callable[[Module], Any], data: Iterable[Any] | None
    ) -> float:
        if data is not None and norm_layers(average.model):
            average.update_bn(data)
        with average.applied() as model, evaluation_mode(model), torch.no_grad():
            return _number(evaluate(model))


def _together(states: Sequence[State]) -> State:
    """The state of the mean of all weights that these are means of."""
    states = [_closed(one) for one in states]
    newest, total = states[-1], sum(one["time"] for one in states)
    shares = [one["time"] / total for one in states]
    joined = {**newest, "unit": None, "pending": [0, 0.0, ()]}
    joined |= {name: sum(one[name] for one in states) for name in _SUMS}
    joined["sum_squared_shares"] = sum(
        share**2 * one["sum_squared_shares"] for share, one in zip(shares, states, strict=True)
    )
    joined["tensors"] = {
        name: _mean([one["tensors"][name] for one in states], shares) for name in newest["tensors"]
    }
    return joined


def _closed(state: State) -> State:
    r"""The same without its open block: of equal shares the mean is $(A + S) T / t$ (see `RunningAverage`)."""

    def folded(name: str, tensor: Tensor) -> Tensor:
        for block in state["block"]:
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            total = tensor.to(wide) + block["tensors"][name].to(wide)
            tensor = (total * (block["start"] / state["time"])).to(tensor.dtype)
        return tensor

    tensors = {name: folded(name, tensor) for name, tensor in state["tensors"].items()}
    return {**state, "block": (), "tensors": tensors}


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """In float64, rounded once."""
    wide = torch.complex128 if tensors[0].is_complex() else torch.float64
    total = sum(share * tensor.to(wide) for share, tensor in zip(shares, tensors, strict=True))
    return torch.as_tensor(total).to(tensors[0].dtype)


def _number(score: Any) -> float:
    try:
        return float(torch.as_tensor(score, dtype=torch.float64).detach().mean())
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(
            f"The score is a {type(score).__name__}; expected a number, or a tensor of one for each example."
        ) from None


def _number_on_all(score: Any, model: Module) -> float:
    """Of the ranks of a sharded model the mean: each decides alike, or shards would be of different averages."""
    reshard(model)  # a forward pass, as in validation, leaves the root's parameters gathered
    return ShardRanks(model.parameters()).mean(_number(score))


def _check_keys(state: Any, keys: Sequence[str], what: str) -> None:
    if not isinstance(state, Mapping) or set(keys) - set(state):
        raise FormatError(f"This is not a state of {what}. Pass what state_dict() returned.")


def _load_both(*pairs: tuple[Average, Mapping[str, Any]]) -> None:
    """Both, or none of them."""
    before = [copy.deepcopy(average.state_dict()) for average, _ in pairs]
    try:
        for average, state in pairs:
            average.load_state_dict(state)
    except BaseException:
        for (average, _), state in zip(pairs, before, strict=True):
            average.load_state_dict(state)
        raise
