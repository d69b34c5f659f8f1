"""Lightning: the average of a model in a `Trainer`, with one callback.

    trainer = Trainer(callbacks=[WeightAveraging("ema:half_life=500")])

While it fits, the callback is the first of the trainer's, and three methods of trainer and strategy are
replaced on the instances: a validation ends after the hooks of all callbacks and of the module, and a file
is written, weights only too, while the module holds the average.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch

from polyak import After, Average, Averages, Profile, sharded
from polyak.errors import (
    MismatchError,
    MissingExtra,
    UsageError,
    require,
    warn,
)

try:
    import lightning
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    from polyak.integrations import lightning_parts as parts
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

_ONLY = "average"  # the name of a single average in a checkpoint


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
    averaging callback, and for the strategies of DeepSpeed and of the first FSDP. MismatchError for a
    checkpoint with the average of another profile.

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
        vars(self).update(_before_fit())

    _averages: Averages | None
    _left: dict[str, Any] | None  # what trained, when the last fit ended
    _restored: Mapping[str, Any] | None  # a checkpoint, until the model is in place
    _fitting: bool
    _attached: bool
    _epoch: int  # the last one that was averaged
    _refreshed: dict[str, int]  # counts at which statistics were measured
    _loan: Any  # the average in the module
    _shared: set[str]  # what a checkpoint has as a raw weight and as an average

    def __getstate__(self) -> dict[str, Any]:
        """What was asked for: an average stays with its model, in its process."""
        return {**vars(self), **_before_fit()}

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
        with self._holding(average=False):
            return parts.copied(self._main.model.state_dict())

    # The course of a fit

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Make the average; or continue that of the last fit, from the weights with which it ended."""
        if stage != "fit":
            return
        parts.refuse(trainer, self, (WeightAveraging, _LightningsOwn, StochasticWeightAveraging))
        parts.check_forward(pl_module, self._update_bn, self._forward)
        self._end()
        if self._averages is not None and self._main.model is pl_module:
            self._continue(pl_module)
        else:
            self._begin(pl_module)
        self._restored, self._epoch, self._fitting = None, -1, True
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]
        for owner, name, ours in self._replaced(trainer):
            setattr(owner, name, partial(ours, trainer, getattr(owner, name)))

    def on_load_checkpoint(
        self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Give the module the weights that trained; the average follows when it has its place."""
        if not self._fitting:
            return
        self._begin(pl_module)
        if "averaging_state" not in checkpoint:
            warn(
                "The checkpoint holds no average: a new one begins with the weights in it. (A checkpoint "
                "has one if it was written while this callback was fitting, not weights only.)"
            )
            return
        parts.load_raw(trainer, pl_module, checkpoint.get("current_model_state"))
        self._restored = {**checkpoint, "folder": trainer.ckpt_path}

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Load what was restored, and attach to the optimizer unless averaging begins later."""
        self._restore()
        if self._attached or trainer.current_epoch < self._start_epoch:
            return
        optimizers = parts.chosen_optimizers(trainer.optimizers, self._optimizer)
        if any(o.param_groups for o in optimizers):
            every = {"by_hand": True} if self._per_epoch else {"every": self._every}
            self._all.attach(optimizers, **every)
            self._attached = True
        else:
            require(
                self._per_epoch,
                "configure_optimizers() returned no optimizer, so there are no steps to count. Pass "
                "per_epoch=True.",
            )

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
            average = self._all[name]
            if not average.empty:
                self._refresh(trainer, name)
                with (
                    self._holding(average=False),
                    parts.logged_below(f"val/{name}/", trainer, pl_module) as loop,
                    average.applied(),
                ):
                    loop.run()

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Leave the average in the module, and keep the weights that trained."""
        if self._fitting:
            self._all.detach()
            self._refresh(trainer, *self._profiles)
            self._finish(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """The same after a fit that found nothing left to do."""
        self._restore()
        if self._fitting and self._left is None and not self._main.empty:
            self._finish(pl_module)

    def on_exception(
        self, trainer: Any, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the module its own weights back."""
        if self._fitting:
            self._end()
            if self._left is None:
                self._left = parts.copied(pl_module.state_dict())
            self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Leave no trace in the trainer and the module."""
        if self._fitting:
            self._end()
            for owner, name, _ in self._replaced(trainer):
                vars(owner).pop(name, None)
            self._fitting = False

    def on_save_checkpoint(
        self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the weights that train beside the average, and what is needed to go on averaging."""
        if self._averages is None or self._main.model is not pl_module:
            return
        if self._left is not None and not self._fitting and not self._unchanged(pl_module):
            return  # the module has been given other weights since
        raw = self._left
        if raw is None:
            with self._holding(average=False):
                raw = parts.copied(trainer.strategy.lightning_module_state_dict())
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._main.count)}
        checkpoint["polyak"] = {"epoch": self._epoch}
        states = self._all.state_dict()
        if parts.writes_folders(trainer):
            checkpoint["state_dict"]["polyak"] = {"raw": raw, "averages": states}
            return
        raw, states = parts.gathered((raw, states))
        averaged = parts.held_once(checkpoint["state_dict"], states[self._main_name]["tensors"])
        raw = parts.held_once(raw, averaged)
        self._shared = {name for name in raw if raw[name] is averaged.get(name)}
        checkpoint["state_dict"] = averaged
        checkpoint["current_model_state"] = raw
        checkpoint["polyak"]["averages"] = states

    # What stands in for methods of trainer and strategy

    def _replaced(self, trainer: Any) -> list[tuple[Any, str, Callable[..., Any]]]:
        return [
            (trainer, "save_checkpoint", self._save),
            (trainer.strategy, "save_checkpoint", self._write),
            (trainer.strategy, "on_validation_end", self._end_validation),
        ]

    def _save(self, trainer: Any, save: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._refresh(trainer, *self._profiles)
        with self._holding(average=True):
            save(*args, **options)

    def _write(
        self, trainer: Any, write: Callable[..., Any], checkpoint: Any, *args: Any, **options: Any
    ) -> None:
        # What the module does not save, such as a frozen backbone, is not saved as a raw weight either.
        for name in self._shared - checkpoint["state_dict"].keys():
            checkpoint.get("current_model_state", {}).pop(name, None)
        write(checkpoint, *args, **options)

    def _end_validation(self, trainer: Any, end: Callable[[], Any]) -> None:
        self._give_back()
        end()

    # What it is made of

    @property
    def _all(self) -> Averages:
        assert self._averages is not None  # noqa: S101 - setup() comes before every hook
        return self._averages

    @property
    def _main_name(self) -> str:
        return next(iter(self._profiles))

    @property
    def _main(self) -> Average:
        return self._all[self._main_name]

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
        state = module.state_dict()
        if parts.equal(state, self._left or {}):
            return True
        if self._main.empty:
            return False
        state = parts.copied(state)
        with self._main.applied():
            return parts.equal(state, module.state_dict())

    def _restore(self) -> None:
        """Load the averages of the checkpoint from which the run goes on."""
        checkpoint, self._restored = self._restored, None
        if checkpoint is None:
            return
        saved = checkpoint.get("polyak")
        if saved is None:  # Lightning's own
            count = int(checkpoint["averaging_state"].get("n_averaged", 0))
            for average in self._all.values() if count else ():
                average.import_state(checkpoint)
            progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
            if progress["processed"] == progress["ready"]:  # the epoch is in the average
                self._epoch = checkpoint["epoch"]
            return
        self._epoch = saved["epoch"]
        if "averages" not in saved:
            sharded.load(self._all, checkpoint["folder"], key=f"{parts.IN_FOLDER}.averages")
            return
        if saved["averages"].keys() != self._profiles.keys():
            raise MismatchError(
                f"The checkpoint holds the averages {', '.join(saved['averages'])}, and this callback keeps "
                f"{', '.join(self._profiles)}. Nothing was loaded. Give it the same profiles by the same "
                "names, or begin anew from the weights: load_from_checkpoint(), and fit() without ckpt_path=."
            )
        self._all.load_state_dict(saved["averages"])

    def _finish(self, module: LightningModule) -> None:
        self._left = parts.copied(module.state_dict())
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
    def _holding(self, *, average: bool) -> Iterator[None]:
        """The average in the module, or its own weights, whichever is there now."""
        before = self._loan is not None
        (self._lend if average else self._give_back)()
        try:
            yield
        finally:
            (self._lend if before else self._give_back)()

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
                with self._holding(average=False), parts.undisturbed(trainer):
                    average.update_bn(
                        parts.batches(trainer, self._update_bn), forward=self._forward
                    )


def _before_fit() -> dict[str, Any]:
    """What a callback that has not fitted holds."""
    empty: dict[str, Any] = dict.fromkeys(("_averages", "_left", "_restored", "_loan"))
    return {
        **empty,
        "_fitting": False,
        "_attached": False,
        "_epoch": -1,
        "_refreshed": {},
        "_shared": set(),
    }
