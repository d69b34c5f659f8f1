"""The tables of `evidence.py`: six questions, each answered from the records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from polyak.report.sentences import found as is_found
from polyak.report.tables import format_estimate as shown
from polyak.study.paired import Estimate, estimate, paired

Record = dict[str, Any]
Place = tuple[str, int, str, str]
"""regime, epochs, arm, weights"""

METRICS = {"error": ("error, points", 2), "nll": ("NLL", 3),
           "nll_scaled": ("NLL, scaled", 3), "ece": ("calibration error, points", 2)}  # fmt: skip
NAMES = {
    ("sgd", "iterate"): "SGD",
    ("sgd", "ema"): "SGD, EMA",
    ("swa", "iterate"): "constant rate, last iterate",
    ("swa", "swa"): "constant rate, SWA",
    ("swa", "ema"): "constant rate, EMA",
    ("swa", "swa-each-step"): "constant rate, SWA of each step",
    ("swa", "swa-newest-statistics"): "constant rate, SWA with the iterate's statistics",
    ("swa", "swa-averaged-statistics"): "constant rate, SWA with averaged statistics",
    ("cyclic", "iterate"): "cyclic rate, last iterate",
    ("cyclic", "swa"): "cyclic rate, SWA",
    ("cyclic", "ema"): "cyclic rate, EMA",
}


class Finals:
    """Final records by place and seed."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.by_place: dict[Place, dict[int, Record]] = {}
        for r in records:
            if r["kind"] == "final":
                place = (r["regime"], r["epochs"], r["arm"], r["weights"])
                self.by_place.setdefault(place, {})[r["seed"]] = r

    def mean(self, place: Place, metric: str) -> Estimate:
        return estimate([record[metric] for record in self.by_place[place].values()])

    def difference(self, place: Place, base: Place, metric: str) -> Estimate:
        mine, other = self.by_place[place], self.by_place[base]
        seeds = sorted(mine.keys() & other.keys())
        return paired([mine[s][metric] for s in seeds], [other[s][metric] for s in seeds])

    def parts(self) -> list[tuple[str, int]]:
        """(regime, epochs) in the order in which they were reported."""
        return list(dict.fromkeys(place[:2] for place in self.by_place))

    def main_parts(self) -> list[tuple[str, int]]:
        """The full budget of each regime."""
        longest = max(epochs for _, epochs in self.parts())
        return [part for part in self.parts() if part[1] == longest]


def summary(records: list[Record]) -> str:
    """All tables as Markdown, those whose records are there."""
    finals = Finals(records)
    if not finals.by_place:
        return tuned(records)
    questions: list[Callable[[Finals, list[Record]], str]] = [
        values, against_iterate, against_sgd, surfaces, statistics, each_step, budgets,
    ]  # fmt: skip
    parts = [tuned(records), *(question(finals, records) for question in questions)]
    return "\n\n".join(part for part in parts if part)


def tuned(records: list[Record]) -> str:
    """The rates that were tried, with the mean validation error of each, the chosen one marked."""
    trials: dict[tuple[str, int, str], dict[float, list[Record]]] = {}
    for r in records:
        if r["kind"] == "trial":
            by_rate = trials.setdefault((r["regime"], r["epochs"], r["arm"]), {})
            by_rate.setdefault(r["rate"], []).append(r)
    rows = []
    for (regime, epochs, arm), by_rate in trials.items():
        means = {
            rate: tuple(estimate([r[m] for r in tried]).mean for m in ("error", "nll"))
            for rate, tried in sorted(by_rate.items())
        }
        best = min(means, key=lambda rate: means[rate])
        cells = [f"{'**' if r == best else ''}{r:g}: {e:.2f}{'**' if r == best else ''}"
                 for r, (e, _) in means.items()]  # fmt: skip
        rows.append([f"{regime}, {epochs} epochs", arm, ", ".join(cells)])
    head = ["regularisation", "arm", "rate: validation error % (chosen in bold)"]
    return "**The rates, tuned.**\n\n" + table(head, rows) if rows else ""


def values(finals: Finals, records: list[Record]) -> str:
    """Means of everything."""
    rows = [
        [f"{place[0]}, {place[1]} epochs", NAMES[place[2:]],
         *(format_estimate(finals.mean(place, m), digits, half=False) for m, (_, digits) in METRICS.items())]
        for place in finals.by_place
    ]  # fmt: skip
    n = max(len(seeds) for seeds in finals.by_place.values())
    head = ["regularisation", "weights", "error %", "NLL", "NLL, scaled", "calibration error %"]
    return f"**What each is worth** (test images, mean ± standard error, {n} seeds).\n\n" + table(
        head, rows
    )


def against_iterate(finals: Finals, records: list[Record]) -> str:
    """Question 1."""
    pairs = [
        ((*part, arm, kind), (*part, arm, "iterate"))
        for part in finals.main_parts()
        for arm in ("sgd", "swa", "cyclic")
        for kind in ("swa", "ema")
    ]
    return _differences(finals, "1. An average against the last iterate of its own run", pairs)


def against_sgd(finals: Finals, records: list[Record]) -> str:
    """Question 2."""
    pairs = [
        ((*part, arm, kind), (*part, "sgd", "iterate"))
        for part in finals.main_parts()
        for arm in ("swa", "cyclic")
        for kind in ("iterate", "swa", "ema")
    ]
    return _differences(finals, "2. Against annealed SGD at equal budget", pairs)


def surfaces(finals: Finals, records: list[Record]) -> str:
    """Question 3."""
    by_regime: dict[str, list[Record]] = {}
    longest = max(epochs for _, epochs in finals.parts())
    for r in records:
        if r["kind"] == "surface" and r["epochs"] == longest:
            by_regime.setdefault(r["regime"], []).append(r)
    rows = []
    for regime, found in by_regime.items():
        rises = {name: [r["rises"][name][-1] for r in found] for name in ("sgd", "iterate", "swa")}
        rows.append([
            regime,
            *(format_estimate(estimate(rises[name]), 3, half=False) for name in rises),
            format_estimate(paired(rises["swa"], rises["sgd"]), 3),
            format_estimate(paired(rises["swa"], rises["iterate"]), 3),
            f"{max(r['barrier'] for r in found):.4f}",
            f"{estimate([r['loss_at_checkpoints'] for r in found]).mean:.3f}",
        ])  # fmt: skip
    head = ["regularisation", "rise from SGD", "from the last iterate", "from SWA", "SWA − SGD",
            "SWA − iterate", "highest barrier of all seeds", "loss at the checkpoints"]  # fmt: skip
    title = (
        "**3. Rays and segments**: rise of the training loss (nats) at 0.6 times the length of "
        "SGD's weights, mean of 10 random rays; barriers between consecutive averaged weights."
    )
    return f"{title}\n\n{table(head, rows)}" if rows else ""


def statistics(finals: Finals, records: list[Record]) -> str:
    """Question 4."""
    pairs = [
        ((*part, "swa", kind), (*part, "swa", "swa"))
        for part in finals.main_parts()
        for kind in ("swa-newest-statistics", "swa-averaged-statistics")
    ]
    title = "4. Stale BatchNorm statistics against refreshed ones (`update_bn`)"
    return _differences(finals, title, pairs)


def each_step(finals: Finals, records: list[Record]) -> str:
    """Question 5."""
    pairs = [
        ((*part, "swa", "swa-each-step"), (*part, "swa", "swa")) for part in finals.main_parts()
    ]
    return _differences(finals, "5. Averaging each step against each epoch", pairs)


def budgets(finals: Finals, records: list[Record]) -> str:
    """Question 6."""
    longest = max(epochs for _, epochs in finals.parts())
    regimes = dict.fromkeys(r for r, epochs in finals.parts() if epochs != longest)
    pairs = [
        ((regime, epochs, arm, kind), (regime, base, "sgd", "iterate"))
        for regime in regimes
        for epochs in sorted({e for r, e in finals.parts() if r == regime and e != longest})
        for base in (epochs, longest)
        for arm, kind in (("swa", "swa"), ("swa", "ema"), ("sgd", "iterate"))
        if (arm, base) != ("sgd", epochs)
    ]
    title = "6. A shorter budget: against SGD annealed in as many epochs, and in all of them"
    return _differences(finals, title, pairs)


def _differences(finals: Finals, title: str, pairs: list[tuple[Place, Place]]) -> str:
    rows = []
    for place, base in pairs:
        if place in finals.by_place and base in finals.by_place:
            against = f"{place[0]}: {NAMES[place[2:]]} ({place[1]} epochs) − {NAMES[base[2:]]}"
            against += f" ({base[1]})" if base[1] != place[1] else ""
            cells = [
                format_estimate(finals.difference(place, base, m), d)
                for m, (_, d) in METRICS.items()
            ]
            rows.append([against, *cells])
    if not rows:
        return ""
    head = ["difference", *(title for title, _ in METRICS.values())]
    return f"**{title}** (mean ± half the 95% interval, paired by seed).\n\n{table(head, rows)}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_estimate(value: Estimate, digits: int, *, half: bool = True) -> str:
    """Mean ± standard error, or a difference ± half its 95% interval, bold if that does not contain 0."""
    text = shown(value, digits, signed=half)
    return f"**{text}**" if half and is_found(value, digits) else text
