"""What the page of a language model says: whether averaging at a constant rate replaces the decay, at each length.

As in `verdict`, a difference is found if its 95% interval, as it is shown, does not reach 0, with the digits of
the table.
"""

from __future__ import annotations

from polyak.maths.numbers import count, plus_minus, rounded
from polyak.report.budget import ANNEALED, Budget
from polyak.report.sentences import difference, found, how_measured, short_difference, when
from polyak.report.tables import WORDS_BASELINE, WORDS_METRICS, Finals
from polyak.study.paired import Estimate

_METRICS = {metric.key: metric for metric in WORDS_METRICS}
UNIT, DIGITS = _METRICS["nll"].unit, _METRICS["nll"].digits
AVERAGES = {"ema": "the EMA", "power": "the power EMA", "swa": "the SWA", "wsm": "the WSM average"}
_LENGTHS = {"quarter": "a quarter of the budget", "half": "half of the budget", "cosine": "its end"}


def verdict(finals: Finals, arm: str) -> str:
    """Whether the average of a constant rate replaced the decay over the whole length, and the figures of it."""
    value = finals.difference((arm, "swa"), "nll")
    if value is None:
        return "No seed has both an average and a cosine run."
    rows = {
        "the average of a constant rate (SWA)": (arm, "swa"),
        "its EMA": (arm, "ema"),
        "its last iterate": (arm, "iterate"),
        "a cosine decay over the same length": WORDS_BASELINE,
    }
    means = ", ".join(
        f"{name} {rounded(finals.mean(row, 'nll').mean, DIGITS)}"
        for name, row in rows.items()
        if row in finals.rows
    )
    half = value.half_width()
    spread = "" if half is None else f" {plus_minus(half, DIGITS)} at 95%"
    return (
        f"{_plainly(value)} Test loss in {UNIT}: {means}; SWA minus cosine "
        f"{rounded(value.mean, DIGITS, signed=True)}{spread}, {count(value.n, 'seed')}."
    )


def _plainly(value: Estimate) -> str:
    if value.n == 1:
        return "One seed shows no spread, so nothing is found either way."
    return {
        -1: "Averaging at a constant rate ended lower than the cosine decay here.",
        0: "No difference was found between averaging at a constant rate and a cosine decay here.",
        1: "The cosine decay ended lower than averaging at a constant rate here.",
    }[found(value, DIGITS)]


def lines(finals: Finals, arm: str) -> list[str]:
    """One line on each average, on averages inside the decay, and on the rounding of weights."""
    said = []
    for kind, name in AVERAGES.items():
        if (arm, kind) in finals.rows:
            told = _told(finals, name, (arm, kind), "the cosine run", WORDS_BASELINE)
            said.append(f"{name.removeprefix('the ')}: {told}")
    own = _told(finals, "the last iterate", (arm, "iterate"), "the SWA of its run", (arm, "swa"))
    inside = [
        short_difference(name, finals.difference(("cosine", kind), "nll"), DIGITS)
        for kind, name in AVERAGES.items()
        if ("cosine", kind) in finals.rows
    ]
    said.append(f"Iterate: {own}")
    if inside:
        said.append(f"Inside the decay, minus the cosine run's last weights: {'; '.join(inside)}")
    said += [_rounding(finals, arm, bits) for bits in (8, 4)]
    return [f"{line[0].upper()}{line[1:]}." for line in said]


def _told(finals: Finals, name: str, row: tuple[str, str], other: str, to: tuple[str, str]) -> str:
    return difference(name, other, finals.difference(row, "nll", to=to), UNIT, DIGITS)


def _rounding(finals: Finals, arm: str, bits: int) -> str:
    """By how much rounding to the nearest raises the loss, of the average beside the iterate and the decay."""
    key = f"int{bits}_rise"
    unit, digits = _METRICS[key].unit, _METRICS[key].digits
    average, iterate = (arm, "swa"), (arm, "iterate")
    rises = ", ".join(
        f"{name} {rounded(finals.mean(row, key).mean, digits, signed=True)}"
        for name, row in (("SWA", average), ("its iterate", iterate), ("cosine", WORDS_BASELINE))
        if row in finals.rows
    )
    others = {"that of its iterate": iterate, "that of the cosine run": WORDS_BASELINE}
    told = "; ".join(
        difference("SWA's", name, finals.difference(average, key, to=row), unit, digits)
        for name, row in others.items()
    )
    return f"matrices rounded to {bits} bits raise the loss, in thousandths of a nat per byte: {rises}; {told}"


def shares(budget: Budget) -> list[str]:
    """From when on each average is as good as each cosine run, and what it is worth where that run ends."""
    if not budget.is_constant:
        return []
    said = []
    for arm in budget.annealed:
        reached = {AVERAGES[kind]: budget.reached(kind, arm) for kind in _there(budget, arm)}
        if reached:
            told = ", by ".join(f"{name} {when(it)}" for name, it in reached.items())
            said.append(
                f"At a constant rate, the validation loss with which the cosine run {ANNEALED[arm]} ends is reached "
                f"by {told} {how_measured([*reached.values()])}."
            )
    return [*said, *_at_every_length(budget)]


def _there(budget: Budget, arm: str) -> list[str]:
    """The averages that have begun when an annealed arm ends."""
    end = budget.length(arm)
    return [
        kind
        for kind in AVERAGES
        if any(end in values for values in budget.averaged.get(kind, {}).values())
    ]


def _at_every_length(budget: Budget) -> list[str]:
    """The averages where each cosine run ends, in validation loss, and what follows."""
    said, behind = [], []
    for arm, place in _LENGTHS.items():
        if arm not in budget.annealed:
            continue
        values = {
            kind: budget.difference(kind, budget.length(arm), arm) for kind in _there(budget, arm)
        }
        told = "; ".join(
            short_difference(AVERAGES[kind], value, DIGITS) for kind, value in values.items()
        )
        said.append(
            f"At {place}, validation loss minus that of the cosine run that ends there: {told}."
        )
        if all(value and found(value, DIGITS) > 0 for value in values.values()):
            behind.append(place)
    if budget.n_seeds == 1:
        return [*said, "One seed shows no spread: what follows from it is not told."]
    follows = "At none of these lengths is every average found to be behind the cosine run."
    if behind:
        follows = f"Not at {' and at '.join(behind)}, where every average is behind."
    return [
        *said,
        f"Does averaging at a constant rate replace the decay here, at every length? {follows}",
    ]
