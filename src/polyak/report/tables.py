"""The final results of a run over its seeds: means, and paired differences to SGD."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from polyak.report.figures import LABELS
from polyak.report.numbers import rounded
from polyak.study.paired import Estimate, estimate, paired

ArmWeights = tuple[str, str]
"""An arm and a kind of its weights: ("swa", "ema")."""

BASELINE: ArmWeights = ("sgd", "iterate")


@dataclass(frozen=True)
class Metric:
    """A column: its title, its unit, and its digits."""

    key: str
    title: str
    unit: str
    digits: int


METRICS = (
    Metric("error", "test error", "points", 2),
    Metric("nll", "NLL", "nats", 4),
    Metric("nll_scaled", "NLL, temperature-scaled", "nats", 4),
    Metric("ece", "calibration error", "points", 2),
)


class Finals:
    """The `final` records of a run by arm, weights and seed; every metric is better when lower."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._records: dict[ArmWeights, dict[int, Mapping[str, Any]]] = {}
        for record in records:
            seeds = self._records.setdefault((record["arm"], record["weights"]), {})
            seeds[record["seed"]] = record

    @property
    def rows(self) -> list[ArmWeights]:
        """Every (arm, weights), in the order of the records."""
        return list(self._records)

    @property
    def n_seeds(self) -> int:
        """The largest number of seeds of any row."""
        return max((len(seeds) for seeds in self._records.values()), default=0)

    def mean(self, row: ArmWeights, metric: str) -> Estimate:
        """The metric's mean over the seeds of a row."""
        return estimate([record[metric] for record in self._records[row].values()])

    def difference(
        self, row: ArmWeights, metric: str, *, to: ArmWeights = BASELINE
    ) -> Estimate | None:
        """`row` minus `to`, over the seeds that both have; None if they share none."""
        mine, other = self._records.get(row, {}), self._records.get(to, {})
        seeds = sorted(mine.keys() & other.keys())
        if not seeds:
            return None
        return paired([mine[s][metric] for s in seeds], [other[s][metric] for s in seeds])

    def reliability(self, row: ArmWeights) -> dict[str, list[float]]:
        """Confidence, accuracy and count by bin, pooled over the seeds by their counts."""
        bins = [record["reliability"] for record in self._records[row].values()]
        count = [sum(column) for column in zip(*(b["count"] for b in bins), strict=True)]
        pooled: dict[str, list[float]] = {"count": [float(n) for n in count]}
        for name in ("confidence", "accuracy"):
            sums = [sum(b[name][i] * b["count"][i] for b in bins) for i in range(len(count))]
            pooled[name] = [s / n if n else 0.0 for s, n in zip(sums, count, strict=True)]
        return pooled


def row_label(row: ArmWeights) -> str:
    """The name of a row: `SWA arm, EMA`.

    >>> row_label(("sgd", "iterate")), row_label(("cyclic", "swa"))
    ('SGD', 'cyclic arm, SWA')
    """
    if row == BASELINE:
        return "SGD"
    if row == ("half", "iterate"):
        return "SGD, half length"
    arm, weights = (LABELS.get(name, name) for name in row)
    return f"{arm} arm, {'last iterate' if row[1] == 'iterate' else weights}"


def format_estimate(value: Estimate, digits: int, *, signed: bool = False) -> str:
    """`13.42 ± 0.10`: a mean with its standard error, or a difference with its 95% half width.

    >>> format_estimate(Estimate(-0.5, 0.1, 3), 2, signed=True)
    '−0.50 ± 0.43'
    """
    spread = value.half_width() if signed else value.error
    text = rounded(value.mean, digits, signed=signed)
    return text if spread is None else f"{text} ± {rounded(spread, digits)}"
