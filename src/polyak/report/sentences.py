"""The sentence under each picture, written from the measured values.

Either sign is a result: if averaging did not help, the sentence says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyak.maths.numbers import as_shown, count, percent, plus_minus, rounded
from polyak.reference_run.flatness import ERROR, LOSS, Landscape
from polyak.reference_run.recipe import AVERAGING_ARMS, SHORT_ARMS
from polyak.report.budget import Reached
from polyak.report.tables import IMAGES, LABELS, WORDS, ArmWeights, Finals, Metric
from polyak.study.landscape import Rays, Segments
from polyak.study.paired import Estimate, estimate, paired

ONE_BASIN = 0.05
"""Checkpoints are in one basin if no barrier exceeds this fraction of the loss at their ends."""


def difference(name: str, other: str, value: Estimate | None, unit: str, digits: int) -> str:
    """`SWA is 0.30 points below SGD (95% interval 0.10 to 0.50, 5 seeds)`.

    All sentences that compare go through here. If the interval contains 0, no difference is claimed, and where there
    is no spread (a single seed, or seeds that all agree) that is said.

    >>> difference("SWA", "SGD", Estimate(-0.3, 0.02, 3), "points", 2)
    'SWA is 0.30 points below SGD (95% interval 0.21 to 0.39, 3 seeds)'
    """
    if value is None:
        return f"no seed has both {name} and {other}"
    where = f"{rounded(abs(value.mean), digits)} {unit} {'below' if value.mean < 0 else 'above'}"
    half = value.half_width()
    if half is None:
        seeds = "a single seed" if value.n == 1 else f"each of {count(value.n, 'seed')}"
        if not as_shown(value.mean, digits):
            return f"{name} and {other} are the same in {seeds}, as far as the digits go"
        return f"{name} is {where} {other} in {seeds}, which shows no spread"
    seeds = count(value.n, "seed")
    if found(value, digits) == 0:
        spread = f"{where} on average, {plus_minus(half, digits)} at 95%, {seeds}"
        return f"no difference found between {name} and {other} ({spread})"
    low, high = (rounded(abs(value.mean) + side * half, digits) for side in (-1, 1))
    return f"{name} is {where} {other} (95% interval {low} to {high}, {seeds})"


def short_difference(name: str, value: Estimate | None, digits: int) -> str:
    """The same in few words, where it was said what is compared: `the EMA −0.020 ± 0.014 (below)`."""
    if value is None:
        return f"{name} in no seed"
    half = value.half_width()
    text = f"{name} {rounded(value.mean, digits, signed=True)}"
    if half is None:
        return text if value.n == 1 else f"{text} in each seed (no spread)"
    told = {-1: "below", 0: "no difference found", 1: "above"}[found(value, digits)]
    return f"{text} {plus_minus(half, digits)} ({told})"


def found(value: Estimate, digits: int) -> int:
    """+1 or -1 for a difference whose 95% interval, as it is shown, does not reach 0; else 0.

    Without spread there is no interval, and nothing is found.

    >>> found(Estimate(2.224, 0.5164, 3), 2)  # 2.22 ± 2.22
    0
    >>> found(Estimate(0.57, 0.0, 2), 2)  # the same in two seeds
    0
    """
    half = value.half_width()
    if half is None or abs(as_shown(value.mean, digits)) <= as_shown(half, digits):
        return 0
    return 1 if value.mean > 0 else -1


def when(reached: Reached) -> str:
    """After which share of the budget: `after 28% ± 10% of the budget`, with the 95% interval of the mean.

    Nothing narrower than an epoch is claimed. Where an interval would say nothing (see `Reached.interval`), the
    lowest and the highest of the seeds stand in its place.
    """
    seeds = count(reached.n_seeds, "seed")
    if not reached.shares:
        return "at no time" if reached.n_seeds == 1 else f"in none of {seeds}"
    value = reached.interval
    if value is not None:
        half = max(value.half_width() or 0.0, reached.step)
        return f"after {percent(value.mean)} ± {percent(half)} of the budget"
    low, high = (percent(share) for share in (reached.shares[0], reached.shares[-1]))
    text = f"after {low if low == high else f'{low} to {high}'} of the budget"
    missing = reached.n_seeds - reached.n_reached
    if missing:
        rest = "the other" if missing == 1 else f"the other {missing}"
        return f"{text} in {reached.n_reached} of {seeds} (at no time in {rest})"
    if reached.n_seeds == 1:
        return text
    return f"{text} in {'each of ' if low == high else ''}{seeds}"


def how_measured(several: Sequence[Reached]) -> str:
    """What the numbers of `when` are: `(± is the 95% interval of the mean over 3 seeds; ...)`."""
    told = f"measured after each epoch, {percent(several[0].step)} of the budget"
    if any(reached.interval for reached in several):
        told = f"± is the 95% interval of the mean over {several[0].n_seeds} seeds; {told}"
    return f"({told})"


def describe_table(finals: Finals) -> str:
    """Which row is lowest, and whether the lowest average differs from the annealed run."""
    return " ".join(_lowest(finals, metric) for metric in finals.metrics[:2])


def _lowest(finals: Finals, metric: Metric) -> str:
    def mean(row: ArmWeights) -> float:
        return finals.mean(row, metric.key).mean

    lowest = min(finals.rows, key=mean)
    shown = rounded(mean(lowest), metric.digits) + ("%" if metric.unit == "points" else "")
    text = f"Lowest {metric.title}: {finals.label(lowest)}, {shown}"
    averages = [row for row in finals.rows if row[1] != "iterate"]
    if not averages or finals.baseline not in finals.rows:
        return f"{text}."
    best = min(averages, key=mean)
    name = "it" if best == lowest else f"the lowest average ({finals.label(best)})"
    value = finals.difference(best, metric.key)
    told = difference(name, finals.terms.baseline_name, value, metric.unit, metric.digits)
    return f"{text}; {told}."


@dataclass(frozen=True)
class Rates:
    """What an arm's rate does: from where to where, in one go or in cycles, after how long a warm-up."""

    high: float
    low: float
    warmup_epochs: int = 0


def describe_schedule(arms: Mapping[str, Rates], averaged: Mapping[str, int]) -> str:
    """`averaged` is how many weights each averaging arm averages."""
    annealed = next(arm for arm in ("sgd", "cosine") if arm in arms)
    short = " and in a ".join(arm for arm in SHORT_ARMS if arm in arms)
    also = f", and again in {short} of the budget" if short else ""
    name = "SGD" if annealed == "sgd" else "The cosine arm"
    parts = [f"{name} {_way(arms[annealed], 'falls')}{also}"]
    for arm, n_averaged in averaged.items():
        way = _way(arms[arm], "cycles")
        parts.append(f"the {LABELS[arm]} arm {way} and averages {n_averaged:,} sets of weights")
    return "; ".join(parts) + "."


def _way(rates: Rates, verb: str) -> str:
    high, low = (f"{rate:.3g}" for rate in (rates.high, rates.low))
    if rates.warmup_epochs:
        epochs = count(rates.warmup_epochs, "epoch")
        stays = " and stays there" if high == low else f", then {verb} down to {low}"
        return f"warms up to {high} in {epochs}{stays}"
    return f"stays at {high}" if high == low else f"{verb} from {high} down to {low}"


BySeed = Mapping[int, float]


def describe_history(last: Mapping[ArmWeights, BySeed], metric: Metric, what: str) -> str:
    """`last` is the last validation value of each row, by seed."""
    terms = next(t for t in (IMAGES, WORDS) if t.baseline in last)
    name, sgd = terms.baseline_name, last[terms.baseline]
    parts = [f"Validation {what}: {name} ends at {_mean(sgd, metric)}"]
    for arm in dict.fromkeys(arm for arm, kind in last if kind == "swa" and arm in AVERAGING_ARMS):
        iterate, average = last[arm, "iterate"], last[arm, "swa"]
        own, other = (
            difference("the average", to, _paired(average, values), metric.unit, metric.digits)
            for to, values in (("its own iterate", iterate), (name, sgd))
        )
        parts.append(
            f"the {LABELS[arm]} arm's average ends at {_mean(average, metric)}, its iterate at "
            f"{_mean(iterate, metric)}: {own}; {other}"
        )
    return "; ".join(parts) + "."


def _mean(by_seed: BySeed, metric: Metric) -> str:
    value = rounded(estimate(list(by_seed.values())).mean, metric.digits)
    return f"{value}%" if metric.unit == "points" else f"{value} {metric.unit}"


def _paired(values: BySeed, others: BySeed) -> Estimate | None:
    seeds = sorted(values.keys() & others.keys())
    return paired([values[s] for s in seeds], [others[s] for s in seeds]) if seeds else None


def describe_reliability(bins: Mapping[str, Mapping[str, Any]], ece: Mapping[str, float]) -> str:
    """How sure each network is against how often it is right, in percent."""
    parts = []
    for name, b in bins.items():
        total = sum(b["count"])
        sure, right = (
            100 * sum(v * n for v, n in zip(b[key], b["count"], strict=True)) / total
            for key in ("confidence", "accuracy")
        )
        parts.append(
            f"{name} is {rounded(sure, 1)}% sure and {rounded(right, 1)}% right (calibration error "
            f"{rounded(ece[name], 1)}%)"
        )
    return "; ".join(parts) + "."


def describe_line(land: Landscape) -> str:
    """Where along the line each curve is lowest."""
    t = land.line.positions
    loss, error = land.line.values[LOSS], land.line.values[ERROR]
    at_loss, at_error = float(t[loss.argmin()]), float(t[error.argmin()])
    at = {name: int(np.abs(t - place).argmin()) for name, place in (("SGD", 0), ("SWA", 1))}
    ends = " and ".join(
        f"{name} has {rounded(loss[i], 3)} nats and {rounded(error[i], 1)}%"
        for name, i in at.items()
    )
    farther = "farther" if at_error > at_loss else "not farther"
    told = _in_one_seed("SWA", "SGD", float(error[at["SWA"]] - error[at["SGD"]]), "points", 1)
    return (
        f"Training loss is lowest at {rounded(at_loss, 2)}, test error at {rounded(at_error, 2)} (0 is SGD, 1 is SWA): "
        f"{farther} towards SWA. On these images {ends}; in test error, {told}."
    )


def _in_one_seed(name: str, other: str, value: float, unit: str, digits: int) -> str:
    """The surface is measured around the first seed's solutions."""
    return difference(name, other, Estimate(value, None, 1), unit, digits)


def describe_rays(rays: Mapping[str, Rays]) -> str:
    """How much the training loss rises up to the end of the rays, mean over rays."""
    rise = {name: _rise(value) for name, value in rays.items()}
    reach = float(next(iter(rays.values())).distances[-1])
    listed = "{} nats from {}, {} from the {} and {} from {}".format(
        *(part for name, value in rise.items() for part in (rounded(value, 3), name))
    )
    told = "; ".join(
        _in_one_seed(f"the rise from {name}", "that from SGD", value - rise["SGD"], "nats", 3)
        for name, value in (("SWA", rise["SWA"]), ("the last iterate", rise["last iterate"]))
    )
    text = f"At distance {rounded(reach, 1)} the training loss has risen by {listed}: {told}."
    if rise["SWA"] < rise["SGD"] and rise["last iterate"] < rise["SGD"]:
        text += " A last iterate that is flatter too owes it to the high rate, not to averaging."
    return text


def _rise(rays: Rays) -> float:
    rows = rays.values[LOSS]
    return float((rows[:, -1] - rows[:, 0]).mean())


def describe_segments(segments: Segments, epochs: list[int]) -> str:
    """The highest barrier, and whether the checkpoints share a basin."""
    barriers = segments.barriers(LOSS)
    worst = int(barriers.argmax())
    height, ends = float(barriers[worst]), float(segments.values[LOSS][worst, [0, -1]].mean())
    where = f"between epochs {epochs[worst]} and {epochs[worst + 1]}"
    if height <= 0:
        return "No segment rises above the line between its ends: the checkpoints share one basin."
    share = height / ends
    reading = "one basin" if share < ONE_BASIN else "more than one basin, where averaging is a risk"
    return (
        f"The highest barrier is {rounded(height, 4)} nats, {where}, {percent(share, 1)} of the loss at its "
        f"ends: {reading}."
    )


def describe_plane(land: Landscape, segments: Segments) -> str:
    """The average against the iterates it is made of, whose values are in the segments."""
    values = {key: segments.values[key] for key in (LOSS, ERROR)}
    iterates = {key: np.append(rows[:, 0], rows[-1, -1]) for key, rows in values.items()}
    at = int(np.abs(land.line.positions - 1).argmin())
    loss, error = (float(land.line.values[key][at]) for key in (LOSS, ERROR))
    below = int((iterates[LOSS] > loss).sum())
    better = int((iterates[ERROR] > error).sum())
    n = len(land.epochs)
    text = (
        f"The average has a lower training loss than {below} of the {n} weights it is made of and "
        f"a lower test error than {better} of them ({rounded(loss, 3)} nats and {rounded(error, 1)}%, theirs "
        f"{rounded(iterates[LOSS].mean(), 3)} and {rounded(iterates[ERROR].mean(), 1)}% on average, in one seed)"
    )
    end = "it is inside, they are at the walls" if 2 * below > n else "it is no lower than they are"
    return f"{text}: {end}. It is {rounded(land.average[2], 2)} away from this plane."
