"""The final table of a run: means over the seeds, and paired differences to SGD."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from polyak.errors import ArgumentError
from polyak.study.paired import Estimate, estimate, paired

METRICS = {
    "error": "test error %",
    "nll": "NLL",
    "ece": "calibration error %",
    "nll_scaled": "NLL, temperature scaled",
}
"""The figures of a final record that the table shows, and how it calls them."""

NAMES = {"iterate": "last iterate", "swa": "SWA", "ema": "EMA"}
_BASELINE = ("sgd", "iterate")


@dataclass(frozen=True)
class Row:
    """An arm and a kind of weights: each metric over the seeds, and its difference to SGD.

    `differences` is empty for SGD itself.
    """

    arm: str
    weights: str
    metrics: dict[str, Estimate]
    differences: dict[str, Estimate]


def summarise(finals: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows from final records, in the order in which they were written.

    Differences are taken seed by seed to the last iterate of the SGD arm, over the seeds that both
    have. Raises ArgumentError where SGD has no final record.
    """
    results: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for record in finals:
        results.setdefault((record["arm"], record["weights"]), {})[record["seed"]] = record
    if _BASELINE not in results:
        raise ArgumentError(
            "The run has no final result of the SGD arm yet. Let it finish: polyak train --resume."
        )
    return [_row(key, by_seed, results[_BASELINE]) for key, by_seed in results.items()]


def _row(
    key: tuple[str, str], by_seed: dict[int, dict[str, Any]], sgd: dict[int, dict[str, Any]]
) -> Row:
    both = sorted(set(by_seed) & set(sgd))
    differences = {
        name: paired([by_seed[s][name] for s in both], [sgd[s][name] for s in both])
        for name in METRICS
        if key != _BASELINE
    }
    metrics = {name: estimate([record[name] for record in by_seed.values()]) for name in METRICS}
    return Row(*key, metrics=metrics, differences=differences)


def spelled(value: Estimate, digits: int, *, signed: bool = False) -> str:
    """`13.62 ± 0.11`; the mean alone for a single seed.

    >>> spelled(Estimate(13.624, 0.11, 3), 2), spelled(Estimate(0.5, None, 1), 1, signed=True)
    ('13.62 ± 0.11', '+0.5')
    """
    mean = f"{value.mean:{'+' if signed else ''}.{digits}f}"
    return mean if value.error is None else f"{mean} ± {value.error:.{digits}f}"
