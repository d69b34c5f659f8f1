"""The beginning of a run's page: one plain verdict, and a line for each thing that was asked.

A difference is found if its 95% interval, as it is shown, does not reach 0; nothing else is claimed. A metric has as
many digits here as in the table, so that both find the same.
"""

from __future__ import annotations

from polyak.maths.numbers import count, plus_minus, rounded
from polyak.report.budget import ANNEALED, Budget
from polyak.report.sentences import difference, found, how_measured, when
from polyak.report.tables import BASELINE, METRICS, Finals
from polyak.study.paired import Estimate, paired

_HALF = ("half", "iterate")
_DIGITS = {metric.key: metric.digits for metric in METRICS}
_ERROR, _NLL = _DIGITS["error"], _DIGITS["nll"]


def verdict(finals: Finals, arm: str) -> str:
    """Whether averaging helped, and the figures of it."""
    average = (arm, "swa")
    error, nll = (finals.difference(average, key) for key in ("error", "nll"))
    if error is None or nll is None:
        return "No seed has both an average and an annealed run."
    values = {
        row: f"{rounded(finals.mean(row, 'error').mean, _ERROR)}% and "
        f"{rounded(finals.mean(row, 'nll').mean, _NLL)} nats"
        for row in (average, BASELINE)
    }
    return (
        f"{_plainly(error, nll)} Test error and NLL: the average (SWA) {values[average]}, annealed SGD "
        f"of the same length {values[BASELINE]}; differences {_interval(error, _ERROR, 'points')} and "
        f"{_interval(nll, _NLL, 'nats')}{'' if error.n == 1 else ' at 95%'}, {count(error.n, 'seed')}."
    )


def _plainly(error: Estimate, nll: Estimate) -> str:
    if error.n == 1:
        return "One seed shows no spread, so nothing is found either way."
    match found(error, _ERROR), found(nll, _NLL):
        case -1, _:
            return "Averaging helped here: its error is lower than that of annealing."
        case 1, _:
            return "Averaging did not help here: annealing has the lower error."
        case _, -1:
            return "Averaging helped the likelihood here; in error no difference was found."
        case _, 1:
            return "Averaging did not help here: its likelihood is worse, and in error no difference was found."
    return "No difference was found between averaging and annealing here."


def lines(finals: Finals, arm: str) -> list[str]:
    """One line each on SWA, EMA, the iterate, the arm of half the length, and NLL."""
    average, ema, iterate = (arm, "swa"), (arm, "ema"), (arm, "iterate")
    own = finals.difference(iterate, "error", to=average)
    said = [
        ("SWA", _points(finals, average, "SWA")),
        ("EMA", _points(finals, ema, "the EMA")),
        ("Iterate", difference("the last iterate", "the SWA of its run", own, "points", _ERROR)),
    ]
    if _HALF in finals.rows:
        said.append(
            ("Half the length", _points(finals, _HALF, "SGD annealed in half of the budget"))
        )
    nll, scaled = (finals.difference(average, key) for key in ("nll", "nll_scaled"))
    before, after = (
        difference("SWA", "annealed SGD", value, "nats", _NLL) for value in (nll, scaled)
    )
    said.append(("NLL", f"{before}; temperature-scaled, {after}"))
    return [f"{name}: {text}." for name, text in said]


def _points(finals: Finals, row: tuple[str, str], name: str) -> str:
    value = finals.difference(row, "error")
    return "in test error, " + difference(name, "annealed SGD", value, "points", _ERROR)


def _interval(value: Estimate, digits: int, unit: str) -> str:
    text, half = rounded(value.mean, digits, signed=True), value.half_width()
    if half is not None:
        return f"{text} {plus_minus(half, digits)} {unit}"
    return f"{text} {unit}" if value.n == 1 else f"{text} {unit} in each seed (no spread)"


def shares(budget: Budget) -> list[str]:
    """From when on the average is as good as each annealed run, and what that is worth."""
    if not budget.is_constant:
        return []
    said = []
    for arm in budget.annealed:
        reached = budget.reached("ema", arm)
        said.append(
            f"The validation error at the end of SGD {ANNEALED[arm]}: the EMA of the constant rate reaches it "
            f"{when(reached)} {how_measured([reached])}."
        )
    half = budget.epochs // 2
    if "half" in budget.annealed and (value := budget.difference("ema", half, "half")):
        said.append(
            "At half of the budget, in validation error, "
            + difference("the EMA", "the run annealed in that half", value, "points", _ERROR)
            + "."
        )
    return [*said, *_what_follows(budget)]


def _what_follows(budget: Budget) -> list[str]:
    """For whoever does not know the length in advance; with its control, if there is one."""
    reached = budget.reached("ema", "sgd")
    if reached.n_reached < reached.n_seeds or reached.n_seeds == 1 or "half" not in budget.annealed:
        return []
    ends = budget.end("half"), budget.end("sgd")
    seeds = sorted(ends[0].keys() & ends[1].keys())
    control = _paired(ends, seeds)
    text = difference(
        "the run annealed in half of the budget", "the whole one", control, "points", _ERROR
    )
    if found(control, _ERROR) > 0:
        return [
            "What follows if you do not know the length in advance: a constant rate and an average need "
            f"no end to be fixed, and here they save training too, because in validation error, {text}."
        ]
    return [
        "What follows if you do not know the length in advance: a constant rate and an average need no "
        f"end to be fixed. That they save training is not shown here: in validation error, {text}."
    ]


def _paired(ends: tuple[dict[int, float], dict[int, float]], seeds: list[int]) -> Estimate:
    return paired(*([values[seed] for seed in seeds] for values in ends))
