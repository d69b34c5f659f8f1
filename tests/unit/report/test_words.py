"""What the page of a language model says is true of its numbers: sentences are read back."""

import pytest

from polyak.report import words
from polyak.report.budget import Budget
from polyak.report.sentences import Rates, describe_history, describe_schedule, describe_table
from polyak.report.tables import IMAGES, WORDS, Finals, row_label
from polyak.study.paired import paired

ROWS = {"cosine": ("cosine", "iterate"), "inside": ("cosine", "swa")}
ROWS |= {kind: ("constant", kind) for kind in ("iterate", "ema", "power", "swa", "wsm")}
COSINE, LOWER, HIGHER, SAME = (
    (1.850, 1.854, 1.852), (1.830, 1.835, 1.832), (1.870, 1.875, 1.872), (1.840, 1.864, 1.853),
)  # fmt: skip
INSIDE = "Inside the decay, minus the cosine run's last weights"


def finals(rise8=0.3, rise4=40.0, **losses):
    return Finals(
        {
            "arm": ROWS[name][0], "weights": ROWS[name][1], "seed": seed, "nll": nll, "error": 30 * nll,
            "int8_rise": rise8 + 0.01 * seed, "int4_rise": (20 if name == "swa" else rise4) + seed,
        }
        for name, values in losses.items()
        for seed, nll in enumerate(values)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("swa", "said"),
    [
        (LOWER, "Averaging at a constant rate ended lower than the cosine decay here."),
        (HIGHER, "The cosine decay ended lower than averaging at a constant rate here."),
        (SAME, "No difference was found between averaging"),
        ((1.8,), "One seed shows no spread"),
    ],
)
def test_the_verdict(swa, said):
    text = words.verdict(finals(cosine=COSINE, swa=swa, ema=swa, iterate=HIGHER), "constant")
    assert text.startswith(said)
    value = paired(swa, COSINE[: len(swa)])
    shown = f"{value.mean:+.4f}".replace("-", "−")
    assert f"SWA minus cosine {shown}" in text
    assert f"a cosine decay over the same length {sum(COSINE) / 3:.4f}" in text


def test_no_verdict_without_both():
    assert (
        words.verdict(finals(swa=LOWER), "constant")
        == "No seed has both an average and a cosine run."
    )


@pytest.mark.parametrize(("values", "where"), [(LOWER, "below"), (HIGHER, "above"), (SAME, None)])
def test_the_lines_read_back(values, where):
    rows = {
        "cosine": COSINE,
        "inside": values,
        "ema": values,
        "power": values,
        "swa": values,
        "wsm": values,
    }
    lines = words.lines(finals(**rows, iterate=tuple(v + 0.1 for v in values)), "constant")
    named = dict(line.split(": ", 1) for line in lines)
    assert list(named)[:6] == [
        "EMA", "Power EMA", "SWA", "WSM average", "Iterate", INSIDE,
    ]  # fmt: skip
    for name in ("EMA", "Power EMA", "SWA", "WSM average"):
        assert ("no difference found" in named[name]) == (where is None)
        assert where is None or f"nats per byte {where}" in named[name]
    value = paired(values, COSINE)
    mean, half = (f"{x:.4f}".replace("-", "−") for x in (value.mean, value.half_width()))
    sign = "" if value.mean < 0 else "+"
    assert named[INSIDE] == f"the SWA {sign}{mean} ± {half} ({where or 'no difference found'})."
    assert "0.1000 nats per byte above the SWA of its run in each of 3 seeds" in named["Iterate"]


def test_the_rise_of_rounded_weights():
    eight, four = words.lines(finals(cosine=COSINE, swa=LOWER, iterate=HIGHER), "constant")[-2:]
    assert "SWA +0.31, its iterate +0.31, cosine +0.31" in eight
    assert eight.count("are the same in each of 3 seeds") == 2
    assert "SWA +21.0, its iterate +41.0, cosine +41.0" in four
    assert four.count("SWA's is 20.0 millinats below that of") == 2


def budget(quarter, half, cosine, ema):
    """Eight epochs, three seeds; the runs end after 2, 4 and 8 of them."""
    ends = {"quarter": (2, quarter), "half": (4, half), "cosine": (8, cosine)}
    spread, more = (0.0, 0.002, -0.002), (0.0, 0.001, 0.001)
    annealed = {
        arm: {seed: dict.fromkeys(range(1, n + 1), end + spread[seed]) for seed in range(3)}
        for arm, (n, end) in ends.items()
    }
    averaged = {
        kind: {
            seed: {e + 1: v + spread[seed] + more[seed] for e, v in enumerate(values)}
            for seed in range(3)
        }
        for kind, values in {"iterate": [9.0] * 8, "ema": ema}.items()
    }
    return Budget(8, averaged, annealed, is_constant=True)


FALLING = (3.0, 2.5, 2.3, 2.2, 2.1, 2.05, 2.0, 1.9)


def test_the_shares_and_every_length():
    said = words.shares(budget(2.51, 2.26, 1.96, FALLING))
    reached = "is reached by the EMA after {} of the budget in each of 3 seeds (measured after each epoch, 13% of the budget)."
    assert said[0].endswith("annealed in a quarter of the length ends " + reached.format("25%"))
    assert said[1].endswith("annealed in half the length ends " + reached.format("50%"))
    assert said[2].endswith("annealed over the whole length ends " + reached.format("100%"))
    assert said[3].startswith(
        "At a quarter of the budget, validation loss minus that of the cosine run"
    )
    assert said[3].endswith("the EMA −0.0093 ± 0.0014 (below).")
    assert said[4].endswith("the EMA −0.0593 ± 0.0014 (below).")
    assert said[-1].endswith(
        "At none of these lengths is every average found to be behind the cosine run."
    )


def test_lengths_at_which_the_decay_is_ahead_are_named():
    said = words.shares(budget(2.4, 2.25, 1.8, FALLING))
    assert said[-1].endswith(
        "Not at a quarter of the budget and at its end, where every average is behind."
    )
    assert "by the EMA in none of 3 seeds (" in said[2]


def test_an_average_is_asked_only_where_it_has_begun():
    given = budget(2.4, 2.25, 1.8, FALLING)
    late = {seed: {7: 1.9, 8: 1.7} for seed in range(3)}
    said = words.shares(
        Budget(8, {**given.averaged, "swa": late}, given.annealed, is_constant=True)
    )
    assert ["SWA" in sentence for sentence in said] == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    assert "by the EMA in none of 3 seeds, by the SWA after 100%" in said[2]


def test_nothing_is_said_of_a_rate_that_moved():
    given = budget(2.4, 2.25, 1.8, FALLING)
    assert words.shares(Budget(8, given.averaged, given.annealed, is_constant=False)) == []


def test_rows_are_named_by_their_task():
    assert finals(cosine=COSINE).terms is WORDS
    assert row_label(("cosine", "iterate"), WORDS) == "cosine"
    assert row_label(("quarter", "iterate"), WORDS) == "cosine, quarter length"
    assert row_label(("half", "iterate"), IMAGES) == "SGD, half length"
    assert row_label(("constant", "power"), WORDS) == "constant arm, power EMA"


def test_the_sentences_of_images_have_words_for_words():
    table = finals(cosine=LOWER, swa=HIGHER)
    assert describe_table(table) == (
        f"Lowest test loss: cosine, {sum(LOWER) / 3:.4f}; the lowest average (constant arm, SWA) is 0.0400 nats per byte "
        f"above cosine in each of 3 seeds, which shows no spread. Lowest next byte wrong: cosine, "
        f"{10 * sum(LOWER):.2f}%; the lowest average (constant arm, SWA) is 1.20 points above cosine in each of 3 seeds, "
        "which shows no spread."
    )
    rates = {arm: Rates(0.008, 0.0, 1) for arm in ("cosine", "half", "quarter")}
    said = describe_schedule(rates | {"constant": Rates(0.008, 0.008, 1)}, {"constant": 193})
    assert said == (
        "The cosine arm warms up to 0.008 in 1 epoch, then falls down to 0, and again in half and in a quarter of the "
        "budget; the constant arm warms up to 0.008 in 1 epoch and stays there and averages 193 sets of weights."
    )
    losses = {
        ROWS["cosine"]: COSINE, ROWS["inside"]: SAME, ("constant", "iterate"): HIGHER, ("constant", "swa"): LOWER,
    }  # fmt: skip
    last = {row: dict(enumerate(values)) for row, values in losses.items()}
    told = describe_history(last, WORDS.metrics[0], "loss")
    own, other = paired(LOWER, HIGHER), paired(LOWER, COSINE)
    assert told.startswith(
        "Validation loss: cosine ends at 1.8520 nats per byte; the constant arm's average ends at 1.8323 nats per byte, "
        f"its iterate at 1.8723 nats per byte: the average is {-own.mean:.4f} nats per byte below its own iterate"
    )
    assert told.endswith(
        f"the average is {-other.mean:.4f} nats per byte below cosine (95% interval "
        f"{-other.mean - other.half_width():.4f} to {-other.mean + other.half_width():.4f}, 3 seeds)."
    )
