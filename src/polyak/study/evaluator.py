"""Weights are evaluated once: what is judged, by which evaluation, and the scores that are kept."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from polyak.batchnorm.layers import norm_layers
from polyak.batchnorm.update import restored_rng, update_bn
from polyak.batchnorm.update_file import update_bn_file
from polyak.checkpoints.merging.scores import direction
from polyak.errors import (
    ArgumentError,
    PolyakError,
    StaleStatistics,
    UsageError,
    require,
    warn,
)
from polyak.maths.arguments import number
from polyak.study.evaluations import (
    TimedOut,
    as_scores,
    data_identity,
    identity_of,
    model_identity,
    place_of,
    time_limit,
)
from polyak.study.filling import Source, fill, own_weights
from polyak.study.scores import KeptScores, key_of
from polyak.tensors.modes import restored_modes
from polyak.tensors.names import require_module

_LONGEST = 1e8  # seconds, three years: clocks count no further everywhere

PathLike = str | Path


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How averages are judged; see `Trajectory.search`."""

    model: Module | None = None
    data: Iterable[Any] | None = None
    minimize: bool = False
    maximize: bool = False
    holdout: float = 0.5
    cache: PathLike | bool | None = None
    timeout: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.model is not None:
            require_module(self.model, "search")
        data: Any = self.data
        require(
            data is None or self.model is not None,
            "data is there to refresh BatchNorm statistics, which needs the model; pass model= too.",
        )
        require(
            not isinstance(data, Iterator),
            "data is an iterator, which can be read only once; pass a list or a DataLoader.",
        )
        require(
            0 <= number("holdout", self.holdout) < 1,
            f"holdout is {self.holdout:g}; expected the share of the examples that is kept for the report, at "
            "least 0 and less than 1.",
        )
        if self.timeout is not None:
            require(
                0 < number("timeout", self.timeout) <= _LONGEST,
                f"timeout is {self.timeout:g}; expected a positive number of seconds, at most {_LONGEST:g}; leave out "
                "timeout= for no limit.",
            )

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Judging:
        """From the arguments of a function that has all of these among its own, as `locals()` gives them."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @property
    def refreshes(self) -> bool:
        """Whether BatchNorm statistics are set by the data: there are data, and a model that has any."""
        return self.data is not None and self.model is not None and bool(norm_layers(self.model))


@dataclass(frozen=True)
class Subject:
    """Weights to evaluate.

    what: as messages call them. content: what they are made of, in a text that changes whenever they do.
    tensors: by their names, in the memory of those that it is given by name if it makes them. file: a context
    with the path of a file of them. refresh: whether their BatchNorm statistics are not their own, and are set
    by the data if there is any.
    """

    what: str
    content: str
    tensors: Source
    file: Callable[[], AbstractContextManager[Path]]
    refresh: bool = True


@contextmanager
def in_file(tensors: Iterable[tuple[str, Tensor]], name: str) -> Iterator[Path]:
    """A file of the tensors, for the block."""
    from polyak.checkpoints.writing.save import write_checkpoint

    with tempfile.TemporaryDirectory(prefix="polyak-") as folder:
        path = Path(folder) / name
        write_checkpoint(path, dict(tensors))
        yield path


class Evaluator:
    """Scores weights by one evaluation; a context, after which the model is as before.

    `evaluations` counts calls of the evaluation, `cached` scores that were known from earlier ones. folder:
    where scores are kept unless `judging` says otherwise; None keeps none. question: what continues after an
    interruption. stale: whose BatchNorm statistics averages have where they are not refreshed.
    """

    def __init__(
        self,
        evaluate: Any,
        judging: Judging,
        *,
        folder: Path | None,
        question: str,
        stale: str | None,
    ) -> None:
        require(
            callable(evaluate) and not isinstance(evaluate, Module | type),
            f"evaluate is {evaluate!r}; expected a function of the model, or of the state dict where no model "
            "is given.",
        )
        self._evaluate, self._judging, self._question = evaluate, judging, question
        self.minimize = _minimizes(evaluate, judging)
        self.evaluations = self.cached = 0
        self.notes: list[str] = []
        self._values: dict[str, Tensor] = {}
        self._size: torch.Size | None = None
        self.takes_file = bool(getattr(evaluate, "takes_file", False))
        self._identity = self._described()
        self._kept = self._cache(folder)
        self._stale = None if judging.data is not None else stale

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The model has its own weights again afterwards, whatever happened."""
        with own_weights(self._judging.model):
            try:
                yield
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"Stopped. {self._continued()}") from None

    def scores(self, subject: Subject) -> Tensor:
        """Its scores, a 0-d or 1-D float64 tensor: known ones, or those of an evaluation."""
        key = key_of(subject.content, *self._identity)
        if key not in self._values:
            self._values[key] = self._found(key, subject)
        return self._values[key]

    def split(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The examples that choose, and those that are held out: the same ones for all weights."""
        held = _held_out(len(scores), self._judging.holdout) if scores.ndim else 0
        if not held:
            return scores, None
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
        return scores[order[held:]], scores[order[:held]]

    def loss(self, score: float) -> float:
        """What to minimise: infinite where the score is not finite."""
        if not math.isfinite(score):
            return math.inf
        return score if self.minimize else -score

    @property
    def examples(self) -> tuple[int, int] | None:
        """How many examples choose, and how many are held out."""
        held = _held_out(self._size[0], self._judging.holdout) if self._size else 0
        return (self._size[0] - held, held) if self._size and held else None

    def why_no_interval(self, each: str) -> str:
        """Why no examples are held out, in sentences that call the subjects `each`."""
        holdout, size = self._judging.holdout, self._size[0] if self._size else 0
        if not self._size:
            why, advice = f"One number for each {each}", "Return one score per example"
        elif not holdout:
            why, advice = (
                "holdout is 0, so no examples are left to compare on",
                "Give holdout a share",
            )
        else:
            why = f"holdout is {holdout:g} of {size} examples, which leaves too few on one of the two sides"
            advice = "Give more examples"
        return (
            f"{why}: no interval can be given, and the best is flattered by its choice. {advice} for an honest "
            "comparison."
        )

    def _found(self, key: str, subject: Subject) -> Tensor:
        known = self._kept.get(key) if self._kept else None
        if known is not None:
            self.cached += 1
            self._check_size(known, subject.what)
            return known
        scores = as_scores(self._called(subject), subject.what)
        self.evaluations += 1
        self._check_size(scores, subject.what)
        if self._kept and bool(torch.isfinite(scores).all()):
            problem = self._kept.try_put(key, scores, {"what": subject.what})
            if problem:
                self.notes.append(f"Scores are not kept: {problem}")
                self._kept = None
        return scores

    def _called(self, subject: Subject) -> Any:
        model, data = self._judging.model, self._judging.data
        refresh = subject.refresh and self._judging.refreshes
        if self.takes_file:
            with self._stale_noticed(subject), subject.file() as path:
                if refresh:
                    update_bn_file(path, model, data)  # type: ignore[arg-type]
                return self._run(subject.what, path)
        with self._stale_noticed(subject):
            if model is None:
                weights: Any = dict(subject.tensors({}))
                return self._run(subject.what, weights)
            fill(model, subject.tensors)
        if refresh:
            update_bn(model, data)  # type: ignore[arg-type]
        with restored_modes(model), restored_rng(model):
            model.eval()
            return self._run(subject.what, model)

    def _run(self, what: str, subject: Any) -> Any:
        limit = None if self.takes_file else self._judging.timeout
        try:
            with time_limit(limit):
                return self._evaluate(subject)
        except TimedOut:
            raise UsageError(
                f"The evaluation of {what} took longer than {limit:g} s and was stopped. Pass timeout= with more "
                f"seconds if it needs them. {self._continued()}"
            ) from None
        except PolyakError as error:
            raise type(error)(f"{error}\nThis was {what}. {self._continued()}") from error
        except Exception as error:
            raise UsageError(
                f"The evaluation failed on {what}: {type(error).__name__}: {error} ({place_of(error)}). "
                f"{self._continued()}"
            ) from error

    def _continued(self) -> str:
        if not self._kept:
            return "Its scores so far are not kept."
        done = self.evaluations + self.cached
        return f"{done} scores are kept: the same {self._question} continues after them."

    @contextmanager
    def _stale_noticed(self, subject: Subject) -> Iterator[None]:
        """Say once for all averages that their BatchNorm statistics are not their own."""
        if self._stale and subject.refresh:
            whose, self._stale = self._stale, None
            warn(
                f"The weights are evaluated with the BatchNorm statistics of {whose}, which are not theirs. "
                "Pass data= with training batches (and model=) to refresh them for each.",
                StaleStatistics,
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StaleStatistics)
            yield

    def _check_size(self, scores: Tensor, what: str) -> None:
        if self._size is not None and scores.shape != self._size:
            raise ArgumentError(
                f"The evaluation returned {_counted(scores.shape)} for {what}, and {_counted(self._size)} before. "
                "Expected the same examples in the same order every time."
            )
        self._size = scores.shape

    def _described(self) -> tuple[str, ...]:
        """What a score depends on beside the average; empty where it cannot be told."""
        judging = self._judging
        known = judging.name or identity_of(self._evaluate)
        if known is None:
            return ()
        model = judging.model
        built = model_identity(model) if model is not None else ""
        data = data_identity(judging.data) if judging.data is not None else ""
        return known, built, data

    def _cache(self, folder: Path | None) -> KeptScores | None:
        cache = self._judging.cache
        own = isinstance(cache, bool) or cache is None
        if cache is False or (own and folder is None):
            return None
        if not self._identity:
            self.notes.append(
                "Scores are not kept: what this evaluation holds cannot be told from outside. Pass name= with a "
                "text that changes whenever it does, or a plain function of a module."
            )
            return None
        return KeptScores(folder if own and folder else Path(str(cache)))


def _minimizes(evaluate: Any, judging: Judging) -> bool:
    require(
        not (judging.minimize and judging.maximize),
        "Both directions are asked for; pass minimize=True or pass maximize=True.",
    )
    if judging.minimize or judging.maximize:
        return judging.minimize
    known = getattr(evaluate, "minimize", None)
    if isinstance(known, bool):
        return known
    name = str(getattr(evaluate, "__name__", type(evaluate).__name__))
    try:
        return direction(name)[0] < 0
    except ArgumentError:
        raise ArgumentError(
            f"Is less or more of what {name!r} returns better? Pass minimize=True for a loss or an error, or pass "
            "maximize=True for an accuracy."
        ) from None


def _held_out(examples: int, share: float) -> int:
    """How many are held out: none where too few would be on either side."""
    held = round(examples * share)
    return held if 2 <= held <= examples - 1 else 0


def _counted(shape: torch.Size) -> str:
    return f"{shape[0]} scores" if len(shape) else "one number"
