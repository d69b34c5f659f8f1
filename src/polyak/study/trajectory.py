"""`Trajectory`: any average of a run, made from its record after the run."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyak.checkpoints.intervals import Interval, refuse_mixed, scan_intervals, the_record
from polyak.checkpoints.merging.options import parse_bytes
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.errors import ArgumentError, FormatError, require
from polyak.files import as_path
from polyak.maths.arguments import number
from polyak.maths.pieces import piece_weights, since
from polyak.maths.planning import (
    Span,
    effective_captures,
    interval_weights,
    planned_error,
    smallest_resolved_age,
)
from polyak.maths.profiles import Profile
from polyak.maths.text import as_profile, profile_text
from polyak.study.means import MeanTree
from polyak.study.plan import Piece, Plan, key_of

if TYPE_CHECKING:
    from polyak.checkpoints.merging.average import MergeResult
    from polyak.checkpoints.merging.weights import OutputWeights
    from polyak.study.found import Found

PathLike = str | os.PathLike[str]
_MISSING = 1e-4  # of an average may be from intervals that are not there


class Trajectory:
    r"""The record of a run, from which any average is made: any profile, seen from any moment.

    Each interval $(a_k, b_k]$ gets the share that the profile gives that stretch of training,
    $c_k = F(b_k, t) - F(a_k, t)$: never negative, their sum is 1. Windows on edges are exact but for
    the captures; `plan` says what the rest costs before anything is read.

    Args:
        folder: what a `polyak.Recorder` has written, finished or not; or the folder of a run that holds one
            such folder, up to three levels down.
        cache_size: what the means of 2, 4, 8, ... intervals may take, which are kept in a hidden folder
            there as windows need them; bytes or text like "2GB", 0 for none. By default as much as
            2 log2(K) of the K intervals; none of a record in bfloat16.

    Raises:
        ArgumentError: no such folder, or one without recorded intervals, or with several records.
        MismatchError: intervals of several records, or of different models.

    `damaged` maps files that cannot be used to the reason, `missing` lists the stretches without a file:
    averages that do not need them work all the same.

    >>> import tempfile, torch, polyak
    >>> model, folder = torch.nn.Linear(1, 1), tempfile.mkdtemp()
    >>> with polyak.Recorder(model, folder, interval=10) as recorder:
    ...     for value in range(30):
    ...         _ = torch.nn.init.constant_(model.weight, value)
    ...         recorder.update()
    >>> trajectory = polyak.Trajectory(folder)
    >>> trajectory.plan(polyak.Window(10), until=20).weights
    (0.0, 1.0)
    >>> trajectory.average(polyak.Window(10), until=20)["weight"]
    tensor([[14.5000]])

    """

    def __init__(self, folder: PathLike, *, cache_size: int | str | None = None) -> None:
        self.folder = the_record(as_path(folder))
        found = scan_intervals(self.folder)
        if not found.intervals:
            why = "".join(f"\n  {path}: {reason}" for path, reason in found.damaged.items())
            raise ArgumentError(
                f"{self.folder} holds no recorded intervals; expected interval-<k>.safetensors, which "
                f"polyak.Recorder writes. For checkpoints use Trajectory.from_checkpoints.{why}"
            )
        self.intervals = found.intervals
        self.damaged = dict(found.damaged)
        self.are_snapshots = False
        refuse_mixed(self.intervals)
        self._cache_bytes = _cache_bytes(cache_size, self.intervals)

    @classmethod
    def from_checkpoints(cls, inputs: Iterable[PathLike], *, key: str | None = None) -> Trajectory:
        """The checkpoints of a run as a trajectory: folders, globs and files, as `select_checkpoints`.

        Each stands for the time around it under a streaming profile that is `centred` (EMA, PowerEMA), and
        for the interval before it under SWA (which counts them equally), Window and Annealed: the weights
        of `average_checkpoints`. Time is in training steps, in captures where the steps are unknown.
        """
        from polyak.checkpoints.merging.selection import select_checkpoints

        self = cls.__new__(cls)
        with ExitStack() as stack:
            opened = select_checkpoints(inputs, key=key)
            for one in opened:
                stack.enter_context(one)
            self.intervals = tuple(_snapshots(opened, key))
        self.folder, self.damaged, self.are_snapshots = Path(), {}, True
        self._cache_bytes = 0
        return self

    @property
    def unit(self) -> str:
        """What time is counted in."""
        return self.intervals[0].unit

    @property
    def start(self) -> float:
        """Where time begins."""
        return self.intervals[0].start if self.are_snapshots else 0.0

    @property
    def end(self) -> float:
        """The last moment that is recorded."""
        return self.intervals[-1].end

    @property
    def edges(self) -> tuple[float, ...]:
        """The moments between which intervals are: windows that begin and end there are exact."""
        return tuple(sorted({t for one in self.intervals for t in (one.start, one.end)}))

    @property
    def missing(self) -> tuple[tuple[float, float], ...]:
        """Stretches of time of which there is no usable file."""
        ends = [self.start, *(one.end for one in self.intervals)]
        starts = [one.start for one in self.intervals]
        return tuple((a, b) for a, b in zip(ends, starts, strict=False) if b > a)

    def plan(self, profile: Profile | str, until: float | None = None) -> Plan:
        """What the average of this profile, seen from `until`, is made of, and its planned error.

        until: in `unit`; the end of the record by default. Inside an interval the profile's share of the
        part before it goes to the mean of the whole interval; a note says what that costs.

        Raises ArgumentError for a moment outside the record or a profile that is empty then, FormatError
        if it needs an interval that is missing or damaged.
        """
        profile = as_profile(profile)
        until = self._checked(until)
        used = tuple(one for one in self.intervals if one.start < until)
        if self.are_snapshots:
            used = tuple(one for one in used if one.end <= until) or used[:1]
            until = used[-1].end
        weights = self._weights(profile, used, until)
        spans = [self._from_start(one.span) for one in used]
        now = until - self.start
        relative = since(profile, self.start) if self.are_snapshots else profile
        pieces = zip(used, weights, strict=True)
        age = math.fsum(w * (until - one.span.mean_time) for one, w in pieces)
        error = planned_error(relative, spans, weights, now)
        return Plan(
            profile=profile,
            unit=self.unit,
            until=until,
            pieces=tuple(
                Piece(one.path, one.start, one.end, one.captures, w)
                for one, w in zip(used, weights, strict=True)
            ),
            error=error,
            effective_samples=effective_captures(spans, weights),
            mean_age=age,
            notes=tuple(self._notes(profile, spans, until, error)),
            key=key_of(used, weights),
        )

    def average(
        self,
        profile: Profile | str,
        until: float | None = None,
        *,
        dtype: str | torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """The state dict of the average; ties under all their names. Arguments and errors as for `plan`.

        dtype: of floating tensors; by default that of the record, float32 for one in bfloat16.
        """
        plan = self.plan(profile, until)
        found = dict(self.tensors(plan, dtype=dtype))
        with self.intervals[len(plan.pieces) - 1].open() as newest:
            ties = newest.ties
        return found | {alias: found[name] for alias, name in ties.items()}

    def tensors(
        self,
        plan: Plan,
        *,
        dtype: str | torch.dtype | None = None,
        into: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a planned average one by one, (name, tensor); tied names once.

        dtype, errors: as for `average`. One tensor is in memory at a time, if the caller keeps none.
        into: tensors by name in whose memory the average is made, as for `iter_averaged_tensors`.
        """
        from polyak.checkpoints.merging.average import iter_averaged_tensors

        with self._opened([plan]) as (inputs, (weights,)):
            yield from iter_averaged_tensors(inputs, weights, dtype=self._dtype(dtype), into=into)

    def save(
        self,
        outputs: PathLike | Mapping[PathLike, Profile | str],
        profile: Profile | str | None = None,
        until: float | None = None,
        **options: Any,
    ) -> MergeResult:
        """Write averages to files; each piece is read once for all of them, in bounded memory.

        Args:
            outputs: One path, with `profile`; or a mapping of path -> profile. Formats and the options
                (`dtype`, `overwrite`, `max_memory`, `threads`, `include`, ...) are those of
                `average_checkpoints`.
            profile: As for `plan`.
            until: As for `plan`, for all of them.
            options: Those of `average_checkpoints`.

        Raises what `plan` and `average_checkpoints` raise. BatchNorm statistics are those of the newest
        piece, which a StaleStatistics warning says.

        """
        from polyak.checkpoints.merging.average import average_checkpoints

        wanted = _wanted(outputs, profile)
        plans = [self.plan(one, until) for one in wanted.values()]
        options["dtype"] = self._dtype(options.get("dtype"))
        with self._opened(plans) as (inputs, weights):
            return average_checkpoints(inputs, dict(zip(wanted, weights, strict=True)), **options)

    def search(self, evaluate: Callable[..., Any], **options: Any) -> Found:
        """Which average of the record is best: windows of a 4 by 4 grid, then golden section on both ends.

        Args:
            evaluate: A function of the model that holds an average, or of the state dict where no `model` is
                given. It returns a number, or a 1-D tensor with one score per example: then the average is
                chosen on one part of them and compared on the other, with an interval. For a classifier:
                `polyak.study.ScaledNLL(batches)`.
            options: Any of the following.
            model: The model to evaluate, in evaluation mode; it gets its own weights back.
            data: Training batches, to refresh the model's BatchNorm statistics for each average.
            minimize, maximize: One is True, unless the function has the name of a known metric.
            evaluations: Of windows, 16; those known from before are free, references are on top.
            quick: 5 windows that end at the end.
            families: Some of "windows" (by default), "half-lives", "power", "annealed"; 5 or 6 each.
            since, until: Search this part of the record.
            swa, ema, last: What the best is compared with: profiles, and a file or state dict of the last
                iterate. By default the mean of the last quarter, and the last interval.
            holdout: The share of the examples that is kept for the comparison, 0.5.
            cache: A folder for scores, by default one in the record; False for none.
            name: What tells this evaluation from others where its code does not: a closure, an object.
            timeout: Seconds for one evaluation.

        Raises:
            ArgumentError: An option outside its domain; the direction is not known; a result that is neither a
                number nor a 1-D tensor, or of another length than before.
            MismatchError: The record is not one of `model`.
            NonFiniteError: No average has a finite score.
            UsageError: The evaluation failed or took too long; scores so far are kept.

        >>> import tempfile, torch, polyak
        >>> model, folder = torch.nn.Linear(1, 1), tempfile.mkdtemp()
        >>> with polyak.Recorder(model, folder, interval=10) as recorder:
        ...     for step in range(80):
        ...         _ = torch.nn.init.constant_(model.weight, step)
        ...         recorder.update()
        >>> trajectory = polyak.Trajectory(folder)
        >>> found = trajectory.search(lambda state: float((state["weight"] - 44.5).abs()), minimize=True)
        >>> found.best.profile, found.best.until, found.best.score
        ('swa:start=10', 80.0, 0.0)

        """
        from polyak.study.search import search

        return search(self, evaluate, **options)

    def decay(self, evaluate: Callable[..., Any], **options: Any) -> Found:
        """What if I had decayed the learning rate from here: averages of the shape of a decay, at several ends.

        Such an average (WSM) came within 0.2 points of the error of a real decay in our runs, 2 points nearer
        than the iterate; its loss is lower than the decay's, and in the same order.

        Arguments and errors as for `search`, without references, quick and families; and `points`, how many
        ends (8), `length` of the decay (by default an eighth of the record), `shape` (sqrt, linear, cosine).
        """
        from polyak.study.search import decay

        return decay(self, evaluate, **options)

    def stop(self, evaluate: Callable[..., Any], **options: Any) -> Found:
        """When could I have stopped: the best average that ends at each of several points of the run.

        The answer, `best`, is the earliest from which on none is shown to be worse than that at the end.

        Arguments and errors as for `search`, without references, quick and families; and `points`, how many
        ends (8), `evaluations` for each (4).
        """
        from polyak.study.search import stop

        return stop(self, evaluate, **options)

    def swad(self, evaluate: Callable[..., Any], **options: Any) -> Found:
        """The window that SWAD would have averaged; see `polyak.study.swad`."""
        from polyak.study.steered import swad

        return swad(self, evaluate, **options)

    def two_tailed(self, evaluate: Callable[..., Any], **options: Any) -> Found:
        """What two-tailed averaging would have ended with; see `polyak.study.two_tailed`."""
        from polyak.study.steered import two_tailed

        return two_tailed(self, evaluate, **options)

    def __repr__(self) -> str:
        return (
            f"Trajectory({str(self.folder)!r}, {len(self.intervals)} intervals, {self.start:g} to "
            f"{self.end:g} {self.unit})"
        )

    def _weights(
        self, profile: Profile, used: Sequence[Interval], until: float
    ) -> tuple[float, ...]:
        """They sum to 1."""
        if self.are_snapshots:
            return tuple(piece_weights(profile, [one.end for one in used]).tolist())
        if until <= profile.start:
            raise ArgumentError(
                f"{profile_text(profile)} is empty at {until:g}: it starts at {profile.start:g}. Start earlier, "
                "or choose a later moment."
            )
        weights = interval_weights(profile, [one.span for one in used], until)
        self._refuse_missing(profile, until, 1 - float(weights.sum()))
        return tuple((weights / weights.sum()).tolist())

    def _refuse_missing(self, profile: Profile, until: float, lost: float) -> None:
        if lost <= _MISSING:
            return
        gaps = [(a, min(b, until)) for a, b in self.missing if a < until]
        if until > self.end:
            gaps.append((self.end, until))
        needed = [f"{a:g} to {b:g}" for a, b in gaps if profile.interval_mass(a, b, until) > 0]
        damaged = "".join(f"\n  {path}: {why}" for path, why in self.damaged.items())
        raise FormatError(
            f"{profile_text(profile)} at {until:g} {self.unit} needs {lost:.2g} of its weight from intervals that "
            f"are missing: {', '.join(needed)}. Restore them, or choose another moment or profile.{damaged}"
        )

    def _checked(self, until: float | None) -> float:
        if until is None:
            return self.end
        moment = float(number("until", until))
        first = self.intervals[0].end if self.are_snapshots else self.start
        inside = first <= moment <= self.end if self.are_snapshots else first < moment <= self.end
        require(
            inside,
            f"until is {until}; the record is from {first:g} to {self.end:g} {self.unit}. Choose a "
            "moment in it.",
        )
        return moment

    def _notes(
        self, profile: Profile, spans: Sequence[Span], until: float, error: float
    ) -> Iterator[str]:
        if self.are_snapshots:
            return
        last = self.intervals[len(spans) - 1]
        if until < last.end:
            edges = [t for t in (last.start, last.end) if t > max(self.start, profile.start)]
            costs = [f"{self.plan(profile, t).error:.2g} at {t:,g}" for t in edges]
            yield (
                f"{until:,g} is inside the interval from {last.start:,g} to {last.end:,g}, whose mean "
                f"stands for the part before it: planned error {error:.2g}, on the edges "
                f"{' and '.join(costs)}"
            )
        age = smallest_resolved_age(spans, spans[-1].end)
        if math.isinf(age):
            yield "no EMA is resolved by this record at this moment"
        else:
            yield (
                f"EMAs with a mean age below {age / until:.1%} of the time so far ({age:,.3g} {self.unit}) are "
                "not resolved by this record"
            )

    def _from_start(self, span: Span) -> Span:
        return Span(span.start - self.start, span.end - self.start, span.captures)

    def _dtype(self, asked: Any) -> Any:
        narrow = any(one.narrow for one in self.intervals) and not self.are_snapshots
        return "float32" if asked is None and narrow else asked

    @contextmanager
    def _opened(
        self, plans: Sequence[Plan]
    ) -> Iterator[tuple[list[Checkpoint], list[OutputWeights]]]:
        """What to read, and the weights of each output; the newest, whose buffers count, is last."""
        from polyak.checkpoints.merging.weights import OutputWeights

        if len(plans) == 1 and self._cache_bytes:
            tree = MeanTree(self.folder, self.intervals, self._cache_bytes)
            sources = tree.sources(plans[0].weights)
            files = [one.interval for one in sources]
            rows = [[one.weight for one in sources]]
        else:
            kept = [k for k in range(len(plans[0].pieces)) if any(p.weights[k] for p in plans)]
            files = [self.intervals[k] for k in kept]
            rows = [[plan.weights[k] for k in kept] for plan in plans]
        newest = self.intervals[len(plans[0].pieces) - 1]
        if not files or files[-1].path != newest.path:
            files = [*files, newest]
            rows = [[*row, 0.0] for row in rows]
        with ExitStack() as stack:
            opened = [stack.enter_context(one.open()) for one in files]
            for index, one in enumerate(opened):
                one.step = index  # the order that they are in
            yield (
                opened,
                [
                    OutputWeights(
                        tuple(row), profile_text(plan.profile), plan.unit, self._said(plan)
                    )
                    for row, plan in zip(rows, plans, strict=True)
                ],
            )

    def _said(self, plan: Plan) -> dict[str, str]:
        """What an output says about itself."""
        from polyak.version import __version__

        said = {
            "polyak": __version__,
            "profile": profile_text(plan.profile),
            "unit": plan.unit,
            "time": repr(plan.until),
            "count": str(sum(one.captures for one in plan.pieces if one.weight)),
            "sum_squared_shares": repr(1 / plan.effective_samples),
            "trajectory": plan.key,
            "planned_error": f"{plan.error:.3g}",
        }
        return said | ({"step": str(round(plan.until))} if plan.unit == "steps" else {})


def _cache_bytes(given: int | str | None, intervals: Sequence[Interval]) -> int:
    wanted = 0 if str(given) == "0" else None if given is None else parse_bytes(given, "cache_size")
    if any(one.narrow for one in intervals):
        return 0  # means in bfloat16 would lose what the carry has kept
    largest = max(one.nbytes for one in intervals)
    default = math.ceil(2 * math.log2(max(len(intervals), 2))) * largest
    return default if wanted is None else wanted


def _wanted(
    outputs: PathLike | Mapping[PathLike, Profile | str], profile: Profile | str | None
) -> dict[PathLike, Profile | str]:
    if isinstance(outputs, Mapping):
        require(
            profile is None, f"outputs names a profile per path; leave out profile={profile!r}."
        )
        require(bool(outputs), "There is nothing to write: no output was given.")
        return dict(outputs)
    as_path(outputs)
    if profile is None:
        raise ArgumentError("save() needs a profile, such as polyak.EMA.from_half_life(3000).")
    return {outputs: profile}


def _snapshots(opened: Sequence[Checkpoint], key: str | None) -> Iterator[Interval]:
    known = all(one.step is not None for one in opened)
    times = [float(one.step or 0) if known else i + 1.0 for i, one in enumerate(opened)]
    if any(b <= a for a, b in itertools.pairwise(times)):
        raise ArgumentError(
            f"A trajectory needs checkpoints of different training steps; found {times}."
        )
    unit = "steps" if known else "captures"
    before = 2 * times[0] - times[1] if len(times) > 1 else times[0] - 1
    for index, (one, at) in enumerate(zip(opened, times, strict=True)):
        span, before = Span(before, at), at
        nbytes = sum(file.size for file in one.files)
        yield Interval(Path(one.path), index, span, unit, "", 1.0, nbytes, key=key)
