"""Transformers: an average that the Trainer evaluates, saves in its checkpoints, and leaves in the model.

The Trainer's callbacks have no event before an evaluation, before a save or after a load. So six of
its methods are replaced on the one instance, by methods that call them; subclasses stay what they are.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import Module
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Subset

from polyak import SWA, Average, Averages, Profile
from polyak.errors import (
    ArgumentError,
    MissingExtra,
    NonFiniteError,
    UsageError,
    require,
    warn,
)
from polyak.integrations.trainer_checkpoint import (
    FOLDER,
    STATE,
    ignoring_adapter,
    load_state,
    save_shards,
    save_state,
    shards,
    versions,
)

try:
    from transformers import Trainer, TrainerCallback
    from transformers import __version__ as transformers_version
except ImportError as error:
    raise MissingExtra.of("transformers", "transformers", "Averaging in its Trainer") from error

_PUBLIC = ("train", "evaluate", "predict", "save_model")
_REPLACED = (*_PUBLIC, "_load_from_checkpoint", "_load_best_model")
_SHARDING = {
    "is_deepspeed_enabled": "DeepSpeed",
    "is_fsdp_enabled": "FSDP1",
    "is_fsdp_xla_enabled": "FSDP of XLA",
}
_USE_FSDP2 = "Pass fsdp_config={'version': 2, ...} to its TrainingArguments, or average"


class TrainerAverage(TrainerCallback):
    """What `attach` returns: the average of a Trainer, in place until `remove`.

    `average` is the `polyak.Average`, or the `polyak.Averages` where several profiles were given. It
    belongs to one training: a `train()` that begins anew begins a new one, so read it when you need it.
    """

    average: Average | Averages

    def __init__(self, trainer: Any, options: _Options) -> None:
        self._trainer, self._options = trainer, options
        self.average = options.make(trainer.model)
        self._raw: Average | None = None  # the model's own weights, while it holds the average
        self._placed = False  # the model holds the average, or that of the best checkpoint,
        self._versions: list[Any] = []  # and nobody has written to it since, if these are the same
        self._used = False  # by a training
        self._training = False
        self._attached = False
        self._starting = False  # train() was called, and the checkpoint is about to be loaded
        self._resumed: Path | None = None  # the checkpoint of this training
        self._first_step = 0
        self._on_loan: Average | None = None  # in the model, for an evaluation or a save
        self._loan: Any = None
        self._measured: int | None = None  # at how many updates BatchNorm statistics were measured
        self._earlier: dict[str, Any] = {}  # what others had put in the place of methods
        self._connect()

    def remove(self) -> None:
        """Leave the Trainer as it was before `attach`; the model keeps what it holds, the handle its average.

        A second call does nothing.
        """
        if self not in self._trainer.callback_handler.callbacks:
            return
        self.average.detach()
        for name in _REPLACED:
            if self._trainer.__dict__.get(name) == self._replacement(name):
                del self._trainer.__dict__[name]
        self._trainer.__dict__.update(self._earlier)
        self._trainer.remove_callback(self)

    def restore(self) -> None:
        """Put the weights of the last training step back into a model that holds the average.

        After `load_best_model_at_end` they are those of the best checkpoint. Nothing happens if the
        model holds its own weights. A second `train()` begins with this.
        """
        if self._placed and self._raw is not None:
            self._raw.copy_to(self._raw.model)
        self._placed, self._raw = False, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Begin an average, or continue that of the checkpoint; again if the batch size was too large."""
        self.average.detach()
        if self._resumed is None:
            self._begin(objects["model"])
        elif not self._starting:
            self._resume(objects["model"], self._resumed)
        self._starting, self._attached, self._measured = False, False, None
        self._used = self._training = True
        self._first_step = self._options.first_step(state.max_steps)
        self.on_step_begin(args, state, control, **objects)

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Attach before the first step that counts."""
        if not self._attached and state.global_step >= self._first_step:
            self._attached = True
            self.average.attach(objects["optimizer"], **self._options.timing)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Leave the average in the model, unless the best checkpoint's is there."""
        self._training = False
        self.average.detach()
        if not self._placed:
            self._place()

    def _connect(self) -> None:
        for name in _REPLACED:
            if name in self._trainer.__dict__:
                self._earlier[name] = self._trainer.__dict__[name]
            setattr(self._trainer, name, self._replacement(name))
        # Before all others: what they save at the end of training is the average.
        self._trainer.callback_handler.callbacks.insert(0, self)

    def _replacement(self, name: str) -> Any:
        return getattr(self, f"_{name.lstrip('_')}")

    def _original(self, name: str) -> Any:
        # Not kept: pickled or copied with the trainer, it would become the method of this object.
        return self._earlier.get(name) or partial(getattr(type(self._trainer), name), self._trainer)

    # What stands in for the Trainer's methods.

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        if self._placed and self._versions == versions(self._trainer, self._first.model):
            self.restore()
        self._placed, self._raw = False, None
        self._resumed, self._starting = None, True
        try:
            return self._original("train")(*args, **kwargs)
        finally:
            self._starting = self._training = False
            self.average.detach()

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        evaluate = self._original("evaluate")
        if self._on_loan is not None or not self._lends():  # one of several evaluation sets
            return evaluate(*args, **kwargs)
        with self._lent(self._first):
            metrics = evaluate(*args, **kwargs)
        names = ("eval_dataset", "ignore_keys", "metric_key_prefix")
        given = dict(zip(names, args, strict=False)) | kwargs
        prefix = given.pop("metric_key_prefix", "eval")
        for name, average in self._others().items():
            with self._lent(average):
                metrics |= evaluate(**given, metric_key_prefix=f"{prefix}_{name}")
        return metrics

    def _predict(self, *args: Any, **kwargs: Any) -> Any:
        if self._on_loan is not None or not self._lends():
            return self._original("predict")(*args, **kwargs)
        with self._lent(self._first):
            return self._original("predict")(*args, **kwargs)

    def _save_model(self, *args: Any, **kwargs: Any) -> Any:
        save = self._original("save_model")
        given = dict(zip(("output_dir", "_internal_call"), args, strict=False)) | kwargs
        folder = given.get("output_dir")
        if not self._training or not given.get("_internal_call") or folder is None:
            return save(*args, **kwargs)
        with self._own_weights():  # a callback may save a checkpoint during evaluation
            result = save(*args, **kwargs)
            self._save_average(Path(folder))
        return result

    def _load_from_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        if self._starting and Path(path).is_dir():
            self._resumed = Path(path)
            self._resume(self._trainer.model, self._resumed)
        with ignoring_adapter(self._trainer.model, Path(path) / FOLDER):
            return self._original("_load_from_checkpoint")(path, *args, **kwargs)

    def _load_best_model(self, *args: Any, **kwargs: Any) -> Any:
        load, state = self._original("_load_best_model"), self._trainer.state
        load(*args, **kwargs)
        best = state.best_model_checkpoint
        if self._training and best is not None and (Path(best) / FOLDER).is_dir():
            self._keep_raw()
            if shards(self._trainer):
                self._load_shards(Path(best))
                return
            state.best_model_checkpoint = str(Path(best) / FOLDER)
            try:
                load(*args, **kwargs)
            finally:
                state.best_model_checkpoint = best
        self._note_placed()

    def _load_shards(self, best: Path) -> None:
        average = self._options.make(self._first.model)
        if load_state(average, best):
            _first(average).copy_to(self._first.model)
        self._note_placed()

    # What these are made of.

    @property
    def _first(self) -> Average:
        return _first(self.average)

    def _others(self) -> dict[str, Average]:
        average = self.average
        return dict(list(average.items())[1:]) if isinstance(average, Averages) else {}

    def _begin(self, model: Module) -> None:
        if self._used or self._first.model is not model:
            self.average = self._options.make(model)

    def _resume(self, model: Any, checkpoint: Path) -> None:
        """Continue the average of the checkpoint, before anything of the checkpoint is loaded."""
        self._begin(model)
        self._used = True
        if not load_state(self.average, checkpoint) and self._options.missing == "raise":
            raise ArgumentError(
                f"{checkpoint} holds no average: there is no {STATE}. Nothing was loaded. It was saved "
                "before attach(), or with save_only_model=True. Pass missing='start' to begin a new "
                "average from its weights."
            )

    def _lends(self) -> bool:
        """Whether evaluations need the average lent: there is one, and the model does not hold it."""
        first = self._first
        return not self._placed and first.model is self._trainer.model and not first.empty

    @contextmanager
    def _lent(self, average: Average) -> Iterator[None]:
        self._refresh_statistics()
        self._loan, self._on_loan = average.lend(), average
        try:
            yield
        finally:
            loan, self._loan, self._on_loan = self._loan, None, None
            loan.give_back()

    @contextmanager
    def _own_weights(self) -> Iterator[None]:
        """The weights that train are in the model, also within an evaluation."""
        average = self._on_loan
        if average is None:
            yield
            return
        self._loan.give_back()
        self._loan = self._on_loan = None
        try:
            yield
        finally:
            self._loan, self._on_loan = average.lend(), average

    def _save_average(self, folder: Path) -> None:
        args, average = self._trainer.args, folder / FOLDER
        if self._lends() and shards(self._trainer):
            self._refresh_statistics()
            save_shards(self._trainer, self._first, average)
        elif self._lends():
            with self._lent(self._first):
                self._original("save_model")(str(average), _internal_call=True)
        elif args.should_save and average.is_dir():
            shutil.rmtree(average)  # of an earlier run, whose checkpoint was replaced just now
        if not args.save_only_model:
            save_state(self._trainer, self.average, folder)

    def _place(self) -> None:
        self._keep_raw()
        try:
            self._refresh_statistics()
            self._first.copy_to(self._first.model)
        except NonFiniteError as error:  # not worth losing what train() returns
            warn(f"The average is not in the model, which keeps its own weights. {error}")
        else:
            self._note_placed(placed=not self._first.empty)

    def _keep_raw(self) -> None:
        # An average of one moment, in the host's memory, holds exactly what the other one replaces.
        self._raw = self._options.make_raw(self._first.model)
        self._raw.update()

    def _note_placed(self, *, placed: bool = True) -> None:
        self._placed = placed
        self._versions = versions(self._trainer, self._first.model)

    def _refresh_statistics(self) -> None:
        """Measure the averages' BatchNorm statistics, once between two updates."""
        batches = self._options.update_bn
        if batches is None or self._measured == self._first.count:
            return
        if isinstance(batches, int):
            batches = self._some_batches(batches)
        for average in (self._first, *self._others().values()):
            average.update_bn(batches, forward=self._options.forward)
        self._measured = self._first.count

    def _some_batches(self, count: int) -> Any:
        """Training examples drawn once for all, collated, spread over the processes as for evaluation."""
        args, dataset = self._trainer.args, self._trainer.train_dataset
        drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))
        some = drawn[: count * args.eval_batch_size * args.world_size].tolist()
        return self._trainer.get_test_dataloader(Subset(dataset, some))


@dataclass(frozen=True)
class _Options:
    """What `attach` was given."""

    profile: Profile | str | Mapping[str, Profile | str]
    tensors: Mapping[str, Any]  # which tensors: `include`, `exclude`, `average_buffers`
    keeping: Mapping[str, Any]  # how: `dtype`, `device`, `nonfinite`
    timing: Mapping[str, Any]  # when: `every`, `at`, `before_next_step`
    start: int | float
    update_bn: int | Iterable[Any] | None
    forward: Callable[[Module, Any], Any] | None
    missing: str

    def make(self, model: Module) -> Average | Averages:
        """An average of this model that is still empty."""
        if isinstance(self.profile, Mapping):
            return Averages(model, self.profile, **self.tensors, **self.keeping)
        return Average(model, self.profile, **self.tensors, **self.keeping)

    def make_raw(self, model: Module) -> Average:
        """One that can hold what the other one replaces."""
        return Average(model, SWA(), **self.tensors, device="cpu")

    def first_step(self, max_steps: int) -> int:
        """After how many steps averaging starts."""
        return int(self.start) if self.start >= 1 else math.ceil(self.start * max_steps)


def attach(  # noqa: PLR0913 - each one fact about the average, keyword-only
    trainer: Trainer,
    profile: Profile | str | Mapping[str, Profile | str],
    *,
    start: float = 0,
    every: int | None = None,
    at: LRScheduler | None = None,
    before_next_step: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    nonfinite: Literal["skip", "raise"] | None = None,
    average_buffers: str | Iterable[str] | None = None,
    update_bn: int | Iterable[Any] | None = None,
    forward: Callable[[Module, Any], Any] | None = None,
    missing: Literal["raise", "start"] = "raise",
) -> TrainerAverage:
    """Average the weights while a Trainer trains: call it once, before `train()`.

    Training is not changed by a bit. `evaluate()` and `predict()` see the average, the evaluations of
    `train()` included; callbacks that run in them see it too. Each checkpoint holds the weights that train,
    as before, and beside them `averaged/`, a folder that `from_pretrained` loads, and `average.pt`, from
    which `resume_from_checkpoint` continues bitwise. After `train()` the model holds the average, with
    `load_best_model_at_end` that of the best checkpoint: `save_model()` and `push_to_hub()` write it.

    Args:
        trainer: a `transformers.Trainer` or whatever derives from it.
        profile: as for `polyak.Average`; or several by name, as for `polyak.Averages`. Then the first
            is the one described here, and during training the others are evaluated as well:
            their metrics are `eval_<name>_loss` and so on, like those of a further evaluation set.
        start: after how many optimizer steps averaging starts; below 1, after which part of them.
        every: average after every k-th step, as in `Average.attach`.
        at: average at the points of this schedule, which the Trainer was given in `optimizers=`.
        before_next_step: for callbacks that change weights after the optimizer's step.
        include: which parameters to average, as in `polyak.Average`.
        exclude: as there.
        dtype: as there.
        device: as there.
        nonfinite: as there.
        average_buffers: as there.
        update_bn: for models with BatchNorm: how many batches of the training set, as large as those of
            evaluation, the statistics of the average are measured on, before each evaluation and save;
            or the batches, a loader that can be read again and again.
        forward: ``forward(model, batch)`` for batches that are not keyword arguments of the model.
        missing: what to do on resuming from a checkpoint without an average: "raise", or "start" to
            begin a new one there.

    Returns a `TrainerAverage`, with `average`, `restore()` and `remove()`.

    With FSDP2 every process averages its shards, and all write their parts: `averaged/` without gathering
    it, and for `average.pt` a distributed checkpoint, `average/`.

    Raises ArgumentError for a Trainer with DeepSpeed or FSDP1, or arguments out of their domain;
    UsageError if it has an average already, or a method is missing that this replaces.
    `train(resume_from_checkpoint=...)` raises ArgumentError if there is no average in the checkpoint,
    MismatchError if it is another one (another profile), FormatError if it is damaged, before anything is
    loaded.

    """
    tensors = {"include": include, "exclude": exclude, "average_buffers": average_buffers}
    keeping = {"dtype": dtype, "device": device, "nonfinite": nonfinite}
    timing = {"every": every, "at": at, "before_next_step": before_next_step}
    _check_trainer(trainer)
    options = _Options(profile, tensors, keeping, timing, start, update_bn, forward, missing)
    _check_options(trainer, options)
    return TrainerAverage(trainer, options)


def _check_trainer(trainer: Any) -> None:
    require(
        isinstance(trainer, Trainer),
        f"attach() takes a transformers.Trainer; found {type(trainer).__name__}.",
    )
    absent = [name for name in _REPLACED if not callable(getattr(trainer, name, None))]
    if absent or not hasattr(trainer.callback_handler, "callbacks"):
        raise UsageError(
            f"transformers {transformers_version} has no Trainer.{(absent or ['callback_handler'])[0]}, "
            "which attach() builds on. 5.23 has it: install that, or use "
            "average.attach(optimizer) in a callback of your own."
        )
    if any(isinstance(callback, TrainerAverage) for callback in trainer.callback_handler.callbacks):
        raise UsageError(
            "This Trainer has an average already. Several averages go into one call, attach(trainer, "
            "{'ema': ..., 'swa': ...}); to replace it, call remove() on what attach() returned."
        )
    for mark, framework in _SHARDING.items():
        if getattr(trainer, mark, False) and not (framework == "FSDP1" and shards(trainer)):
            raise ArgumentError(
                f"This Trainer uses {framework}, whose forms of the weights attach() does not carry. "
                f"{_USE_FSDP2 if framework == 'FSDP1' else 'Average'} the checkpoints that it writes: "
                "polyak.average_checkpoints, or "
                f"`polyak average {trainer.args.output_dir}/checkpoint-*`."
            )


def _check_options(trainer: Any, options: _Options) -> None:
    start: Any = options.start
    batches: Any = options.update_bn
    every: Any = options.timing["every"]
    require(
        isinstance(start, int | float) and start >= 0 and (start < 1 or start == int(start)),
        f"start is {start!r}; expected a number of steps, or a part of all steps below 1.",
    )
    require(
        options.missing in ("raise", "start"),
        f"missing is {options.missing!r}; expected 'raise' or 'start'.",
    )
    require(
        every is None or options.timing["at"] is None, "attach() takes every= or at=, not both."
    )
    require(
        every is None or (isinstance(every, int) and every >= 1),
        f"every is {every!r}; expected a number of steps, 1 or more.",
    )
    if batches is None:
        return
    require(
        isinstance(batches, Iterable) or (isinstance(batches, int) and batches >= 1),
        f"update_bn is {batches!r}; expected a number of batches, 1 or more, or the batches.",
    )
    require(
        isinstance(batches, Iterable) or hasattr(trainer.train_dataset, "__len__"),
        f"update_bn is {batches!r}, and train_dataset has no length to draw from. Pass the batches.",
    )


def _first(average: Average | Averages) -> Average:
    return average if isinstance(average, Average) else next(iter(average.values()))
