"""Lightning: the average of a model in a `Trainer`, with one callback.

    trainer = Trainer(callbacks=[WeightAveraging("ema:half_life=500")])

The callback is first and last among the trainer's callbacks while it fits, so that whatever they and the
module do from `on_validation_start` to `on_validation_end` sees the average.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch

from polyak import After, Average, Averages, Profile
from polyak.errors import (
    MismatchError,
    MissingExtra,
    UsageError,
    require,
    warn,
)
from polyak.integrations import lightning_parts as parts

try:
    import lightning
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch.callbacks import StochasticWeightAveraging
    from lightning.pytorch.strategies import (
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
    )
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("lightning"):
        raise
    raise MissingExtra.of("lightning", "lightning", "polyak.integrations.lightning") from error

_NEEDED = (2, 6)
if tuple(map(int, re.findall(r"\d+", lightning.__version__)[:2])) < _NEEDED:
    raise MissingExtra(
        f"polyak.integrations.lightning needs lightning 2.6 or newer; found {lightning.__version__}: "
        "pip install -U 'polyak[lightning]'"
    )
from lightning.pytorch.callbacks import WeightAveraging as _LightningsOwn  # noqa: E402 - new in 2.6

_AVERAGING = (_LightningsOwn, StochasticWeightAveraging)
_SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
_ONLY = "average"  # the name of a single average in a checkpoint
_OF_A_RUN = {"_averages", "_left", "_restored", "_fitting", "_attached", "_epoch", "_refreshed"}
_OF_A_RUN |= {"_loan", "_guest", "_closing"}


class WeightAveraging(Callback):
    """Averages the weights while a `Trainer` fits; validates on, saves and leaves the average.

    - Real optimizer steps are averaged, under accumulation, manual optimisation and gradient scaling;
      or, with `per_epoch=True`, the weights at the end of epochs, before that epoch's validation.
    - Validation runs on the average, and so do the hooks of all callbacks and of the module in it.
      Training goes on with the model's own weights, whatever happens in between.
    - Checkpoints hold the average in `state_dict`, the weights that train in `current_model_state`, so
      `load_from_checkpoint`, `test(ckpt_path="best")` and `fit(ckpt_path=...)` do what they say. It is
      the layout of Lightning's own `WeightAveraging`; each reads the other's.
    - After `fit` the module holds the average; `raw_weights()` gives those that trained. Another `fit` of
      that module continues from both. If it holds other weights by then, a new average begins.

    Args:
        profile: how much each moment counts, as for `polyak.Average`: `SWA()`, `"ema:half_life=500"`. Or
            several by name: the first is the average that validates, is saved and stays in the module.
            The others are evaluated after it, and what the module logs then is `val/<name>/<metric>`.
        every: average every k-th step, or epoch with `per_epoch=True`; the time moves on by k.
        per_epoch: average at the end of each epoch. The profile's time runs in epochs. An epoch that
            `max_steps` or a stop cuts short is left out.
        start: how many steps, or epochs with `per_epoch=True`, are left out first. Until then the model is
            not touched.
        start_epoch: average steps, beginning with this epoch (the first is 0).
        optimizer: which of several optimizers counts the steps: its index, or a list of indices; then a
            step is complete when each of these has stepped.
        update_bn: a number of training batches, or a loader: BatchNorm statistics are measured on it
            under the averaged weights, before each validation and checkpoint, and when training ends.
        forward: how to run the model on a batch for `update_bn`, `forward(module, batch)`; by default
            `module(batch)`, or its first entry for a tuple or list.
        include, exclude, dtype, device, nonfinite, average_buffers: as for `polyak.Average`.

    Raises ArgumentError for options out of their domain, at once; and when `fit` begins, for several
    optimizers without `optimizer=` and `update_bn` on a module without `forward`. UsageError for a second
    averaging callback, and for DeepSpeed and FSDP strategies. MismatchError for a checkpoint with the
    average of another profile.

    """

    def __init__(  # noqa: PLR0913 - each one fact about the average, keyword-only
        self,
        profile: Profile | str | Mapping[str, Profile | str],
        *,
        every: int | None = None,
        per_epoch: bool = False,
        start: int | None = None,
        start_epoch: int | None = None,
        optimizer: int | Sequence[int] | None = None,
        update_bn: int | Iterable[Any] | None = None,
        forward: Callable[[Any, Any], object] | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        nonfinite: Literal["skip", "raise"] | None = None,
        average_buffers: str | Iterable[str] | None = None,
    ) -> None:
        parts.check_whole("every", every, 1)
        parts.check_whole("start", start, 0)
        parts.check_whole("start_epoch", start_epoch, 0)
        require(
            start_epoch is None or (start is None and not per_epoch),
            "start_epoch= is for an average of steps that begins with an epoch. Pass start= alone: it "
            "counts steps, or epochs with per_epoch=True.",
        )
        if not isinstance(update_bn, Iterable):
            parts.check_whole("update_bn", update_bn, 1, " of batches, or a loader")
        self._options: dict[str, Any] = {
            "unit": "epochs" if per_epoch else None,
            "include": include,
            "exclude": exclude,
            "dtype": dtype,
            "device": device,
            "nonfinite": nonfinite,
            "average_buffers": average_buffers,
        }
        self._every = every or 1
        self._per_epoch = per_epoch
        self._start_epoch = start_epoch or 0
        self._optimizer = optimizer
        self._update_bn = update_bn
        self._forward = forward
        self._several = isinstance(profile, Mapping)
        # A model of its own reads and checks profiles and options before there is one to fit.
        named: Any = profile if isinstance(profile, Mapping) else {_ONLY: profile}
        checked = Averages(torch.nn.Linear(1, 1), named, **self._options)
        self._profiles = {
            name: After(start, average.profile) if start else average.profile
            for name, average in checked.items()
        }
        self._forget()

    def _forget(self) -> None:
        self._averages: Averages | None = None
        self._left: dict[str, Any] | None = None  # what trained, when the last fit ended
        self._restored: Mapping[str, Any] | None = None  # a checkpoint, until the model is in place
        self._fitting = False
        self._attached = False
        self._epoch = -1  # the last one that was averaged
        self._refreshed: dict[str, int] = {}  # counts at which statistics were measured
        self._loan: Any = None
        self._guest: Average | None = None  # another average that is evaluated now
        self._closing = _Closing(self)

    def __getstate__(self) -> dict[str, Any]:
        """What was asked for: an average stays with its model, in its process."""
        return {name: value for name, value in vars(self).items() if name not in _OF_A_RUN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def average(self) -> Average | Averages:
        """The average of the module that is fitted, or was last; the `Averages` for several profiles."""
        if self._averages is None:
            raise UsageError(
                "There is no average yet: fit() makes it. With a strategy that starts processes of its own "
                "(ddp_spawn, ddp_fork) it stays in these: read it from a checkpoint."
            )
        return self._averages if self._several else self._main

    def raw_weights(self) -> dict[str, Any]:
        """The weights that train, or trained last, as a state dict of the module.

        `module.load_state_dict(callback.raw_weights())` puts them in the place of the average.

        Raises UsageError before the first fit.
        """
        if self._left is not None:
            return dict(self._left)
        if self._averages is None:
            raise UsageError("There are no raw weights yet: the module has not been fitted.")
        with self._own_weights():
            return parts.copied(self._main.model.state_dict())

    # The course of a fit

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Make the average; or continue that of the last fit, from the weights with which it ended."""
        if stage != "fit":
            return
        parts.refuse(trainer, self, (WeightAveraging, *_AVERAGING), _SHARDED)
        self._end()
        if self._averages is not None and self._main.model is pl_module:
            self._continue(pl_module)
        else:
            self._begin(pl_module)
        self._restored, self._epoch = None, -1
        self._fitting = True

    def on_load_checkpoint(
        self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Give the module the weights that trained; the average follows when it has its place."""
        if not self._fitting:
            return
        self._begin(pl_module)
        if not checkpoint.keys() >= {"current_model_state", "averaging_state"}:
            warn(
                "The checkpoint holds no average: a new one begins with the weights in it. (A checkpoint "
                "has one if it was written while this callback was fitting, not weights only.)"
            )
            return
        # What the module's own on_save_checkpoint left out is as the module has it now.
        current = {**pl_module.state_dict(), **checkpoint["current_model_state"]}
        pl_module.load_state_dict(current, strict=pl_module.strict_loading)
        self._restored = checkpoint

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Load what was restored, and take the first and the last place among the callbacks."""
        parts.check_forward(pl_module, self._update_bn, self._forward)
        if self._restored is not None:
            self._load(self._restored)
            self._restored = None
        others = [c for c in trainer.callbacks if c not in (self, self._closing)]
        trainer.callbacks = [self, *others, self._closing]
        parts.wrap_hooks(
            pl_module,
            {"on_save_checkpoint": self._saved_on_average, "on_validation_end": self._ended},
        )

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Attach the average to the optimizer, unless it begins with a later epoch."""
        if not self._attached and trainer.current_epoch >= self._start_epoch:
            optimizers = parts.chosen_optimizers(trainer.optimizers, self._optimizer)
            if not any(o.param_groups for o in optimizers):
                require(
                    self._per_epoch,
                    "configure_optimizers() returned no optimizer, so there are no steps to count. Pass "
                    "per_epoch=True.",
                )
                return
            every = {"by_hand": True} if self._per_epoch else {"every": self._every}
            self._all.attach(optimizers, **every)
            self._attached = True

    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """The same, for an average that begins with this epoch."""
        self.on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """After the last batch of an epoch: average its weights, so that its validation sees them."""
        epoch = trainer.current_epoch
        if not self._per_epoch or epoch == self._epoch:
            return
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._epoch = epoch
            if (epoch + 1) % self._every == 0:
                self._all.update(self._every)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """The same, for an epoch that the module ended itself."""
        self.on_train_batch_end(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Lend the average to the module, with fresh statistics."""
        if self._fitting:
            self._refresh(trainer, next(iter(self._profiles)))
            self._lend()

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Evaluate the other averages; what else happens at this moment is on the first one again."""
        if not self._fitting or trainer.sanity_checking:
            return
        for name in list(self._profiles)[1:]:
            if not self._all[name].empty:
                with self._own_weights():
                    self._evaluate(trainer, pl_module, name)

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Leave the average in the module, and keep the weights that trained."""
        if not self._fitting:
            return
        self._all.detach()
        self._refresh(trainer, *self._profiles)
        self._finish(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """The same after a fit that found nothing left to do."""
        if self._fitting and self._left is None and not self._main.empty:
            self._finish(pl_module)

    def on_exception(
        self, trainer: Any, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the module its own weights back."""
        if self._fitting:
            self._end()
            if self._left is None:
                self._left = parts.copied(pl_module.state_dict(), "cpu")
            self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Leave no trace in the trainer and the module."""
        if self._fitting:
            self._end()
            trainer.callbacks = [c for c in trainer.callbacks if c is not self._closing]
            parts.unwrap_hooks(pl_module)
            self._fitting = False

    # Checkpoints

    def on_save_checkpoint(
        self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average in the place of the weights, and these beside it."""
        if self._averages is None or self._main.model is not pl_module:
            return
        self._refresh(trainer, *self._profiles)
        with self._own_weights():
            raw = pl_module.state_dict()
            if self._left is not None and not self._fitting and not self._unchanged(pl_module):
                return  # the module has been given other weights since
            if self._left is not None:
                raw = {**raw, **self._left}
            averaged = self._averaged_state(raw)
            raw = parts.copied(raw) if self._loan is not None else raw
        checkpoint["state_dict"] = averaged
        checkpoint["current_model_state"] = raw
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._main.count)}
        checkpoint["polyak"] = {"averages": self._all.state_dict(), "epoch": self._epoch}

    def _saved_on_average(
        self, hook: Callable[[dict[str, Any]], Any], checkpoint: dict[str, Any]
    ) -> None:
        """The module's own on_save_checkpoint; it is called for weights alone, too."""
        if self._main.empty:
            hook(checkpoint)
            return
        if "current_model_state" not in checkpoint:  # weights alone
            with self._own_weights():
                self._refresh(self._main.model.trainer, next(iter(self._profiles)))
                checkpoint["state_dict"] = self._averaged_state({})
        averaged = dict(checkpoint["state_dict"])
        with self._main.applied():
            hook(checkpoint)
            checkpoint["state_dict"] = parts.own_copies(checkpoint["state_dict"], averaged)
        parts.leave_out_frozen(checkpoint, averaged)

    def _ended(self, hook: Callable[[], Any]) -> None:
        """The module's own on_validation_end, which comes after those of all callbacks."""
        average = self._guest or self._main
        with nullcontext() if average.empty else average.applied():
            hook()

    def _averaged_state(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict of the averaged module. What is held anyway is not copied: it is saved once."""
        if self._main.empty:
            return dict(raw)
        held = self._main.state_dict()["tensors"]
        with torch.inference_mode(False), torch.no_grad(), self._main.applied():
            return {
                name: parts.shared_or_copied(value, raw.get(name), held.get(parts.plain_name(name)))
                for name, value in self._main.model.state_dict().items()
            }

    def _load(self, checkpoint: Mapping[str, Any]) -> None:
        saved = checkpoint.get("polyak")
        if saved is None:  # Lightning's own
            count = int(checkpoint["averaging_state"].get("n_averaged", 0))
            for average in self._all.values() if count else ():
                average.import_state(checkpoint)
            progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
            if progress["processed"] == progress["ready"]:  # the epoch is in the average
                self._epoch = checkpoint["epoch"]
            return
        if saved["averages"].keys() != self._profiles.keys():
            raise MismatchError(
                f"The checkpoint holds the averages {', '.join(saved['averages'])}, and this callback keeps "
                f"{', '.join(self._profiles)}. Nothing was loaded. Give it the same profiles by the same "
                "names, or begin anew from the weights: load_from_checkpoint(), and fit() without ckpt_path=."
            )
        self._all.load_state_dict(saved["averages"])
        self._epoch = saved["epoch"]

    # What it is made of

    @property
    def _all(self) -> Averages:
        assert self._averages is not None  # noqa: S101 - setup() comes before every hook
        return self._averages

    @property
    def _main(self) -> Average:
        return self._all[next(iter(self._profiles))]

    def _begin(self, module: LightningModule) -> None:
        self._averages = Averages(module, self._profiles, **self._options)
        self._left, self._refreshed = None, {}

    def _continue(self, module: LightningModule) -> None:
        """Go on where the last fit ended, if the module still holds what was left in it."""
        if self._left is None:
            return
        if self._unchanged(module):
            module.load_state_dict(self._left)
            self._left = None
            return
        warn(
            "The module no longer holds the weights with which the last fit left it, so this fit begins "
            "with those that it holds, and with a new average. To continue the last one, pass ckpt_path=, "
            "or put raw_weights() into the module first."
        )
        self._begin(module)

    def _unchanged(self, module: LightningModule) -> bool:
        """Whether the module holds the average, or the weights that trained, as the last fit left it."""
        state = parts.copied(module.state_dict(), "cpu")
        if parts.equal(state, self._left or {}):
            return True
        return not self._main.empty and parts.equal(
            state, parts.copied(self._averaged_state({}), "cpu")
        )

    def _finish(self, module: LightningModule) -> None:
        self._left = parts.copied(module.state_dict(), "cpu")
        self._main.copy_to(module)

    def _lend(self) -> None:
        if self._loan is None and not self._main.empty:
            with torch.inference_mode(False):
                self._loan = self._main.lend()

    def _give_back(self) -> None:
        loan, self._loan = self._loan, None
        if loan is not None:
            with torch.inference_mode(False):
                loan.give_back()

    @contextmanager
    def _own_weights(self) -> Iterator[None]:
        """The module's own weights in the module, whether the average is lent now or not."""
        was_lent = self._loan is not None
        self._give_back()
        try:
            yield
        finally:
            if was_lent:
                self._lend()

    def _end(self) -> None:
        self._give_back()
        if self._averages is not None:
            self._averages.detach()
        self._attached = False

    def _refresh(self, trainer: Any, *names: str) -> None:
        """Measure statistics under averages, unless they have been since these last changed."""
        if self._update_bn is None or not self._fitting or trainer.sanity_checking:
            return
        for name in names:
            average = self._all[name]
            if not average.empty and self._refreshed.get(name) != average.count:
                self._refreshed[name] = average.count
                with self._own_weights(), parts.undisturbed(trainer):
                    batches = parts.batches(trainer, self._update_bn)
                    average.update_bn(batches, forward=self._forward)

    def _evaluate(self, trainer: Any, module: LightningModule, name: str) -> None:
        """One more validation, without callbacks; what the module logs gets the name of the average."""
        self._refresh(trainer, name)
        self._guest = self._all[name]
        try:
            with (
                parts.validation_logged_below(f"val/{name}/", trainer, module) as loop,
                self._guest.applied(),
            ):
                loop.run()
        finally:
            self._guest = None


class _Closing(Callback):
    """The last callback of a trainer: it ends the loan for a validation."""

    def __init__(self, owner: WeightAveraging) -> None:
        self._owner = owner

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self._owner._give_back()
