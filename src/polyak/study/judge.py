"""The judge of a record's averages: makes each, evaluates it once, and keeps its score."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from polyak.maths.profiles import Profile
from polyak.maths.text import as_profile, profile_text
from polyak.study.evaluations import TimedOut, as_scores, data_identity, identity_of, time_limit
from polyak.study.filling import Source, check_fits, fill, has_statistics, own_weights
from polyak.study.found import Scored
from polyak.study.plan import Plan
from polyak.study.scores import FOLDER, KeptScores, key_of
from polyak.study.trajectory import Trajectory
from polyak.tensors.modes import restored_modes
from polyak.tensors.names import require_module

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
                number("timeout", self.timeout) > 0,
                f"timeout is {self.timeout:g}; expected a positive number of seconds.",
            )


class Judge:
    """Scores averages of one record by one evaluation; a context, after which the model is as before.

    `evaluations` counts calls of the evaluation, `cached` scores that were known from earlier ones.
    """

    def __init__(self, trajectory: Trajectory, evaluate: Any, judging: Judging) -> None:
        require(
            callable(evaluate) and not isinstance(evaluate, Module | type),
            f"evaluate is {evaluate!r}; expected a function of the model, or of the state dict where no model "
            "is given.",
        )
        self.trajectory, self._evaluate, self._judging = trajectory, evaluate, judging
        self.minimize = _minimizes(evaluate, judging)
        self.evaluations = self.cached = 0
        self.notes: list[str] = []
        self._values: dict[str, Tensor] = {}
        self._made: dict[tuple[str, float], Scored | None] = {}
        self._key_of: dict[Scored, str] = {}
        self._size: torch.Size | None = None
        self._takes_file = bool(getattr(evaluate, "takes_file", False))
        if judging.model is not None:
            check_fits(judging.model, trajectory.intervals[-1])
        self._identity = self._described()
        self._kept = self._cache()
        self._stale = judging.data is None and has_statistics(trajectory.intervals[-1])

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The model has its own weights again afterwards, whatever happened."""
        with own_weights(self._judging.model):
            try:
                yield
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"Stopped. {self._continued()}") from None

    def score(
        self, profile: Profile | str, until: float, family: str, start: float | None = None
    ) -> Scored | None:
        """Its score; None, with a note, where it needs intervals that are missing."""
        text = profile if isinstance(profile, str) else profile_text(profile)
        if (text, until) not in self._made:
            self._made[text, until] = self._score(as_profile(profile), text, until, family, start)
        return self._made[text, until]

    def score_last(self, last: PathLike | Mapping[str, Tensor]) -> Scored:
        """The score of weights that are not in the record: the last iterate."""
        from polyak.study.filling import tensors_of, weights_identity

        until = self.trajectory.end
        key = key_of("weights", weights_identity(last), *self._identity)
        self._known(key, "the last iterate", lambda into: tensors_of(last, into))
        return self._scored(key, "the last iterate", "reference", None, until, 0.0)

    def value(self, scored: Scored | None) -> float:
        """What to minimise: infinite where there is no score."""
        if scored is None or scored.failed:
            return math.inf
        return scored.score if self.minimize else -scored.score

    def held_out(self, scored: Scored) -> Tensor | None:
        """Its scores on the held-out examples; None for a single number."""
        return self._split(self._values[self._key_of[scored]])[1]

    @property
    def examples(self) -> tuple[int, int] | None:
        """How many examples choose, and how many are held out."""
        held = _held_out(self._size[0], self._judging.holdout) if self._size else 0
        return (self._size[0] - held, held) if self._size and held else None

    def _score(
        self, profile: Profile, text: str, until: float, family: str, start: float | None
    ) -> Scored | None:
        try:
            plan = self.trajectory.plan(profile, until)
        except PolyakError as error:
            self.notes.append(f"Left out: {str(error).splitlines()[0]}")
            return None
        key = key_of(content_of(plan), *self._identity)
        self._known(
            key, f"{text} at {until:g}", lambda into: self.trajectory.tensors(plan, into=into), plan
        )
        return self._scored(key, text, family, start, until, plan.error)

    def _known(
        self,
        key: str,
        what: str,
        source: Source,
        plan: Plan | None = None,
    ) -> None:
        if key in self._values:
            return
        known = self._kept.get(key) if self._kept else None
        if known is not None:
            self.cached += 1
            self._check_size(known, what)
            self._values[key] = known
            return
        scores = as_scores(self._called(what, source, plan), what)
        self.evaluations += 1
        self._check_size(scores, what)
        if self._kept and bool(torch.isfinite(scores).all()):
            problem = self._kept.try_put(key, scores, {"what": what})
            if problem:
                self.notes.append(f"Scores are not kept: {problem}")
                self._kept = None
        self._values[key] = scores

    def _called(self, what: str, source: Source, plan: Plan | None) -> Any:
        model = self._judging.model
        if self._takes_file:
            return self._on_file(what, source, plan)
        with self._stale_noticed():
            if model is None:
                subject: Any = dict(source({}))
                return self._run(what, subject)
            fill(model, source)
        if self._judging.data is not None and norm_layers(model):
            update_bn(model, self._judging.data)
        with restored_modes(model), restored_rng(model):
            model.eval()
            return self._run(what, model)

    def _on_file(self, what: str, source: Source, plan: Plan | None) -> Any:
        from polyak.checkpoints.writing.save import write_checkpoint

        with tempfile.TemporaryDirectory(prefix="polyak-") as folder:
            path = Path(folder) / "average.safetensors"
            with self._stale_noticed():
                if plan is not None:
                    self.trajectory.save(path, plan.profile, plan.until)
                else:
                    write_checkpoint(path, dict(source({})))
            if self._judging.model is not None and self._judging.data is not None:
                update_bn_file(path, self._judging.model, self._judging.data)
            return self._run(what, path)

    def _run(self, what: str, subject: Any) -> Any:
        limit = None if self._takes_file else self._judging.timeout
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
                f"The evaluation failed on {what}: {type(error).__name__}: {error} ({_place_of(error)}). "
                f"{self._continued()}"
            ) from error

    def _continued(self) -> str:
        if not self._kept:
            return "Its scores so far are not kept."
        done = self.evaluations + self.cached
        return f"{done} scores are kept: the same search continues after them."

    @contextmanager
    def _stale_noticed(self) -> Iterator[None]:
        """Say once for all averages that their BatchNorm statistics are not their own."""
        if self._stale:
            self._stale = False
            warn(
                "The averages are evaluated with the BatchNorm statistics of the newest interval, which are not "
                "theirs. Pass data= with training batches (and model=) to refresh them for each.",
                StaleStatistics,
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StaleStatistics)
            yield

    def _scored(
        self, key: str, text: str, family: str, start: float | None, until: float, error: float
    ) -> Scored:
        choosing, held = self._split(self._values[key])
        found = Scored(
            profile=text,
            family=family,
            start=start,
            until=until,
            score=float(choosing.mean()),
            held_out=None if held is None else float(held.mean()),
            error=error,
        )
        self._key_of[found] = key
        return found

    def _split(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The examples that choose, and those that are held out: the same ones for all averages."""
        held = _held_out(len(scores), self._judging.holdout) if scores.ndim else 0
        if not held:
            return scores, None
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
        return scores[order[held:]], scores[order[:held]]

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
        built = f"{type(model).__qualname__} {model}" if model is not None else ""
        data = data_identity(judging.data) if judging.data is not None else ""
        return known, built, data

    def _cache(self) -> KeptScores | None:
        cache, trajectory = self._judging.cache, self.trajectory
        if cache is False or (cache in (None, True) and trajectory.are_snapshots):
            return None
        if not self._identity:
            self.notes.append(
                "Scores are not kept: what this evaluation holds cannot be told from outside. Pass name= with a "
                "text that changes whenever it does, or a plain function of a module."
            )
            return None
        own = isinstance(cache, bool) or cache is None
        return KeptScores(trajectory.folder / FOLDER if own else Path(str(cache)))


def content_of(plan: Plan) -> str:
    """What an average is made of, wherever the record is: pieces that count, and the newest's buffers."""
    lines = [plan.unit]
    for index, piece in enumerate(plan.pieces):
        if piece.weight or index == len(plan.pieces) - 1:
            stat = piece.path.stat()
            lines.append(
                f"{piece.path.name} {piece.start!r} {piece.end!r} {piece.captures} {piece.weight!r} "
                f"{stat.st_size} {stat.st_mtime_ns}"
            )
    return "\n".join(lines)


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


def _place_of(error: BaseException) -> str:
    """Where it was raised: file and line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "unknown place"
