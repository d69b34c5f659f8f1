"""Where SWAD's window begins and ends, from the validation losses of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polyak.errors import ArgumentError, require
from polyak.maths.arguments import at_least_one, number


@dataclass(frozen=True)
class OverfitWindow:
    r"""The overfit-aware window of SWAD.

    Of losses $E_1, E_2, \dots$ it begins at the first $s$ with $E_s = \min(E_s, \dots, E_{s + N_s - 1})$, and
    ends at $e = i - N_e$ for the first $i \ge s + N_s$ with $\min(E_{i - N_e + 1}, \dots, E_i) > l$, where
    $l = \frac{r}{N_s} \sum_{j < N_s} E_{s + j}$. Source: Cha et al. 2021, arXiv 2102.08604, algorithm 1.

    n_start: $N_s$, at least 1. n_end: $N_e$, at least 1. tolerance: $r$, at least 1. The defaults are the authors';
    they took 1.2 for VLCS.
    """

    n_start: int = 3
    n_end: int = 6
    tolerance: float = 1.3

    def __post_init__(self) -> None:
        at_least_one("n_start", self.n_start)
        at_least_one("n_end", self.n_end)
        require(
            1 <= number("tolerance", self.tolerance) < math.inf,
            f"tolerance is {self.tolerance:g}; expected a factor of the loss, at least 1.",
        )

    def of(self, losses: Sequence[float]) -> tuple[int | None, int | None]:
        """The evaluations at which it begins and ends, counted from 0; None where it has not yet.

        A loss that is not finite begins no window. Raises ArgumentError if the losses at the start are not
        positive: the threshold is a multiple of them.

        >>> OverfitWindow(n_start=2, n_end=2).of([3, 2, 1, 1.1, 1.2, 1.9, 2.0])
        (2, 4)
        """
        start = next(filter(lambda s: self._begins(losses, s), range(len(losses))), None)
        if start is None:
            return None, None
        first = losses[start : start + self.n_start]
        threshold = self.tolerance * math.fsum(first) / self.n_start
        if threshold <= 0:
            raise ArgumentError(
                f"The losses {', '.join(f'{x:g}' for x in first)} are not positive, and SWAD's threshold is a "
                "multiple of them. Pass a loss that is above 0, such as a negative log-likelihood or an error."
            )
        for i in range(max(start + self.n_start, self.n_end - 1), len(losses)):
            newest = losses[i - self.n_end + 1 : i + 1]
            if all(math.isnan(x) or x > threshold for x in newest):
                return start, i - self.n_end
        return start, None

    def _begins(self, losses: Sequence[float], s: int) -> bool:
        window = losses[s : s + self.n_start]
        complete = len(window) == self.n_start and all(map(math.isfinite, window))
        return complete and losses[s] == min(window)
