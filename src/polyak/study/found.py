"""What a question to a record found: plain values, and a table when printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from polyak.maths.numbers import decimals, difference, for_terminal, rounded

QUESTIONS = {
    "search": "Which average is best",
    "decay": "What if I had decayed from here",
    "stop": "When could I have stopped",
    "swad": "Where SWAD averages",
    "two_tailed": "Where two-tailed averaging ends",
}


@dataclass(frozen=True)
class Scored:
    """An average of the record that was evaluated.

    profile: as `Trajectory.average` takes it, with `until`. family: windows, half-lives, power, annealed,
    or reference. start: of windows and annealed ones, where they begin. score: on the examples that choose,
    NaN where the evaluation returned one. held_out: on the others; None for a single number. error: the
    planned error of the average.
    """

    profile: str
    family: str
    start: float | None
    until: float
    score: float
    held_out: float | None
    error: float

    @property
    def failed(self) -> bool:
        """Whether its score is not a finite number; it is never chosen."""
        return not math.isfinite(self.score)


@dataclass(frozen=True)
class Comparison:
    """One average minus another on the held-out examples, with a paired 95% bootstrap interval.

    low, high: None where no examples were held out (one number has none); the difference is then that on
    the data that chose, where the best flatters itself. same: they are made of the same files with the same
    weights, so there is nothing to compare.
    """

    what: str
    against: str
    difference: float
    low: float | None
    high: float | None
    same: bool = False

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval holds 0; None if there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        if self.same:
            return f"{self.what} and {self.against} are one and the same average"
        text = f"{self.what} minus {self.against}: "
        if self.low is None or self.high is None:
            shown = rounded(self.difference, decimals(self.difference, 2), signed=True)
            text += f"{shown} on the data that chose it, so without an interval"
        elif self.low == self.high == self.difference == 0:
            text += "no difference on any example"
        else:
            value, low, high, holds_0 = difference(self.difference, self.low, self.high)
            text += f"{value}, 95% interval {low} to {high}{', within noise' if holds_0 else ''}"
        return for_terminal(text)


@dataclass(frozen=True)
class Found:
    """The answer to a question about a record; `print(found)` shows it as a table.

    question: search, decay, stop, swad or two_tailed. best: of `stop` the earliest end that would have done, of the others
    the best score. scored: everything that was evaluated, in order. references: the recipe's SWA and EMA
    and the last iterate, as asked for. comparisons: the best minus each of them; of `stop` each end minus
    the whole run. minimize: whether lower is better. examples: how many chose and how many were held
    out; None for a single number. evaluations: how many were run, cached: how many more were known.
    end: where the record ends, in `unit`. notes: what to know.
    """

    question: str
    best: Scored
    answers: tuple[Scored, ...]
    scored: tuple[Scored, ...]
    references: dict[str, Scored]
    comparisons: tuple[Comparison, ...]
    minimize: bool
    examples: tuple[int, int] | None
    evaluations: int
    cached: int
    unit: str
    end: float
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [["", "begins", "ends", "of the run", "score", "held out", "planned error"]]
        shown = {one: name for name, one in self.references.items()}
        for one in [*self.scored, *(r for r in shown if r not in self.scored)]:
            name = "best" if one == self.best else shown.get(one, "")
            rows.append([name, *_cells(one, self.end, score_decimals(self)), one.profile])
        title = f"{QUESTIONS[self.question]} ({'lower' if self.minimize else 'higher'} is better)"
        plural = "" if self.evaluations == 1 else "s"
        counted = f"{self.evaluations} evaluation{plural}, {self.cached} more were known"
        lines = [title, *_aligned(rows), *self._answer(), counted, *self.notes]
        return for_terminal("\n".join(lines))

    def _answer(self) -> list[str]:
        best = self.best
        score = rounded(best.score, score_decimals(self))
        lines = [f"Best: {best.profile} at {best.until:,g} {self.unit}, score {score}"]
        if self.question in ("swad", "two_tailed"):
            lines = [
                f"Chosen by the rule: {best.profile} at {best.until:,g} {self.unit}, score {score}"
            ]
        if self.question == "stop":
            lines = [
                f"Earliest that would have done: {best.until / self.end:.0%} of the run, {best.profile} at "
                f"{best.until:,g} {self.unit}"
            ]
        if self.examples:
            lines.append(
                f"Chosen on {self.examples[0]:,} examples, compared on {self.examples[1]:,} others:"
            )
        return [*lines, *(f"  {one}" for one in self.comparisons)]


def score_decimals(found: Found) -> int:
    """All scores have as many decimals, so that they can be compared: five digits of the best."""
    return decimals(found.best.score, 5)


def _cells(one: Scored, end: float, digits: int) -> list[str]:
    begins = "" if one.start is None else f"{one.start:,g}"
    held = "" if one.held_out is None else rounded(one.held_out, digits)
    return [
        begins, f"{one.until:,g}", f"{one.until / end:.0%}", rounded(one.score, digits), held, f"{one.error:.2g}",
    ]  # fmt: skip


def _aligned(rows: Sequence[list[str]]) -> list[str]:
    rows = [row if len(row) == 8 else [*row, ""] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)]
            + [row[-1]]
        ).rstrip()
        for row in rows
    ]
