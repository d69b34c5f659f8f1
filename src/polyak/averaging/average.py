"""`Average`: one running average of a model's weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.lr_scheduler import LRScheduler

from polyak.averaging import diagnostics, interop, saving, state, values
from polyak.averaging.followers import Follower, WriteBack
from polyak.averaging.hook import Attachment, Members
from polyak.averaging.tracker import Member, Tracker
from polyak.batchnorm.batches import Forward
from polyak.batchnorm.update import update_bn, warn_unsupported
from polyak.errors import EmptyAverage, StaleStatistics, UsageError, warn
from polyak.maths.profile import Profile
from polyak.maths.text import profile_text


class Average:
    r"""A running average of a model's weights, beside the model, while it trains.

    With $w_n$ the weights of the n-th update and $share_n$ what the profile gives them,

    $$\bar w_n = \bar w_{n-1} + share_n \, (w_n - \bar w_{n-1}), \qquad share_1 = 1.$$

    Time counts from the start of averaging, in `unit`; the first weights enter at time `dt` (at 0
    for a profile that keeps its first weights). Accumulators are float32 at least, whatever the
    dtype of the weights, and results come back in the dtype of the weights. `print(average.plan())`
    shows what happens to each tensor, and why.

    Args:
        model: the model that trains. It is never copied; tensors are matched by name.
        profile: how much each moment counts: `SWA()`, `EMA.from_half_life(500)`, `Window(2000)`, or
            as text: `"ema:half_life=500"`.
        unit: what time is counted in. `attach` sets "steps" or "captures"; pass "samples", "tokens"
            or "epochs" if you call `update` yourself. A profile with a length of time that is
            attached to captures needs `unit="captures"`.
        include: name patterns of the only parameters to average, frozen or not: `"*lora_*"`.
        exclude: name patterns of tensors to leave out.
        dtype: torch.float64 for more exact accumulators.
        device: where to keep the average; "cpu" beside a GPU works in the background where it is attached.
        nonfinite: "skip" leaves out weights with NaN or infinity, "raise" refuses them; either
            reads every weight once more at each update.
        average_buffers: name patterns of floating buffers to average like weights.
        capturable: keep the time on the weights' device, so that updates can be captured in a CUDA
            graph after the first one, as in torch's optimizers. Blocks are disabled; shares below
            1e-3 then have plain float32 precision.

    Raises:
        ArgumentError: a profile that cannot be averaged during training (`Annealed`), options out of
            their domain. Patterns that match no tensor are refused at the first update, which binds
            the model.

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
        profile: Profile | str,
        *,
        unit: str | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        nonfinite: Literal["skip", "raise"] | None = None,
        average_buffers: str | Iterable[str] | None = None,
        capturable: bool = False,
    ) -> None:
        tracker = Tracker(
            model,
            unit=unit,
            include=include,
            exclude=exclude,
            dtype=dtype,
            device=device,
            nonfinite=nonfinite,
            average_buffers=average_buffers,
            capturable=capturable,
        )
        self._member = tracker.join(profile)
        self._tracker = tracker
        self._name: str | None = None  # of a member of Averages

    @classmethod
    def _of(cls, member: Member, name: str) -> Average:
        """One member of Averages."""
        average = cls.__new__(cls)
        average._member, average._tracker, average._name = member, member.tracker, name
        return average

    @property
    def model(self) -> Module:
        """The model whose weights are averaged."""
        return self._tracker.tensors.model

    @property
    def profile(self) -> Profile:
        """How much each moment counts."""
        return self._member.profile

    @property
    def unit(self) -> str | None:
        """What time is counted in; None until it is given or set by `attach`."""
        return self._member.unit

    @property
    def time(self) -> float:
        """Time since the start of averaging, in `unit`."""
        self._tracker.take_due()
        return float(self._member.clock.time)

    @property
    def count(self) -> int:
        """How many weights have been averaged."""
        self._tracker.take_due()
        return int(self._member.clock.count)

    @property
    def empty(self) -> bool:
        """Whether nothing has been averaged yet."""
        self._tracker.take_due()
        return self._member.is_empty()

    @property
    def lent(self) -> bool:
        """Whether the model holds an average now, this one or another of its weights: `applied()`."""
        return self._tracker.owner_of_loan() is not None

    def update(self, dt: float = 1, *, real: bool | Tensor = True) -> None:
        """Update the average with the model's current weights.

        Args:
            dt: the time since the last update, in `unit`.
            real: False for an optimizer step that was skipped, which then changes nothing; a tensor
                with one value, 0 for a skipped step and 1 for a real one, where only the device
                knows: nothing waits for it.

        Raises:
            MismatchError: the model has changed since the first update; every tensor is named.
            NonFiniteError: a NaN or an infinity in the weights, with `nonfinite="raise"`.
            UsageError: inside `applied()`; a member of `Averages`, whose `update` updates them all.

        """
        if self._name is not None:
            raise UsageError(
                "update() is not available on a member of Averages; call it on the Averages."
            )
        self._tracker.take_due()
        self._tracker.update(dt, real)

    def attach(
        self,
        optimizer: Any,
        *,
        every: int | None = None,
        at: LRScheduler | None = None,
        before_next_step: bool = False,
        by_hand: bool = False,
    ) -> Attachment:
        """Update automatically: after every k-th real step of an optimizer, or at a schedule's points.

        Args:
            optimizer: the optimizer that your loop calls `step()` on, wrapped as it is: weights are
                taken when the outermost `step()` is over, if one of the optimizers inside has
                stepped. Or a list of several: then a step is complete whenever each of them has
                stepped at least once since the last one, so that five critic steps and one generator
                step make one.
            every: k; counts steps that really happened (a step that a `GradScaler` skips does not
                count), and each update moves the time by k. 1 by default.
            at: a schedule, or a SequentialLR or other scheduler that holds one. Weights are taken
                whenever `at.step()` completes a step after which it averages, be that once per
                optimizer step or once per epoch; the unit is then "captures", each counted as 1. An
                empty average also takes the weights it is attached at if the schedule averages
                there.
            before_next_step: for loops that change the weights after `optimizer.step()`, by clipping or
                normalising them: take them as late as possible, when the next step begins or the
                average is read, whichever comes first.
            by_hand: never update; you call `update()`, say once an epoch. Unfrozen parameters are still
                averaged from before their first step, and steps inside `applied()` refused.

        Warns (PolyakWarning) if parameters that train and are averaged are not among those of the
        optimizer, or if it has steps besides `step()` that no hook can see.

        Returns an `Attachment`, with `remove()`. On a member of `Averages` this sets that member's own
        timing; the `attach` of the Averages then updates the others.

        Raises:
            ArgumentError: an optimizer that steps none of this model's parameters, a unit that does
                not fit, a schedule that never averages, a sharded model.
            UsageError: attached already.

        """
        return Attachment(
            Members(self._tracker, self._member),
            optimizer,
            every=every,
            at=at,
            before_next_step=before_next_step,
            by_hand=by_hand,
        )

    def detach(self) -> None:
        """Remove the attachment that updates this average; nothing if there is none."""
        if self._member.attachment is not None:
            self._member.attachment.remove()

    def lend(self, *, check: bool = False, in_place: bool = False) -> values.Loan:
        """Swap the average into the model until `give_back()` of the loan that is returned.

        For hooks that begin and end in different places; everywhere else use `applied`, which takes
        the same arguments and has the same rules.
        """
        if self._member.is_applied or self._is_empty("the model keeps its own weights"):
            return values.Loan()
        return self._swap_in("applied()", self._warn_stale, check=check, in_place=in_place)

    @contextmanager
    def applied(self, *, check: bool = False, in_place: bool = False) -> Iterator[Module]:
        """Swap the average into the model for the block, then restore the model's own weights.

        Of a sharded model contents are exchanged, shard by shard, through a few megabytes. Else
        memory is shared, not copied: about ten microseconds per tensor. Averages of bfloat16 weights
        change places with them in 4 MB, rounded with ties away from zero, as `save` and `copy_to` do.
        Copies are made only where this cannot be (another dtype or device, an open block, a window, a
        NaN): as much as the live weights. `in_place=True` exchanges contents instead, so that every
        tensor stays where it is (CUDA graphs, other processes; a model in shared memory gets it by
        itself): what is written to a weight then stays in the average.

        The block acts on the average as on a copy: what layers do to their weights in `eval()`, `train()`
        or a forward pass is undone, and modes stay as the block left them. Statistics that
        `polyak.update_bn` measures inside are kept with the average; if they are still those of the
        newest weights, one StaleStatistics warning says so at the end.

        While nothing has been averaged the model stays as it is, with one EmptyAverage warning.
        Optimizer steps and updates inside raise UsageError, and so does applying another average of
        the same weights; the same one may be nested. With `check=True` a NaN or an infinity in the
        average raises NonFiniteError before anything is swapped.
        """
        with self.lend(check=check, in_place=in_place):
            yield self.model

    def copy_to(self, model: Module) -> None:
        """Copy the average and its statistics into a model, this one or another of its kind, for good.

        Raises MismatchError, naming every tensor that does not fit, and NonFiniteError; nothing is
        copied then.
        """
        if self._is_empty("nothing was copied"):
            return
        self._tracker.refuse_during_loan("copy_to()")
        self._tracker.ready_to_read()
        values.refuse_nonfinite_average(self._member, "copy_to()")
        values.copy_into(model, self._member)

    def follower(
        self,
        module: Module,
        *,
        part: str | None = None,
        buffers: bool = False,
        freeze: bool = False,
        evaluation: bool = False,
    ) -> Follower:
        """Keep another module equal to the average after each update: a teacher, a target, an anchor.

        See `polyak.averaging.Follower`, which it returns, for the arguments and what it raises.
        """
        return Follower(
            self._member, module, part=part, buffers=buffers, freeze=freeze, evaluation=evaluation
        )

    def write_back(self, *, every: float) -> WriteBack:
        """Put the average into the model after every `every` units of time, and train on from there.

        See `polyak.averaging.WriteBack`, which it returns, for what happens and what it raises.
        """
        return WriteBack(self._member, every)

    def update_bn(
        self,
        batches: Iterable[Any],
        *,
        forward: Forward | None = None,
        limit: int | None = None,
        passes: int = 1,
        progress: bool = False,
        layers: Iterable[str | Module] | None = None,
    ) -> None:
        """Set the average's BatchNorm statistics to those of the data under the averaged weights.

        They stay with the average, for `applied`, `save` and `copy_to`, until its next update. The
        arguments are those of `polyak.update_bn`. The model's own statistics are not touched.
        """
        if self._is_empty("there are no statistics to measure"):
            return
        with self._swap_in("update_bn()"):
            if layers is None:
                warn_unsupported(self.model)
                layers = self._tracker.layers_to_refresh()
            update_bn(
                self.model,
                batches,
                forward=forward,
                limit=limit,
                passes=passes,
                progress=progress,
                layers=layers,
            )

    def averaged_tensors(self) -> dict[str, Tensor]:
        """The state dict of the averaged model, as copies in the dtypes of the weights, rounded as lent.

        Names are without the prefixes that wrappers add; tied weights appear under all their names.
        """
        self._tracker.ready_to_read()
        if self.empty:
            raise UsageError(
                f"There are no averaged tensors: nothing has been averaged yet.{self._unused()}"
            )
        return values.copied_values(self._member)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        layout: Literal["model", "averaged_model"] = "model",
        overwrite: bool = False,
        shards: bool = False,
        carry: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write the averaged model to a file, with what it is made of; `load` reads it.

        The suffix of `path` decides the format: `.safetensors`, or torch's (`.pt`, `.pth`, `.bin`,
        `.ckpt`), a bare state dict that `model.load_state_dict(torch.load(path))` takes. Profile,
        time and count are stored in the metadata of the one, and in the `_metadata` of the other.
        `layout="averaged_model"` (torch's suffixes only) writes the state of a
        `torch.optim.swa_utils.AveragedModel` around the model. `shards=True` writes a folder of
        `model-0000x-of-0000y.safetensors` with an index instead; `carry` is then a folder from which
        what `from_pretrained` needs beside weights is copied (configuration, tokenizer, code).

        Of a sharded model every rank must call this, and writes what it holds into the one file
        (`.safetensors`), which all ranks must see.

        Warns (StaleStatistics) and records it where BatchNorm statistics are not the average's own.
        Raises OutputError if `path` exists and `overwrite` is False, or cannot be written;
        NonFiniteError, naming the tensors; UsageError while nothing has been averaged; ArgumentError
        for another suffix or a layout that the format has no room for.
        """
        saving.save(
            self._member, path, layout=layout, overwrite=overwrite, shards=shards, carry=carry
        )

    def load(self, path: str | os.PathLike[str], *, updates: int | None = None) -> None:
        """Continue from a file: what `save` wrote, a saved `state_dict()`, or another library's average.

        What `save` wrote holds the values in the dtype of the weights. Where that is narrower than
        the accumulators a PolyakWarning says so: `torch.save(average.state_dict(), path)` writes a
        file from which averaging continues bitwise. Anything else is read as by `import_state`, with
        its `updates`; with `updates` given, a file that `save` wrote is as well.

        Raises ArgumentError if there is no such file, or for a window, whose snapshots only a
        `state_dict()` holds; FormatError if it cannot be read without running code from it;
        MismatchError and whatever `load_state_dict` and `import_state` raise. The average stays as it
        was then.
        """
        self._tracker.refuse_during_loan("load()")
        with self._tracker.tensors.bound_temporarily():
            self.load_state_dict(interop.read_state(self._member, path, updates))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume bitwise, as plain values that `torch.load(weights_only=True)` reads.

        As in torch's state dicts, the tensors are the average's own: save them, or deep-copy them,
        before the next update (inside `applied()`, those of bfloat16 weights are copies). Of a sharded model they are DTensors, for torch.distributed.checkpoint,
        and `polyak.sharded.load` reads what it has saved.
        """
        return state.state_dict(self._member)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises FormatError if it is not one, MismatchError if it belongs to a different average; nothing
        is changed then.
        """
        self._tracker.refuse_during_loan("load_state_dict()")
        state.check_state(self._member, state_dict)
        state.load_state(self._member, state_dict)

    def reset(self) -> None:
        """Forget everything that was averaged: the next update is the first. Attachments stay."""
        self._tracker.refuse_during_loan("reset()")
        state.reset(self._member)

    def import_state(self, state_dict: Mapping[str, Any], *, updates: int | None = None) -> None:
        """Continue from the average that another library has taken of the same model.

        The states of torch's `AveragedModel`, timm's `ModelEma`, ema-pytorch's `EMA`, diffusers'
        `EMAModel` and torch-ema are recognised, checkpoints of Lightning's `WeightAveraging`, and plain
        state dicts of the averaged model. The average keeps its own profile: only the weights and
        the number of updates come over.

        Args:
            state_dict: the other library's state dict, or a plain one.
            updates: how many updates, one unit of time apart, the state stands for: needed where it
                does not count them (timm's), and otherwise used instead of what it says.

        Raises:
            FormatError: not a state of any kind that is known.
            MismatchError: tensors that are missing or of another shape, all by name.
            ArgumentError: no number of updates; a window, which needs its single snapshots.
            NonFiniteError: a NaN or an infinity in the state.

        """
        with self._tracker.tensors.bound_temporarily():
            self.load_state_dict(interop.translated_state(self._member, state_dict, updates))

    def plan(self) -> diagnostics.TensorPlan:
        """What happens to each tensor, and why; print it."""
        return diagnostics.plan(self._member)

    def metrics(self) -> dict[str, float]:
        """Figures to log: distance to the weights, effective samples, age, next share, skipped updates.

        It reads every weight: call it now and then, in `applied()` as well. The figures of a sharded model are
        those of the whole, on every rank, and every rank must call this. Before the first update all but
        `skipped` are NaN.

        - `distance`: L2 norm of average minus live weights, over all that is averaged;
          `relative_distance` divides it by the norm of the live weights;
        - `effective_samples`: 1 / (sum of squared shares): as many equal weights cancel as much noise;
        - `mean_age`: in `unit`;  `next_share`: the share with which the next weights will enter;
        - `skipped`: updates left out by `nonfinite="skip"`.
        """
        return diagnostics.metrics(self._member)

    def __repr__(self) -> str:
        return (
            f"Average({type(self.model).__name__}, {profile_text(self.profile)}, "
            f"time={self.time:g} {self.unit or 'updates'}, count={self.count})"
        )

    def _swap_in(
        self,
        what: str,
        after: Callable[[], None] | None = None,
        *,
        check: bool = False,
        in_place: bool = False,
    ) -> values.Loan:
        if self._member.is_applied:
            return values.Loan()
        self._tracker.refuse_during_loan(what)
        self._tracker.ready_to_read()
        if check:
            values.refuse_nonfinite_average(self._member, what)
        return values.Loan(values.swapped_in(self._member, owner=self, in_place=in_place), after)

    def _warn_stale(self) -> None:
        """After a loan: unless they were measured in it, its statistics were not the average's own."""
        if not self._member.warned_stale and self._member.stale_layers():
            self._member.warned_stale = True
            warn(saving.STALE.format("evaluating"), StaleStatistics)

    def _is_empty(self, consequence: str) -> bool:
        if not self.empty:
            return False
        if not self._member.warned_empty:
            self._member.warned_empty = True
            warn(
                f"{self!r} is empty: nothing has been averaged yet, so {consequence}."
                f"{self._unused()}",
                EmptyAverage,
            )
        return True

    def _unused(self) -> str:
        attachment = self._member.attachment or self._tracker.attachment
        return attachment.unused() if attachment else ""
