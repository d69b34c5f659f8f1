"""Three questions that a record answers: which average, what if decayed, when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.errors import ArgumentError, NonFiniteError, require
from polyak.maths.arguments import at_least_one, number
from polyak.maths.planning import RESOLVED
from polyak.maths.profiles import EMA, SWA, After, Annealed, PowerEMA, Profile
from polyak.maths.text import format_profile
from polyak.study.bootstrap import paired_bootstrap
from polyak.study.evaluator import Judging
from polyak.study.found import Comparison, Found, Scored
from polyak.study.judge import Judge
from polyak.study.trajectory import Trajectory
from polyak.study.windows import search_lengths, search_values, search_windows

FAMILIES = ("windows", "half-lives", "power", "annealed")
_QUICK = 5
_USUAL = 16
_VALUES = 16  # of half-lives and of power EMAs, in equal ratios


@dataclass(frozen=True)
class References:
    """What the best is compared with: the recipe's SWA and EMA, seen from the end, and the last iterate."""

    swa: Profile | str | None = None
    ema: Profile | str | None = None
    last: str | Path | Mapping[str, Tensor] | None = None


class Questions:
    """One record, judged by one evaluation."""

    def __init__(
        self, trajectory: Trajectory, judge: Judge, since: float | None, until: float | None
    ) -> None:
        self.trajectory, self.judge = trajectory, judge
        self.edges = _edges(trajectory, since, until)
        self.until = self.edges[-1]
        self.scored: list[Scored] = []

    def add(
        self, profile: Profile, until: float, family: str, start: float | None = None
    ) -> Scored | None:
        """Score an average once; None where it cannot be made."""
        found = self.judge.score(format_profile(profile), until, family, start)
        if found is not None and found not in self.scored:
            self.scored.append(found)
        return found

    def window(self, window: tuple[int, int]) -> float:
        """What to minimise of the mean between two edges; infinite where it has no score."""
        start, end = self.edges[window[0]], self.edges[window[1]]
        return self.judge.value(self.add(_mean_from(start), end, "windows", start))

    def windows(self, limit: int, *, quick: bool) -> None:
        """Search the means between edges."""
        search = search_lengths if quick else search_windows
        search(self.window, len(self.edges), limit)

    def half_lives(self) -> None:
        """Search EMAs."""
        span = self.until - self.trajectory.start
        values = _in_equal_ratios(0.01 * span, 0.5 * span)
        self._values(values, EMA.from_half_life, "half-lives")

    def power(self) -> None:
        """Search power EMAs."""
        self._values(_in_equal_ratios(0.02, 0.25), PowerEMA.from_relative_std, "power")

    def annealed(self) -> None:
        """The length by the shape sqrt, then cosine at that length; linear is the plain mean."""

        def value(window: tuple[int, int], shape: str = "sqrt") -> float:
            start = self.edges[window[0]]
            profile = _after(start, Annealed.from_shape(shape))
            return self.judge.value(self.add(profile, self.until, "annealed", start))

        known = search_lengths(value, len(self.edges), _QUICK)
        value(min(known, key=known.__getitem__), "cosine")

    def _values(
        self, values: Sequence[float], build: Callable[[float], Profile], family: str
    ) -> None:
        search_values(
            lambda value: self.judge.value(self.add(build(value), self.until, family)),
            values,
            _QUICK,
        )

    def best(self, among: Iterable[Scored]) -> Scored:
        """The one with the best finite score."""
        ranked = [one for one in among if not one.failed]
        if not ranked:
            why = "".join(f"\n  {note}" for note in self.judge.notes)
            raise NonFiniteError(
                f"None of the {len(self.scored)} averages has a score that is a finite number; check the "
                f"evaluation.{why}"
            )
        return min(ranked, key=self.judge.value)

    def references(self, given: References) -> dict[str, Scored]:
        """By name, those that can be made."""
        quarter = self.edges[round(0.75 * (len(self.edges) - 1))]
        found: dict[str, Scored | None] = {}
        if given.swa is None:
            name = "SWA of the last quarter"
            found[name] = self.judge.score(
                format_profile(_mean_from(quarter)), self.until, "windows", quarter
            )
        else:
            found["SWA"] = self.judge.score(given.swa, self.until, "reference")
        if given.ema is not None:
            found["EMA"] = self.judge.score(given.ema, self.until, "reference")
        if given.last is not None:
            found["the last iterate"] = self.judge.score_last(given.last)
        else:
            newest = _mean_from(self.edges[-2])
            name = "the last checkpoint" if self.trajectory.are_snapshots else "the last interval"
            found[name] = self.judge.score(
                format_profile(newest), self.until, "windows", self.edges[-2]
            )
        return {name: one for name, one in found.items() if one is not None}

    def comparison(self, one: Scored, other: Scored, what: str, against: str) -> Comparison:
        """One average minus another, on the held-out examples."""
        mine, theirs = self.judge.held_out(one), self.judge.held_out(other)
        same = self.judge.are_same(one, other)
        if mine is None or theirs is None:
            return Comparison(what, against, one.score - other.score, None, None, same)
        return Comparison(what, against, *paired_bootstrap(mine, theirs), same)

    def found(self, question: str, best: Scored, **rest: Any) -> Found:
        """The answer."""
        judge = self.judge
        return Found(
            question=question,
            best=best,
            scored=tuple(self.scored),
            minimize=judge.minimize,
            examples=judge.examples,
            evaluations=judge.evaluations,
            cached=judge.cached,
            unit=self.trajectory.unit,
            end=self.until,
            notes=(*self._remarks(), *dict.fromkeys(judge.notes)),
            **rest,
        )

    def _remarks(self) -> Iterable[str]:
        failed = [one for one in self.scored if one.failed]
        for one in failed:
            yield f"No finite score: {one.profile} at {one.until:g}"
        for path, why in self.trajectory.damaged.items():
            yield f"Left out: {path}: {why}"
        best = min(self.scored, key=self.judge.value)
        if best.error > RESOLVED:
            yield (
                f"{best.profile} is made with a planned error of {best.error:.2g}: the record does not resolve it, and "
                "what was evaluated is the average that it makes of it"
            )
        if self.judge.examples is None:
            yield self.judge.why_no_interval("average")


def search(  # noqa: PLR0913 - keyword-only arguments do not count
    trajectory: Trajectory,
    evaluate: Callable[..., Any],
    *,
    evaluations: int | None = None,
    quick: bool = False,
    families: Sequence[str] = ("windows",),
    since: float | None = None,
    until: float | None = None,
    swa: Profile | str | None = None,
    ema: Profile | str | None = None,
    last: str | Path | Mapping[str, Tensor] | None = None,
    **judging: Any,
) -> Found:
    """Which average is best; see `Trajectory.search`."""
    require(
        not isinstance(families, str) and bool(families) and set(families) <= set(FAMILIES),
        f"families is {families!r}; expected some of {', '.join(FAMILIES)}.",
    )
    if isinstance(last, Mapping):  # most likely the model's own tensors, which are about to change
        last = {name: tensor.detach().clone() for name, tensor in last.items()}
    limit = (_QUICK if quick else _USUAL) if evaluations is None else evaluations
    at_least_one("evaluations", limit)
    ask = asked(trajectory, evaluate, since, until, judging)
    with ask.judge.at_work():
        if "windows" in families:
            ask.windows(limit, quick=quick)
        others = {"half-lives": ask.half_lives, "power": ask.power, "annealed": ask.annealed}
        for family in families:
            others.get(family, lambda: None)()
        references = ask.references(References(swa, ema, last))
        known = [one for name, one in references.items() if name != "the last iterate"]
        best = ask.best(
            [*ask.scored, *known]
        )  # a reference is an average of the record like others
        comparisons = [
            ask.comparison(best, other, "best", name) for name, other in references.items()
        ]
    answers = [
        ask.best(group) for f in families if (group := [s for s in ask.scored if s.family == f])
    ]
    return ask.found(
        "search",
        best,
        answers=tuple(answers),
        references=references,
        comparisons=tuple(comparisons),
    )


def decay(  # noqa: PLR0913
    trajectory: Trajectory,
    evaluate: Callable[..., Any],
    *,
    points: int = 8,
    length: float | None = None,
    shape: str = "sqrt",
    since: float | None = None,
    until: float | None = None,
    **judging: Any,
) -> Found:
    """What if I had decayed from here; see `Trajectory.decay`."""
    ask = asked(trajectory, evaluate, since, until, judging)
    first = ask.edges[0]
    if length is None:
        length = (ask.until - first) / 8
    require(
        0 < number("length", length) <= ask.until - first,
        f"length is {length:g}; expected the length of the decay, at most the {ask.until - first:g} "
        f"{trajectory.unit} that are searched.",
    )
    answers = []
    with ask.judge.at_work():
        for end in ends_of(ask.edges, points):
            start = _nearest(ask.edges, end - length)
            if end - length < first - 1e-9 or start >= end:
                continue
            profile = _after(start, Annealed.from_shape(shape))
            if (found := ask.add(profile, end, "annealed", start)) is not None:
                answers.append(found)
        return _along(ask, "decay", answers, ask.best(answers))


def stop(
    trajectory: Trajectory,
    evaluate: Callable[..., Any],
    *,
    points: int = 8,
    evaluations: int = 4,
    since: float | None = None,
    until: float | None = None,
    **judging: Any,
) -> Found:
    """When could I have stopped; see `Trajectory.stop`."""
    at_least_one("evaluations", evaluations)
    ask = asked(trajectory, evaluate, since, until, judging)
    answers = []
    with ask.judge.at_work():
        for end in ends_of(ask.edges, points):
            at = ask.edges.index(end)
            search_lengths(ask.window, len(ask.edges), evaluations, at)
            ended = [one for one in ask.scored if one.until == end and not one.failed]
            if ended:
                answers.append(ask.best(ended))
        last = ask.best(answers[-1:])
        worse = [i for i, one in enumerate(answers) if not _would_do(ask, one, last)]
        # One early end that is not shown to be worse may be luck: all later ones have to do as well.
        return _along(ask, "stop", answers, answers[worse[-1] + 1 if worse else 0])


def _would_do(ask: Questions, one: Scored, last: Scored) -> bool:
    """Whether it is as good as the last: not shown to be worse, or, of single numbers, not worse."""
    found = ask.comparison(one, last, "", "")
    low, high = (found.difference if b is None else b for b in (found.low, found.high))
    return low <= 0 if ask.judge.minimize else high >= 0


def _along(ask: Questions, question: str, answers: Sequence[Scored], best: Scored) -> Found:
    last = answers[-1]
    comparisons = [
        ask.comparison(one, last, f"{one.until / ask.until:.0%} of the run", "all of it")
        for one in answers[:-1]
    ]
    return ask.found(
        question, best, answers=tuple(answers), references={}, comparisons=tuple(comparisons)
    )


def asked(
    trajectory: Trajectory,
    evaluate: Callable[..., Any],
    since: float | None,
    until: float | None,
    judging: dict[str, Any],
) -> Questions:
    """A record with its judge, between two moments."""
    check_options(judging)
    edges = _edges(trajectory, since, until)
    require(
        len(edges) >= 3,
        f"There are {len(edges) - 1} intervals from {edges[0]:g} to {edges[-1]:g} {trajectory.unit}; a search "
        "needs at least 2. Record shorter intervals.",
    )
    return Questions(trajectory, Judge(trajectory, evaluate, Judging(**judging)), since, until)


def check_options(judging: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a name that is no option of `Judging`."""
    names = set(Judging.__dataclass_fields__)
    unknown = sorted(judging.keys() - names)
    require(
        not unknown,
        f"There is no option {', '.join(unknown)}; expected some of {', '.join(sorted(names))}.",
    )


def _edges(trajectory: Trajectory, since: float | None, until: float | None) -> list[float]:
    """The edges between the two moments, which are moved to the nearest ones."""
    every = trajectory.edges
    low = every[0] if since is None else _within(trajectory, "since", since)
    high = every[-1] if until is None else _within(trajectory, "until", until)
    low, high = _nearest(every, low), _nearest(every, high)
    if low >= high:
        raise ArgumentError(
            f"since is {since} and until {until}; no interval of the record is between them. Its edges are "
            f"{', '.join(f'{t:g}' for t in every[:3])}, ..., {every[-1]:g} {trajectory.unit}."
        )
    return [t for t in every if low <= t <= high]


def _within(trajectory: Trajectory, name: str, moment: float) -> float:
    edges = trajectory.edges
    first = edges[0] if name == "since" else edges[1]
    require(
        first <= number(name, moment) <= edges[-1],
        f"{name} is {moment:g}; the record is from {first:g} to {edges[-1]:g} {trajectory.unit}. Choose a "
        "moment in it.",
    )
    return float(moment)


def ends_of(edges: Sequence[float], points: int) -> list[float]:
    """So many of the edges, the last among them, evenly spread."""
    at_least_one("points", points)
    count = len(edges) - 1
    marks = sorted({max(1, round(count * i / points)) for i in range(1, points + 1)})
    return [edges[mark] for mark in marks]


def _nearest(edges: Sequence[float], moment: float) -> float:
    return min(edges, key=lambda t: abs(t - moment))


def _mean_from(start: float) -> Profile:
    return _after(start, SWA())


def _after(start: float, profile: Profile) -> Profile:
    return After(start, profile) if start > 0 else profile


def _in_equal_ratios(low: float, high: float) -> list[float]:
    ratio = math.log(high / low) / (_VALUES - 1)
    return [float(f"{low * math.exp(i * ratio):.3g}") for i in range(_VALUES)]
