"""What comes out of an average: lent to its model, copied, measured, written.

`Average`: one running average of a model's weights.

`Averages`: several averages of the same weights, for the price of about one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from polyak.averaging import interop, values
from polyak.averaging.diagnostics import Plan, metrics_of, plan_of
from polyak.averaging.hook import Attachment
from polyak.averaging.lr_schedule import LRSchedule
from polyak.averaging.saving import save
from polyak.averaging.state import check_state, load_into, spelled, state_of
from polyak.averaging.tracker import Following, Held, Options
from polyak.batchnorm import unsupported_norm_layers, update_bn
from polyak.errors import ArgumentError, MismatchError, UsageError
from polyak.maths.profiles import Profile
from polyak.tensors.policy import Policy, patterns


class Outlet:
    """The half of `Average` that reads; nothing in it changes what has been averaged."""

    _following: Following
    _held: Held

    @property
    def model(self) -> Module:
        """The model that is followed."""
        return self._following.roster.model

    @contextmanager
    def applied(self, *, check: bool = False, in_place: bool = False) -> Iterator[Module]:
        """Let the model hold the average within the block, and its own weights again after it.

        Memory is lent, not copied: a microsecond or two per tensor. Copies are made only where the
        accumulators cannot serve as they are (another dtype or device, an open block, a window):
        as much as the live weights, in their dtype. `in_place=True` exchanges contents instead, so
        that every tensor stays where it is (CUDA graphs). A `state_dict()` of the model taken inside
        refers to the average's own memory.

        While nothing has been averaged the model stays as it is, with one EmptyAverage warning.
        Optimizer steps and updates inside raise UsageError, and so does applying another average of
        the same weights; the same one may be nested. With `check=True` a NaN or an infinity in the
        average raises NonFiniteError before anything is lent.
        """
        following, held = self._following, self._held
        if held.is_lent or self._is_empty("the model keeps its own weights"):
            yield self.model
            return
        following.refuse_during_loan("applied()")
        following.ready_to_read()
        if check:
            values.refuse_nonfinite_average(following, held, "applied()")
        with values.loan(following, held, owner=self, in_place=in_place):
            yield self.model

    def copy_to(self, model: Module) -> None:
        """Copy the average and its statistics into a model, this one or another of its kind, for good.

        Raises MismatchError, naming every tensor that does not fit, and NonFiniteError; nothing is
        copied then.
        """
        if self._is_empty("nothing was copied"):
            return
        self._following.refuse_during_loan("copy_to()")
        self._following.ready_to_read()
        values.refuse_nonfinite_average(self._following, self._held, "copy_to()")
        values.copy_into(model, values.copies(self._following, self._held))

    def update_bn(self, batches: Iterable[Any], **options: Any) -> None:
        """Set the average's BatchNorm statistics to those of the data under the averaged weights.

        They stay with the average, for `applied`, `save` and `copy_to`, until its next update. Takes
        the options of `polyak.update_bn`. The model's own statistics are not touched.
        """
        if self._is_empty("there are no statistics to measure"):
            return
        if (layers := self._following.layers_to_refresh()) is not None:
            options.setdefault("layers", layers)
        with self.applied():
            update_bn(self.model, batches, **options)
        self._held.statistics_are_fresh = not unsupported_norm_layers(self.model)

    def averaged_tensors(self) -> dict[str, Tensor]:
        """The state dict of the averaged model, as copies in the dtypes of the weights.

        Names are without the prefixes that wrappers add; tied weights appear under all their names.
        """
        self._following.ready_to_read()
        if self._held.is_empty():
            raise UsageError("There are no averaged tensors: nothing has been averaged yet.")
        return values.copies(self._following, self._held)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the averaged model as safetensors, with what it is made of in the metadata.

        Warns (StaleStatistics) and records it where BatchNorm statistics are not the average's own.
        Raises OutputError if `path` exists and `overwrite` is False, or cannot be written;
        NonFiniteError, naming the tensors; UsageError while nothing has been averaged.
        """
        save(self._following, self._held, path, overwrite=overwrite)

    def _is_empty(self, consequence: str) -> bool:
        if not self._held.is_empty():
            return False
        if not self._held.said_empty:
            self._held.said_empty = True
            values.warn_empty(self, consequence)
        return True


class Average(Outlet):
    r"""A running average of a model's weights, beside the model, while it trains.

    With $w_n$ the weights of the n-th update and $share_n$ what the profile gives them,

    $$\bar w_n = \bar w_{n-1} + share_n \, (w_n - \bar w_{n-1}), \qquad share_1 = 1.$$

    Time counts from the start of averaging, in `unit`; the first weights enter at time `dt` (at 0
    for a profile that keeps its first weights). Accumulators are float32 at least, whatever the
    dtype of the weights, and results come back in the dtype of the weights. What happens to each
    tensor, and why, is what `print(average.plan())` says.

    Args:
        model: the model that trains. It is never copied; tensors go by their names.
        profile: how much each moment counts: `SWA()`, `EMA.from_half_life(500)`, `Window(2000)`, ...
        unit: what time is counted in. `attach` sets "steps" or "captures"; say "samples", "tokens"
            or "epochs" for updates of your own. A profile with a length of time that is attached to
            captures needs `unit="captures"`.
        include: name patterns of the only parameters to average, frozen or not: `"*lora_*"`.
        exclude: name patterns of tensors to leave out.
        dtype: torch.float64 for more exact accumulators.
        device: where to keep the average; "cpu" beside a GPU costs no memory there.
        nonfinite: "skip" leaves out weights with NaN or infinity, "raise" refuses them; either
            reads every weight once more at each update.
        average_buffers: name patterns of floating buffers to average like weights.

    Raises:
        ArgumentError: a profile that cannot be followed (`Annealed`), options out of their domain.
            Patterns that fit no tensor are refused at the first update, when the model is bound.

    Source: Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407.

    >>> import torch, polyak
    >>> model = torch.nn.Linear(2, 1)
    >>> average = polyak.Average(model, polyak.SWA())
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = torch.nn.init.constant_(model.weight, value)
    ...     average.update()
    >>> with average.applied():
    ...     model.weight.tolist()
    [[3.0, 3.0]]
    >>> model.weight.tolist()
    [[6.0, 6.0]]

    """

    def __init__(  # noqa: PLR0913 - each one fact about the average, keyword-only
        self,
        model: Module,
        profile: Profile,
        *,
        unit: str | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        nonfinite: Literal["skip", "raise"] | None = None,
        average_buffers: str | Iterable[str] | None = None,
    ) -> None:
        policy = Policy(patterns(include), patterns(exclude) or (), patterns(average_buffers) or ())
        options = Options(dtype, None if device is None else torch.device(device), nonfinite)
        self._following = Following(model, policy, options, unit=unit)
        self._held: Held = self._following.join(profile)

    @classmethod
    def _of(cls, following: Following, profile: Profile) -> Average:
        """One of several averages that follow the same weights."""
        average = cls.__new__(cls)
        average._following = following
        average._held = following.join(profile)
        return average

    @property
    def profile(self) -> Profile:
        """How much each moment counts."""
        return self._held.profile

    @property
    def unit(self) -> str | None:
        """What time is counted in; None until it is said or `attach` sets it."""
        return self._following.unit

    @property
    def time(self) -> float:
        """Time since the start of averaging, in `unit`."""
        return float(self._held.clock.time)

    @property
    def count(self) -> int:
        """How many weights have been averaged."""
        return int(self._held.clock.count)

    def update(self, dt: float = 1) -> None:
        """Let the present weights enter; `dt` is the time since the last update.

        Raises MismatchError, naming every tensor, if the model is not the one that was bound at the
        first update; NonFiniteError with `nonfinite="raise"`; UsageError inside `applied()`, and
        for one of several averages (`Averages.update` updates them all). A refused update changes
        nothing.
        """
        self._refuse_if_one_of_several("update()")
        update(self._following, dt)

    def attach(
        self, optimizer: Any, *, every: int | None = None, at: LRSchedule | None = None
    ) -> Attachment:
        """Update by itself: after every k-th real step of an optimizer, or at a schedule's points.

        `every=k` counts steps that really happened (a step that a `GradScaler` skips does not
        count) and each update moves the time by k. `at=lr` takes the weights whenever `lr.step()`
        completes a step after which that schedule averages, once per optimizer step or once per
        epoch alike; the unit is then "captures", each counted as 1.

        Gives an object with `remove()`. Raises ArgumentError for an optimizer that steps none of
        this model's parameters, or a unit that does not fit; UsageError if attached already.
        """
        self._refuse_if_one_of_several("attach()")
        return Attachment(self._following, optimizer, every=every, at=at)

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from, bitwise, as plain values that `torch.load(weights_only=True)` reads.

        As in torch's state dicts, the tensors are the average's own: save them, or deep-copy them,
        before the next update.
        """
        return state_of(self._following, self._held)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises FormatError or MismatchError, and changes nothing, if it is another's."""
        self._following.refuse_during_loan("load_state_dict()")
        check_state(self._following, self._held, state)
        load_into(self._following, self._held, state)

    def load(self, path: str | os.PathLike[str], *, updates: int | None = None) -> None:
        """Go on from a file: a saved `state_dict()`, bitwise, or the average of another library.

        `torch.save(average.state_dict(), path)` writes the first. All else is read as by
        `import_state`, with its `updates`: `torch.save` files of the states it knows, and safetensors,
        those that `save` writes included (they hold the rounded result, so that needs `updates=`).

        Raises ArgumentError if there is no such file, FormatError if it cannot be read without
        running code from it, and what `load_state_dict` and `import_state` raise; the average stays
        as it was.
        """
        interop.load(self, path, updates=updates)

    def import_state(self, state: Mapping[str, Any], *, updates: int | None = None) -> None:
        """Go on from another library's average: see `polyak.averaging.interop.import_state`."""
        interop.import_state(self, state, updates=updates)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        layout: Literal["plain", "averaged_model"] = "plain",
        overwrite: bool = False,
    ) -> None:
        """Write the average for other libraries: see `polyak.averaging.interop.export`."""
        interop.export(self, path, layout=layout, overwrite=overwrite)

    def keep_time_on_device(self) -> None:
        """Keep the time on the weights' device, so that updates can be captured in a CUDA graph.

        Call it after the first update and before the capture. From then on nothing is gathered in
        blocks: shares below 1e-3 lose digits, as they would in any float32 average.
        """
        self._following.keep_time_on_device()

    def plan(self) -> Plan:
        """What happens to each tensor, and why; print it."""
        return plan_of(self._following, self._held)

    def metrics(self) -> dict[str, float]:
        """Figures to log: see `polyak.averaging.diagnostics.metrics_of`."""
        return metrics_of(self._following, self._held)

    def __repr__(self) -> str:
        unit = self.unit or "updates"
        return (
            f"Average({type(self.model).__name__}, {spelled(self.profile)}, "
            f"time={self.time:g} {unit}, count={self.count})"
        )

    def _refuse_if_one_of_several(self, what: str) -> None:
        if len(self._following.members) > 1:
            raise UsageError(
                f"{what} of one of several averages: call it on the Averages they are in."
            )


def update(following: Following, dt: float) -> None:
    """An update by hand: no hook will order the next optimizer step after what is still being read."""
    following.update(float(dt))
    if following.attachment is None:
        following.wait_before_step()


class Averages(Mapping[str, Average]):
    """Several averages that are updated in one pass over the weights, each an `Average` by name.

    Each piece of the weights is read once and enters every average while it is in the cache, so K
    of them cost about (2K + 1) / 3 of one. The options are those of `Average`, for all of them.

    Raises ArgumentError where there is no profile, or one that cannot be followed.

    >>> import torch, polyak
    >>> model = torch.nn.Linear(2, 1)
    >>> averages = polyak.Averages(model, {"swa": polyak.SWA(), "ema": polyak.EMA(decay=0.9)})
    >>> averages.update()
    >>> with averages["ema"].applied():
    ...     _ = model(torch.zeros(1, 2))
    """

    def __init__(  # noqa: PLR0913 - as Average
        self,
        model: Module,
        profiles: Mapping[str, Profile],
        *,
        unit: str | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        nonfinite: Literal["skip", "raise"] | None = None,
        average_buffers: str | Iterable[str] | None = None,
    ) -> None:
        if not profiles:
            raise ArgumentError("Averages needs at least one profile, as {'swa': polyak.SWA()}.")
        policy = Policy(patterns(include), patterns(exclude) or (), patterns(average_buffers) or ())
        options = Options(dtype, None if device is None else torch.device(device), nonfinite)
        self._following = Following(model, policy, options, unit=unit)
        self._averages = {n: Average._of(self._following, p) for n, p in profiles.items()}

    def __getitem__(self, name: str) -> Average:
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    def update(self, dt: float = 1) -> None:
        """Let the present weights enter every average; see `Average.update`."""
        update(self._following, dt)

    def attach(
        self, optimizer: Any, *, every: int | None = None, at: LRSchedule | None = None
    ) -> Attachment:
        """Update all by themselves; see `Average.attach`."""
        return Attachment(self._following, optimizer, every=every, at=at)

    def state_dict(self) -> dict[str, Any]:
        """The state of each average, by name."""
        return {name: state_of(self._following, a._held) for name, a in self._averages.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on from a state; all are checked before the first is changed."""
        self._following.refuse_during_loan("load_state_dict()")
        if states.keys() != self._averages.keys():
            raise MismatchError.of(
                "This is the state of other averages.",
                missing=self._averages.keys() - states.keys(),
                unexpected=states.keys() - self._averages.keys(),
                advice="Nothing was loaded.",
            )
        for name, average in self._averages.items():
            check_state(self._following, average._held, states[name])
        for name, average in self._averages.items():
            load_into(self._following, average._held, states[name])

    def __repr__(self) -> str:
        return f"Averages({', '.join(f'{n}: {a!r}' for n, a in self._averages.items())})"
