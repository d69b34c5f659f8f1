"""Windows of a record that a rule chooses as the run goes on: SWAD, and two-tailed averaging."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from polyak.errors import ArgumentError, FormatError, NonFiniteError
from polyak.maths.overfit_window import OverfitWindow
from polyak.study.found import Found, Scored
from polyak.study.search import Questions, References, asked, ends_of
from polyak.study.trajectory import Trajectory


def swad(  # noqa: PLR0913 - keyword-only arguments do not count
    trajectory: Trajectory,
    evaluate: Callable[..., Any],
    *,
    n_start: int = 3,
    n_end: int = 6,
    tolerance: float = 1.3,
    since: float | None = None,
    until: float | None = None,
    **judging: Any,
) -> Found:
    """The window that SWAD would have averaged: each interval of the record is scored once, in order.

    An interval's mean (of checkpoints, the checkpoint) stands for the weights that a live SWAD scores. The window goes
    from the beginning of the interval at which it begins to the end of that at which it ends; see `OverfitWindow` for
    the rule. `best` is its average, compared with the mean of the last quarter and the last interval; if no window has
    begun it is the last interval, and a note says so.

    Args:
        trajectory: The record.
        evaluate: As for `Trajectory.search`: a loss, lower is better and above 0.
        n_start: The loss has to be the lowest of so many, itself first, to begin the window.
        n_end: So many losses in a row above the threshold end it.
        tolerance: The threshold, as a factor of the mean of the `n_start` losses.
        since: Begin here.
        until: End here.
        judging: The other options of `Trajectory.search`.

    Raises what `Trajectory.search` raises, and ArgumentError for scores of which more is better, or that are not
    positive.

    """
    rule = OverfitWindow(n_start, n_end, tolerance)
    ask = asked(trajectory, evaluate, since, until, judging)
    if not ask.judge.minimize:
        raise ArgumentError(
            "SWAD needs a loss, and more of what is evaluated is better. Evaluate a loss, with minimize=True."
        )
    losses: dict[int, float] = {}  # by the number of the interval; missing ones have none
    with ask.judge.at_work():
        for k in range(len(ask.edges) - 1):
            loss = ask.window((k, k + 1))
            if _scored(ask, k, k) is not None:
                losses[k] = loss
            if rule.of([*losses.values()])[1] is not None:
                break
        numbers, (start, end) = list(losses), rule.of([*losses.values()])
        last = numbers[-1] if end is None else numbers[end]
        best = _window(ask, last if start is None else numbers[start], last)
        if start is None:
            ask.judge.notes.append(
                f"No loss was the lowest of {n_start}, itself first: SWAD's window never began"
            )
        elif end is None:
            ask.judge.notes.append("SWAD's window had not ended when the record did")
        return _answer(ask, "swad", best, (best,))


def two_tailed(
    trajectory: Trajectory,
    evaluate: Callable[..., Any],
    *,
    points: int = 16,
    since: float | None = None,
    until: float | None = None,
    **judging: Any,
) -> Found:
    """The average that two-tailed averaging would have ended with: two windows are scored at several moments.

    Both end at the moment. Where the short one is at least as good, it becomes the long one, and a new short one
    begins there. `best` is the last long one; `answers` are the long ones at each moment. At most two evaluations
    for each. Source: Melis 2022, arXiv 2209.12581, algorithm 1.

    Args:
        trajectory: The record.
        evaluate: As for `Trajectory.search`.
        points: At how many moments.
        since: Begin here.
        until: End here.
        judging: The other options of `Trajectory.search`.

    Raises what `Trajectory.search` raises.

    """
    ask = asked(trajectory, evaluate, since, until, judging)
    long = short = 0
    answers = []
    with ask.judge.at_work():
        for moment in ends_of(ask.edges, points):
            at = ask.edges.index(moment)
            scores = [ask.window((start, at)) for start in (short, long)]
            if scores[0] <= scores[1]:
                long, short = short, at
            answers.append(_window(ask, long, at - 1))
        return _answer(ask, "two_tailed", answers[-1], tuple(answers))


def _window(ask: Questions, first: int, last: int) -> Scored:
    """The mean of these intervals, both included, which has to have a score."""
    value, found = ask.window((first, last + 1)), _scored(ask, first, last)
    if found is None:
        why = "".join(f"\n  {note}" for note in ask.judge.notes)
        raise FormatError(
            f"The window from {ask.edges[first]:g} to {ask.edges[last + 1]:g} that the rule chooses cannot be "
            f"made: intervals are missing.{why}"
        )
    if math.isinf(value):
        raise NonFiniteError(
            f"{found.profile} at {found.until:g}, which the rule chooses, has the score {found.score}. Check the "
            "evaluation."
        )
    return found


def _scored(ask: Questions, first: int, last: int) -> Scored | None:
    start, end = ask.edges[first], ask.edges[last + 1]
    return next((s for s in ask.scored if s.start == start and s.until == end), None)


def _answer(ask: Questions, question: str, best: Scored, answers: tuple[Scored, ...]) -> Found:
    references = ask.references(References())
    comparisons = tuple(
        ask.comparison(best, other, "it", name) for name, other in references.items()
    )
    return ask.found(
        question, best, answers=answers, references=references, comparisons=comparisons
    )
