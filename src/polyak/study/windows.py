"""Which of many windows, or of many lengths, to evaluate next: grid, golden section, parabola.

Everything here is in indices: edges 0 ... K of a record, a window is a pair of them. `score` gives the value of
one, lower is better, and infinity for one that failed; a second request for the same one is free.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

Window = tuple[int, int]


GRID = 4
_GOLDEN = (3 - math.sqrt(5)) / 2  # of the larger side, from the best point on
_EACH = 3  # evaluations of a golden section, on the start and on the end


class Spent(Exception):  # noqa: N818 - not an error: the evaluations are used up
    """No evaluation is left."""


class Budget:
    """Counts evaluations: `score` beyond `limit` different windows raises Spent."""

    def __init__(self, score: Callable[[Window], float], limit: int) -> None:
        self._score = score
        self._limit = limit
        self.known: dict[Window, float] = {}

    def __call__(self, window: Window) -> float:
        """Its score; Spent if that takes one evaluation too many."""
        if window not in self.known:
            if len(self.known) >= self._limit:
                raise Spent
            self.known[window] = self._score(window)
        return self.known[window]

    @property
    def best(self) -> Window:
        """The best so far; the first of equals."""
        return min(self.known, key=self.known.__getitem__)


def search_windows(score: Callable[[Window], float], edges: int, limit: int) -> dict[Window, float]:
    """Windows of a grid of 4 by 4, then golden section on start and end; with room left, a finer grid.

    edges: how many there are. Returns every window that was evaluated, in order.
    """
    budget = Budget(score, limit)
    parts = min(GRID, edges - 1)
    try:
        while True:
            _evaluate(budget, _grid(edges, parts))
            _golden(budget, edges, parts)
            if parts == edges - 1:
                break
            parts = min(2 * parts, edges - 1)
    except Spent:
        pass
    return budget.known


def search_lengths(
    score: Callable[[Window], float], edges: int, limit: int, end: int | None = None
) -> dict[Window, float]:
    """Windows that end at `end`, the last edge by default: three lengths, then parabolas in their logarithm."""
    end = edges - 1 if end is None else end
    budget = Budget(score, limit)
    try:
        for share in (1, 2, 4):
            budget((end - max(1, round(end / share)), end))
        while len(budget.known) < end:
            known = {float(end - start): value for (start, _), value in budget.known.items()}
            length = next_length(known, [float(n) for n in range(1, end + 1)])
            if length is None:
                break
            budget((end - int(length), end))
    except Spent:
        pass
    return budget.known


def search_values(
    score: Callable[[float], float], values: Sequence[float], limit: int
) -> dict[float, float]:
    """The same among positive values in ascending order: the outermost and the middle one, then parabolas."""
    known: dict[float, float] = {}
    for value in (values[-1], values[0], values[len(values) // 2]):
        if len(known) < limit:
            known[value] = score(value)
    while len(known) < limit and (value_or_none := next_length(known, values)) is not None:
        known[value_or_none] = score(value_or_none)
    return known


def next_length(known: dict[float, float], allowed: Sequence[float]) -> float | None:
    """The most promising length that is not known yet: where a parabola in log length is lowest.

    At the shortest known one, half of it; None if there is none left beside the best.
    """
    order = sorted(known)
    at = order.index(min(order, key=lambda length: (known[length], length)))
    best = order[at]
    if at == 0:
        wanted = best / 2
    elif at == len(order) - 1:
        wanted = best * 2 if best < allowed[-1] else math.sqrt(best * order[at - 1])
    else:
        wanted = _vertex([(math.log(n), known[n]) for n in order[at - 1 : at + 2]])
    low = order[at - 1] if at else 0.0
    high = order[at + 1] if at + 1 < len(order) else math.inf
    free = [n for n in allowed if n not in known]
    free = [n for n in free if low < n < high] or free
    return min(free, key=lambda n: abs(math.log(n / wanted)), default=None)


def _vertex(points: Sequence[tuple[float, float]]) -> float:
    """Exp of where the parabola through three points is lowest; of the middle one if they bend no way."""
    (a, fa), (b, fb), (c, fc) = points
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    if not math.isfinite(left - right) or left == right:
        return math.exp(b)
    return math.exp(b - ((b - a) * left - (b - c) * right) / (2 * (left - right)))


def _grid(edges: int, parts: int) -> Iterator[Window]:
    marks = sorted({round(i * (edges - 1) / parts) for i in range(parts + 1)})
    return itertools.combinations(marks, 2)


def _evaluate(budget: Budget, windows: Iterable[Window]) -> None:
    """The nearest to the best so far first, where the evaluations may not last for all."""
    waiting = [one for one in windows if one not in budget.known]
    if budget.known:
        a, b = budget.best
        waiting.sort(key=lambda w: (abs(w[0] - a) + abs(w[1] - b), w))
    for window in waiting:
        budget(window)


def _golden(budget: Budget, edges: int, parts: int) -> None:
    """Golden section between the neighbours on the grid, on the start, then on the end."""
    step = math.ceil((edges - 1) / parts)
    for which in (0, 1):
        best = budget.best
        low, high = (max(0, best[which] - step), min(edges - 1, best[which] + step))
        low, high = (low, min(high, best[1] - 1)) if which == 0 else (max(low, best[0] + 1), high)
        _section(budget, which, low, high)


def _section(budget: Budget, which: int, low: int, high: int) -> None:
    middle = budget.best[which]
    for _ in range(_EACH):
        best = budget.best
        right = high - middle >= middle - low
        side = high - middle if right else middle - low
        if side == 0 or (
            side == 1 and _replaced(best, which, high if right else low) in budget.known
        ):
            return
        move = max(1, round(_GOLDEN * side)) * (1 if right else -1)
        probe = middle + move
        value = budget(_replaced(best, which, probe))
        if value < budget.known[best]:
            low, high = (middle, high) if right else (low, middle)
            middle = probe
        else:
            low, high = (low, probe) if right else (probe, high)


def _replaced(window: Window, which: int, value: int) -> Window:
    return (value, window[1]) if which == 0 else (window[0], value)
