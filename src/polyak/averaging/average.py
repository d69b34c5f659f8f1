"""`Average`: one running average of a model's weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch.nn import Module

from polyak.averaging import interop, loading
from polyak.averaging.attaching import Attachment
from polyak.averaging.following import Following
from polyak.averaging.health import metrics_of
from polyak.averaging.held import Held, Options
from polyak.averaging.lr_schedule import LRSchedule
from polyak.averaging.outlet import Outlet
from polyak.averaging.plan import Plan, plan_of
from polyak.averaging.state import check_state, load_into, spelled, state_of
from polyak.errors import UsageError
from polyak.maths.profiles import Profile
from polyak.tensors.policies import Policy, patterns


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
        loading.load(self, path, updates=updates)

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
        """Figures to log: see `polyak.averaging.health.metrics_of`."""
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
