"""What a soup was made of and what it is worth: plain values, and a table when printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyak.maths.numbers import for_terminal, rounded, shared_decimals
from polyak.study.found import Comparison

METHODS = ("greedy", "uniform", "learned", "model-stock")


@dataclass(frozen=True)
class SoupPlan:
    """What will be done at most, before it begins.

    evaluations: how many. bytes_read: of the ingredients. bytes_written: of the output. bytes_beside: of files
    beside the output that go again.
    """

    method: str
    ingredients: tuple[str, ...]
    evaluations: int
    bytes_read: int
    bytes_written: int
    bytes_beside: int


@dataclass(frozen=True)
class Portion:
    """An ingredient of a soup.

    coefficient: 0 if it was left out; of a Model Stock, whose tensors have their own, the mean over all values.
    score, held_out: its own, on the examples that choose and on the others.
    score_with: of the soup that it was tried in, by `greedy`. None where nothing was evaluated.
    """

    path: str
    coefficient: float
    score: float | None
    held_out: float | None
    score_with: float | None = None


@dataclass(frozen=True)
class Soup:
    """A soup that was made; `print(soup)` shows it as a table.

    ingredients: the best first, where they were evaluated. score, held_out: of the soup. comparison: the soup
    minus the best ingredient, on the examples that chose neither; None without an evaluation, and where they are
    the same. examples: how many chose and how many were held out. reads: how often the ingredient that was
    read most often was read in full. notes: what to know.
    """

    output: Path
    method: str
    ingredients: tuple[Portion, ...]
    score: float | None
    held_out: float | None
    comparison: Comparison | None
    minimize: bool
    examples: tuple[int, int] | None
    evaluations: int
    cached: int
    reads: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        return {**asdict(self), "output": str(self.output)}

    def __str__(self) -> str:
        scores = [s for one in self.ingredients for s in _scores(one) if s is not None]
        digits = shared_decimals(scores if self.score is None else [*scores, self.score])
        taken = sum(one.coefficient > 0 for one in self.ingredients)
        lines = [f"{self.output}: {self.method} soup of {taken} of {len(self.ingredients)}"]
        if self.score is not None:
            lines[0] += f" ({'lower' if self.minimize else 'higher'} is better)"
        lines += _table(
            [
                ["ingredient", "score", "held out", "soup with it", "share"],
                *(_cells(one, digits) for one in self.ingredients),
            ]
        )
        if self.score is not None:
            held = (
                ""
                if self.held_out is None
                else f", {rounded(self.held_out, digits)} on those held out"
            )
            lines.append(f"The soup's score: {rounded(self.score, digits)}{held}")
        if self.examples and self.comparison:
            lines.append(
                f"Chosen on {self.examples[0]:,} examples, compared on {self.examples[1]:,} others:"
            )
        lines += [f"  {self.comparison}"] if self.comparison else []
        if self.score is not None:
            plural = "" if self.evaluations == 1 else "s"
            lines.append(f"{self.evaluations} evaluation{plural}, {self.cached} more were known")
        return for_terminal("\n".join([*lines, *self.notes]))


def _scores(one: Portion) -> list[float | None]:
    return [one.score, one.held_out, one.score_with]


def _cells(one: Portion, digits: int) -> list[str]:
    scores = ["" if s is None else rounded(s, digits) for s in _scores(one)]
    return [one.path, *scores, f"{one.coefficient:.4g}"]


def _table(rows: list[list[str]]) -> list[str]:
    """Aligned, without columns that are empty."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in zip(*columns, strict=True)
    ]
