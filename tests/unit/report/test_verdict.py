"""The beginning of the page is true of the numbers: every sentence is read back."""

import re

import pytest
from reference.tiny_run import make_run

from polyak.reference_run.run import Run
from polyak.report import verdict
from polyak.report.budget import Budget, budget_of
from polyak.report.sentences import difference, found
from polyak.report.tables import Finals
from polyak.study.paired import Estimate, paired


def finals(**errors):
    """Three seeds: errors of sgd, half, and of the swa arm's iterate, EMA and SWA; NLL is a thirtieth."""
    rows = {"sgd": ("sgd", "iterate"), "half": ("half", "iterate")}
    rows |= {kind: ("swa", kind) for kind in ("iterate", "ema", "swa")}
    return Finals(
        {
            "arm": rows[name][0], "weights": rows[name][1], "seed": seed, "error": error,
            "nll": error / 30, "nll_scaled": error / 31, "ece": 1.0,
        }
        for name, values in errors.items()
        for seed, error in enumerate(values)
    )  # fmt: skip


SGD, BETTER, WORSE, SAME = (
    (12.0, 12.4, 12.2),
    (11.0, 11.5, 11.2),
    (13.0, 13.5, 13.2),
    (11.0, 13.4, 12.3),
)


@pytest.mark.parametrize(
    ("swa", "said"),
    [
        (BETTER, "Averaging helped here: its error is lower"),
        (WORSE, "Averaging did not help here"),
        (SAME, "No difference was found between averaging and annealing here."),
        ((11.0,), "One seed shows no spread"),
    ],
)
def test_the_verdict(swa, said):
    assert verdict.verdict(finals(sgd=SGD, swa=swa), "swa").startswith(said)


def read_back(sentence, found):
    """What a sentence says of a difference is what the records say."""
    if found.sign == 0:
        assert "no difference found" in sentence
    else:
        low, high = map(float, re.search(r"95% interval ([\d.]+) to ([\d.]+)", sentence).groups())
        assert ("below" if found.mean < 0 else "above") in sentence
        assert (low + high) / 2 == pytest.approx(abs(found.mean), abs=0.011)
        assert (high - low) / 2 == pytest.approx(found.half_width(), abs=0.011)
    assert f"{found.n} seeds" in sentence


@pytest.mark.parametrize("swa", [BETTER, WORSE, SAME])
@pytest.mark.parametrize("half", [BETTER, WORSE, SAME])
def test_the_lines_read_back(swa, half):
    iterate = tuple(error + 3 for error in swa)
    lines = dict(
        line.split(": ", 1)
        for line in verdict.lines(
            finals(sgd=SGD, half=half, iterate=iterate, ema=swa, swa=swa), "swa"
        )
    )
    assert list(lines) == ["SWA", "EMA", "Iterate", "Half the length", "NLL"]
    read_back(lines["SWA"], paired(swa, SGD))
    read_back(lines["EMA"], paired(swa, SGD))
    read_back(lines["Half the length"], paired(half, SGD))
    assert "3.00 points above the SWA of its run" in lines["Iterate"]
    nll = lines["NLL"].split(";")[0]
    read_back(nll, paired([e / 30 for e in swa], [e / 30 for e in SGD]))


@pytest.mark.parametrize(("mean", "expected"), [(2.224, 0), (2.234, 1), (-2.224, 0), (-2.3, -1)])
def test_nothing_is_found_that_does_not_show(mean, expected):
    value = Estimate(mean, 2.22 / 4.3027, 3)  # ± 2.22
    assert found(value, 2) == expected
    assert ("no difference found" in difference("a", "b", value, "points", 2)) == (expected == 0)


def budget(ema, half=((2, 12.0),), sgd=((4, 11.0),), seeds=3):
    by_seed = lambda values: {seed: dict(values) for seed in range(seeds)}  # noqa: E731
    curve = list(enumerate(ema, start=1))
    averaged = {"iterate": by_seed(curve), "ema": by_seed(curve)}
    return Budget(4, averaged, {"sgd": by_seed(sgd), "half": by_seed(half)}, is_constant=True)


def test_shares_are_first_epochs_over_the_budget_and_not_reached_is_an_answer():
    whole, half, at_half, follows = verdict.shares(budget([14.0, 12.0, 11.0, 10.5]))
    assert "has it after 75% ± 0% of the budget (mean over 3 seeds, 95% interval)" in whole
    assert "has it after 50% ± 0%" in half
    assert "no difference found between the EMA and the run annealed in that half" in at_half
    assert "they save training too" in follows  # half of the length is a point behind
    never, *_ = said = verdict.shares(budget([14.0, 12.0, 12.0, 11.5]))
    assert "does not reach it in any of 3 seeds" in never
    assert not any("What follows" in sentence for sentence in said)


def test_where_half_of_the_length_does_as_well_no_training_is_saved():
    said = verdict.shares(budget([14.0, 12.0, 11.0, 10.5], half=((2, 11.0),)))
    assert "That they save training is not shown here" in said[-1]
    assert "no difference found" in said[-1]


def test_a_share_that_some_seeds_miss_says_how_many():
    values = budget([14.0, 12.0, 11.0, 10.5])
    values.annealed["sgd"][0][4] = 5.0
    reached = values.reached("ema", "sgd")
    assert (reached.n_reached, reached.n_seeds) == (2, 3)
    assert "in 2 of 3 seeds, and does not reach it in 1" in verdict.describe_reached(reached)


def test_the_budget_of_a_run_is_one_run_up_to_the_branch(tmp_path):
    run = Run(make_run(tmp_path / "run"))
    found = budget_of(run)
    assert found.is_constant
    assert list(found.averaged["ema"][1]) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(found.averaged["swa"][1]) == [6, 7, 8]
    assert list(found.annealed["sgd"][1]) == [5, 6, 7, 8]
    assert list(found.annealed["half"][1]) == [3, 4]
    other = Run(make_run(tmp_path / "late", branch_at=0.75, arms=("sgd", "swa")))
    assert not budget_of(other).is_constant  # it leaves SGD when that is half annealed
    assert verdict.shares(budget_of(other)) == []
