"""The beginning of the page is true of the numbers: every sentence is read back."""

import re

import pytest
from reference.tiny_run import make_run

from polyak.reference_run.run import Run
from polyak.report import verdict
from polyak.report.budget import Budget, Reached, budget_of
from polyak.report.sentences import difference, found, how_measured, when
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


def test_seeds_that_agree_to_the_last_digit_show_no_spread():
    """Errors of a few images: 0.57 points in both seeds is no interval of no width."""
    text = verdict.verdict(finals(sgd=(16.8, 17.4), swa=(17.375, 17.975)), "swa")
    assert text.startswith("No difference was found")
    assert "differences +0.58 points in each seed (no spread) and" in text
    line = verdict.lines(finals(sgd=(16.8, 17.4), swa=(17.375, 17.975)), "swa")[0]
    assert line == (
        "SWA: in test error, SWA is 0.58 points above annealed SGD in each of 2 seeds, which shows no spread."
    )


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


def budget(ema, half=((2, 12.0),), sgd=((4, 11.0),), noise=(0.0, 0.0, 0.0)):
    """Four epochs; the seeds differ by the noise in what the half run ends with."""
    by_seed = lambda values: {seed: dict(values) for seed in range(len(noise))}  # noqa: E731
    curve = list(enumerate(ema, start=1))
    averaged = {"iterate": by_seed(curve), "ema": by_seed(curve)}
    halves = {seed: {e: v + more for e, v in half} for seed, more in enumerate(noise)}
    return Budget(4, averaged, {"sgd": by_seed(sgd), "half": halves}, is_constant=True)


FALLING = [14.0, 12.0, 11.0, 10.5]


def test_shares_are_first_epochs_over_the_budget_and_not_reached_is_an_answer():
    whole, half, at_half, follows = verdict.shares(budget(FALLING, noise=(0.0, 0.1, 0.05)))
    measured = "(measured after each epoch, 25% of the budget)."
    assert whole.endswith(f"reaches it after 75% of the budget in each of 3 seeds {measured}")
    assert half.endswith(f"reaches it after 50% of the budget in each of 3 seeds {measured}")
    assert "no difference found between the EMA and the run annealed in that half" in at_half
    assert "they save training too" in follows  # half of the length is a point behind
    never, *_ = said = verdict.shares(budget([14.0, 12.0, 12.0, 11.5]))
    assert "reaches it in none of 3 seeds" in never
    assert not any("What follows" in sentence for sentence in said)


def test_where_half_of_the_length_does_as_well_no_training_is_saved():
    said = verdict.shares(budget(FALLING, half=((2, 11.0),), noise=(0.1, 0.0, -0.1)))
    assert "That they save training is not shown here" in said[-1]
    assert "no difference found" in said[-1]


def test_nothing_follows_from_seeds_without_spread():
    said = verdict.shares(budget(FALLING))  # a point behind in each of the seeds, to the last digit
    assert "That they save training is not shown here" in said[-1]
    assert "1.00 points above the whole one in each of 3 seeds, which shows no spread" in said[-1]


def test_a_share_that_some_seeds_miss_says_how_many():
    values = budget(FALLING)
    values.annealed["sgd"][0][4] = 5.0
    reached = values.reached("ema", "sgd")
    assert (reached.n_reached, reached.n_seeds) == (2, 3)
    assert when(reached) == "after 75% of the budget in 2 of 3 seeds (at no time in the other)"


@pytest.mark.parametrize(
    ("shares", "n_seeds", "said"),
    [
        ((), 1, "at no time"),
        ((), 3, "in none of 3 seeds"),
        ((0.25,), 1, "after 25% of the budget"),
        ((0.25,), 2, "after 25% of the budget in 1 of 2 seeds (at no time in the other)"),
        ((0.25, 0.3), 4, "after 25% to 30% of the budget in 2 of 4 seeds (at no time in the other 2)"),
        ((0.25, 0.25), 2, "after 25% of the budget in each of 2 seeds"),
        ((0.25, 0.75), 2, "after 25% to 75% of the budget in 2 seeds"),  # 50% ± 318%
        ((0.9, 0.95, 0.95), 3, "after 90% to 95% of the budget in 3 seeds"),  # 93% ± 7%
        ((0.4, 0.45, 0.45), 3, "after 43% ± 7% of the budget"),
        ((0.4,) * 9 + (0.45,), 10, "after 41% ± 5% of the budget"),  # ± 1%, measured every 5%
    ],
)  # fmt: skip
def test_when_an_average_is_as_good_says_no_more_than_was_measured(shares, n_seeds, said):
    reached = Reached(shares, n_seeds, 0.05)
    assert when(reached) == said
    told = "± is the 95% interval of the mean over" in how_measured([reached])
    assert told == ("±" in said)


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
