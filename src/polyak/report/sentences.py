"""The sentence under each picture, written from the measured values.

Either sign is a result: if averaging did not help, the sentence says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from polyak.reference_run.flatness import ERROR, LOSS, Landscape
from polyak.reference_run.recipe import AVERAGING_ARMS, SHORT_ARMS
from polyak.report.figures import LABELS
from polyak.report.numbers import as_shown, count, rounded
from polyak.report.tables import BASELINE, IMAGES, WORDS, ArmWeights, Finals
from polyak.study.landscape import Rays, Segments
from polyak.study.paired import Estimate

ONE_BASIN = 0.05
"""Checkpoints are in one basin if no barrier exceeds this fraction of the loss at their ends."""


def difference(name: str, other: str, value: Estimate | None, unit: str, digits: int) -> str:
    """`SWA is 0.30 points below SGD (95% interval 0.10 to 0.50, 5 seeds)`.

    If the interval contains 0, or there is a single seed, no difference is claimed.

    >>> difference("SWA", "SGD", Estimate(-0.3, 0.02, 3), "points", 2)
    'SWA is 0.30 points below SGD (95% interval 0.21 to 0.39, 3 seeds)'
    """
    if value is None:
        return f"no seed has both {name} and {other}"
    where = f"{rounded(abs(value.mean), digits)} {unit} {'below' if value.mean < 0 else 'above'}"
    half = value.half_width()
    if half is None:
        return f"{name} is {where} {other}, in a single seed, which shows no spread"
    seeds = count(value.n, "seed")
    if found(value, digits) == 0:
        spread = f"{where} on average, ± {rounded(half, digits)} at 95%, {seeds}"
        return f"no difference found between {name} and {other} ({spread})"
    low, high = (rounded(abs(value.mean) + side * half, digits) for side in (-1, 1))
    return f"{name} is {where} {other} (95% interval {low} to {high}, {seeds})"


def found(value: Estimate, digits: int) -> int:
    """+1 or -1 for a difference whose 95% interval, as it is shown, does not reach 0; else 0.

    >>> found(Estimate(2.224, 0.5164, 3), 2)  # 2.22 ± 2.22
    0
    """
    half = value.half_width()
    if half is None or abs(as_shown(value.mean, digits)) <= as_shown(half, digits):
        return 0
    return 1 if value.mean > 0 else -1


def describe_table(finals: Finals) -> str:
    """Which row is best, and whether that is an average."""
    lowest = {
        metric: min(finals.rows, key=lambda row: finals.mean(row, metric.key).mean)
        for metric in finals.metrics[:2]
    }
    parts = [
        f"owest {m.title}: {finals.label(row)}, {rounded(finals.mean(row, m.key).mean, m.digits)}"
        f"{'%' if m.unit == 'points' else ''}"
        for m, row in lowest.items()
    ]
    text = f"L{'; l'.join(parts)}."
    if lowest[finals.metrics[0]] == finals.baseline:
        what = (
            "annealed SGD in error" if finals.baseline == BASELINE else "the cosine decay in loss"
        )
        text += f" No average beat {what} here."
    return text


def describe_schedule(arms: Mapping[str, tuple[float, float]], averaged: Mapping[str, int]) -> str:
    """`arms` gives the highest and lowest rate of each, `averaged` how many weights it averages."""
    annealed = next(arm for arm in ("sgd", "cosine") if arm in arms)
    high, low = arms[annealed]
    short = " and in a ".join(arm for arm in SHORT_ARMS if arm in arms)
    also = f", and again in {short} of the budget" if short else ""
    name = "SGD" if annealed == "sgd" else "The cosine arm"
    parts = [f"{name} falls from {high:.3g} to {low:.3g}{also}"]
    for arm, n_averaged in averaged.items():
        top, bottom = arms[arm]
        flat = math.isclose(top, bottom)
        way = f"stays at {top:.3g}" if flat else f"cycles from {top:.3g} down to {bottom:.3g}"
        parts.append(f"the {LABELS[arm]} arm {way} and averages {n_averaged} sets of weights")
    return "; ".join(parts) + "."


def describe_history(last: Mapping[ArmWeights, float], unit: str, digits: int, what: str) -> str:
    """`last` is the last validation value of each row, averaged over seeds."""
    name, baseline = next(
        (t.baseline_name, t.baseline) for t in (IMAGES, WORDS) if t.baseline in last
    )
    sgd = last[baseline]
    parts = []
    for arm in dict.fromkeys(arm for arm, kind in last if kind == "swa" and arm in AVERAGING_ARMS):
        iterate, average = last[arm, "iterate"], last[arm, "swa"]
        change = "below" if average < iterate else "not below"
        against = "below" if average < sgd else "not below"
        parts.append(
            f"the {'SWA' if arm == 'swa' else arm} arm's average ends at {rounded(average, digits)}{unit}, "
            f"{change} its own iterate ({rounded(iterate, digits)}{unit}) and {against} {name}'s"
        )
    start = f"Validation {what}: {name} ends at {rounded(sgd, digits)}{unit}"
    return "; ".join([start, *parts]) + "."


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
            f"{name} is {sure:.1f}% sure and {right:.1f}% right (calibration error {ece[name]:.1f}%)"
        )
    return "; ".join(parts) + "."


def describe_line(land: Landscape) -> str:
    """Where along the line each curve is lowest."""
    t = land.line.positions
    loss, error = land.line.values[LOSS], land.line.values[ERROR]
    at_loss, at_error = float(t[loss.argmin()]), float(t[error.argmin()])
    at = {name: int(np.abs(t - place).argmin()) for name, place in (("SGD", 0), ("SWA", 1))}
    ends = (
        f"SGD has {loss[at['SGD']]:.3f} nats and {error[at['SGD']]:.1f}%, "
        f"SWA {loss[at['SWA']]:.3f} nats and {error[at['SWA']]:.1f}%"
    )
    if at_error > at_loss and error[at["SWA"]] <= error[at["SGD"]]:
        shift = "the test error is lowest farther towards SWA than the training loss is"
    elif error[at["SWA"]] <= error[at["SGD"]]:
        shift = (
            "the two lowest points are not shifted in SWA's favour, though its error is not higher"
        )
    else:
        shift = "SWA has the higher error on these images: averaging did not help"
    return (
        f"Training loss is lowest at {_signed(at_loss)}, test error at {_signed(at_error)} (0 is SGD, "
        f"1 is SWA); {ends}: {shift}."
    )


def _signed(value: float) -> str:
    return rounded(value, 2)


def describe_rays(rays: Mapping[str, Rays]) -> str:
    """How much the training loss rises up to the end of the rays, mean over rays."""
    rise = {name: _rise(value) for name, value in rays.items()}
    reach = float(next(iter(rays.values())).distances[-1])
    listed = "{:.3f} nats from {}, {:.3f} from the {} and {:.3f} from {}".format(
        *(part for name, value in rise.items() for part in (value, name))
    )
    sgd, swa = rise["SGD"], rise["SWA"]
    if swa < sgd:
        end = f"SWA is flatter than SGD, by a factor of {sgd / max(swa, 1e-9):.1f}"
        if rise["last iterate"] < sgd - (sgd - swa) / 3:
            end += "; so is the last iterate: the high rate contributes to it, not averaging alone"
    else:
        end = "SWA is not flatter than SGD"
    return f"At distance {reach:.1f} the training loss has risen by {listed}: {end}."


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
        f"The highest barrier is {height:.4f} nats, {where}, {100 * share:.1f}% of the loss at its "
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
        f"a lower test error than {better} of them ({loss:.3f} nats and {error:.1f}%, theirs "
        f"{iterates[LOSS].mean():.3f} and {iterates[ERROR].mean():.1f}% on average)"
    )
    end = "it is inside, they are at the walls" if 2 * below > n else "averaging did not help here"
    return f"{text}: {end}; it is {land.average[2]:.2f} away from this plane."
