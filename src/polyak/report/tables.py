"""The final results of a run over its seeds: means, and paired differences to SGD."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from polyak.maths.numbers import plus_minus, rounded
from polyak.reference_run.recipe import AVERAGING_ARMS, SHORT_ARMS
from polyak.study.paired import Estimate, estimate, paired

LABELS = {
    "iterate": "iterate", "swa": "SWA", "ema": "EMA", "power": "power EMA", "wsm": "WSM",
    "sgd": "SGD", "half": "half", "quarter": "quarter", "cyclic": "cyclic", "cosine": "cosine",
    "constant": "constant",
}  # fmt: skip

ArmWeights = tuple[str, str]
"""An arm and a kind of its weights: ("swa", "ema")."""

BASELINE: ArmWeights = ("sgd", "iterate")
WORDS_BASELINE: ArmWeights = ("cosine", "iterate")
"""What everything is compared with: the annealed arm's last weights."""


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
WORDS_METRICS = (
    Metric("nll", "test loss", "nats per byte", 4),
    Metric("error", "next byte wrong", "points", 2),
    Metric("int8_rise", "rise with int8 weights", "millinats", 2),
    Metric("int4_rise", "rise with int4 weights", "millinats", 1),
)


@dataclass(frozen=True)
class Terms:
    """What the results of a task are called, and its metrics; the first one judges."""

    baseline: ArmWeights
    baseline_name: str
    metrics: tuple[Metric, ...]
    tested_on: str


IMAGES = Terms(BASELINE, "SGD", METRICS, "the test images")
WORDS = Terms(WORDS_BASELINE, "cosine", WORDS_METRICS, "the test part of the text")


class Finals:
    """The `final` records of a run by arm, weights and seed; every metric is better when lower."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._records: dict[ArmWeights, dict[int, Mapping[str, Any]]] = {}
        self.terms = IMAGES
        for record in records:
            seeds = self._records.setdefault((record["arm"], record["weights"]), {})
            seeds[record["seed"]] = record
            if WORDS_METRICS[-1].key in record:
                self.terms = WORDS

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The columns."""
        return self.terms.metrics

    @property
    def baseline(self) -> ArmWeights:
        """The row that the others are compared with."""
        return self.terms.baseline

    def label(self, row: ArmWeights) -> str:
        """The name of a row."""
        return row_label(row, self.terms)

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

    def metric(self, key: str) -> Metric:
        """One of the columns."""
        return next(metric for metric in self.metrics if metric.key == key)

    def difference(
        self, row: ArmWeights, metric: str, *, to: ArmWeights | None = None
    ) -> Estimate | None:
        """`row` minus `to` (the baseline), over the seeds that both have; None if they share none."""
        mine, other = self._records.get(row, {}), self._records.get(to or self.baseline, {})
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


def row_label(row: ArmWeights, terms: Terms = IMAGES) -> str:
    """The name of a row: `SWA arm, EMA`.

    >>> row_label(("sgd", "iterate")), row_label(("cyclic", "swa"))
    ('SGD', 'cyclic arm, SWA')
    """
    if row == terms.baseline or row[0] in SHORT_ARMS:
        return arm_name(row[0], terms)
    arm, weights = (LABELS.get(name, name) for name in row)
    return f"{arm} arm, {'last iterate' if row[1] == 'iterate' else weights}"


def arm_name(arm: str, terms: Terms = IMAGES) -> str:
    """The name of an arm: `SGD`, `SGD, half length`, `SWA arm`."""
    if arm == terms.baseline[0]:
        return terms.baseline_name
    return f"{terms.baseline_name}, {arm} length" if arm in SHORT_ARMS else f"{LABELS[arm]} arm"


def curve_name(row: ArmWeights, terms: Terms = IMAGES) -> str:
    """What a legend calls a row: an average by its kind, an annealed run by its name, else `iterate`.

    >>> curve_name(("swa", "ema")), curve_name(("half", "iterate")), curve_name(("swa", "iterate"))
    ('EMA', 'SGD, half length', 'iterate')
    """
    arm, weights = row
    if weights != "iterate":
        return LABELS[weights]
    if arm in AVERAGING_ARMS:
        return "iterate, cyclic arm" if arm == "cyclic" else "iterate"
    return arm_name(arm, terms)


def format_estimate(value: Estimate, digits: int, *, signed: bool = False) -> str:
    """`13.42 ± 0.10`: a mean with its standard error, or a difference with its 95% half width.

    >>> format_estimate(Estimate(-0.5, 0.1, 3), 2, signed=True)
    '−0.50 ± 0.43'
    """
    text, half = rounded(value.mean, digits, signed=signed), value.half_width()
    if half is None or value.error is None:  # without spread
        return text
    return f"{text} {plus_minus(half if signed else value.error, digits)}"
