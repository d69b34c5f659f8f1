"""The beginning of a run's page: one plain verdict, and a line for each thing that was asked.

A difference is found if its 95% interval, as it is shown, does not reach 0; nothing else is claimed.
"""

from __future__ import annotations

from polyak.report.budget import ANNEALED, Budget, Reached
from polyak.report.numbers import count, rounded
from polyak.report.sentences import difference, found
from polyak.report.tables import BASELINE, Finals
from polyak.study.paired import Estimate, paired

_HALF = ("half", "iterate")


def verdict(finals: Finals, arm: str) -> str:
    """Whether averaging helped, and the figures of it."""
    average = (arm, "swa")
    error, nll = (finals.difference(average, key) for key in ("error", "nll"))
    if error is None or nll is None:
        return "No seed has both an average and an annealed run."
    values = {
        row: f"{rounded(finals.mean(row, 'error').mean, 2)}% and "
        f"{rounded(finals.mean(row, 'nll').mean, 3)} nats"
        for row in (average, BASELINE)
    }
    return (
        f"{_plainly(error, nll)} Test error and NLL: the average (SWA) {values[average]}, annealed SGD "
        f"of the same length {values[BASELINE]}; differences {_interval(error, 2, 'points')} and "
        f"{_interval(nll, 3, 'nats')}{'' if error.n == 1 else ' at 95%'}, {count(error.n, 'seed')}."
    )


def _plainly(error: Estimate, nll: Estimate) -> str:
    if error.n == 1:
        return "One seed shows no spread, so nothing is found either way."
    match found(error, 2), found(nll, 3):
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
        ("Iterate", difference("the last iterate", "the SWA of its run", own, "points", 2)),
    ]
    if _HALF in finals.rows:
        said.append(
            ("Half the length", _points(finals, _HALF, "SGD annealed in half of the budget"))
        )
    nll, scaled = (finals.difference(average, key) for key in ("nll", "nll_scaled"))
    after = difference("SWA", "annealed SGD", scaled, "nats", 3)
    said.append(
        ("NLL", f"{difference('SWA', 'annealed SGD', nll, 'nats', 3)}; temperature-scaled, {after}")
    )
    return [f"{name}: {text}." for name, text in said]


def _points(finals: Finals, row: tuple[str, str], name: str) -> str:
    value = finals.difference(row, "error")
    return "in test error, " + difference(name, "annealed SGD", value, "points", 2)


def _interval(value: Estimate, digits: int, unit: str) -> str:
    half = value.half_width()
    spread = "" if half is None else f" ± {rounded(half, digits)}"
    return f"{rounded(value.mean, digits, signed=True)}{spread} {unit}"


def shares(budget: Budget) -> list[str]:
    """From when on the average is as good as each annealed run, and what that is worth."""
    if not budget.is_constant:
        return []
    said = [
        f"The validation error at the end of SGD {ANNEALED[arm]}: the EMA of the constant rate "
        f"{describe_reached(budget.reached('ema', arm))}."
        for arm in budget.annealed
    ]
    half = budget.epochs // 2
    if "half" in budget.annealed and (value := budget.difference("ema", half, "half")):
        said.append(
            "At half of the budget, in validation error, "
            + difference("the EMA", "the run annealed in that half", value, "points", 2)
            + "."
        )
    return [*said, *_what_follows(budget)]


def describe_reached(reached: Reached) -> str:
    """`has it after 31% ± 9% of the budget (mean over 3 seeds, 95% interval)`, or that it does not."""
    seeds = count(reached.n_seeds, "seed")
    if reached.share is None:
        return (
            f"does not reach it in any of {seeds}" if reached.n_seeds > 1 else "does not reach it"
        )
    half = reached.share.half_width()
    spread = "" if half is None else f" ± {rounded(100 * half, 0)}%"
    text = f"has it after {rounded(100 * reached.share.mean, 0)}%{spread} of the budget"
    missing = reached.n_seeds - reached.n_reached
    if missing:
        return f"{text} in {reached.n_reached} of {seeds}, and does not reach it in {missing}"
    return f"{text} ({_over(reached.n_seeds)})"


def _over(n: int) -> str:
    return "1 seed" if n == 1 else f"mean over {count(n, 'seed')}, 95% interval"


def _what_follows(budget: Budget) -> list[str]:
    """For whoever does not know the length in advance; with its control, if there is one."""
    reached = budget.reached("ema", "sgd")
    if reached.n_reached < reached.n_seeds or reached.n_seeds == 1 or "half" not in budget.annealed:
        return []
    ends = budget.end("half"), budget.end("sgd")
    seeds = sorted(ends[0].keys() & ends[1].keys())
    control = _paired(ends, seeds)
    text = difference(
        "the run annealed in half of the budget", "the whole one", control, "points", 2
    )
    if found(control, 2) > 0:
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
