"""Is averaging worth it in a long run over few data? `polyak train long`, tuned, over paired seeds.

    python benchmarks/evidence_long.py                 # trains everything: about 2 core-hours
    python benchmarks/evidence_long.py --quick --output /tmp/long.jsonl     # a smoke test
    python benchmarks/evidence_long.py --write-docs    # the tables into docs/should-i-average.md

200 epochs over 6,000 images, the regime in which averaging was proposed. SGD, the constant rate and the cycles have
each their own rate: the best of three, equal trials, by the validation error of a seed that is not reported (NLL
where equal; of SGD's last weights, of the SWA of the others). The run annealed in half the length has SGD's. Then
five other seeds, on the test images. After an interruption it continues in --work.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from evidence_docs import Records, finals_table, rates_table, tell

from polyak.reference_run import Recipe, Run, load_recipe, train
from polyak.report import verdict
from polyak.report.budget import ANNEALED, Budget, budget_of
from polyak.report.sentences import how_measured, when
from polyak.report.tables import Finals

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence-long.jsonl"
TUNING_SEED = 100
RATES = (0.05, 0.1, 0.2)
CHOSEN_BY = {"sgd": "iterate", "swa": "swa", "cyclic": "swa"}
"""The weights of each arm whose validation error decides on its rate."""
LOWEST = 0.01
"""The rate at which cycles end."""


def run(folder: Path, shorter: dict[str, Any], **fields: Any) -> Run:
    """A run of the recipe with some fields, or what is there of it, finished."""
    print(f"{folder}: {fields}", flush=True)
    recipe = load_recipe("long", {"cycle_low": LOWEST, "record_intervals": 0, **shorter, **fields})
    return train(recipe, folder, resume=True, jobs=2)


def tune(work: Path, shorter: dict[str, Any]) -> Records:
    """The validation figures of every arm at every rate, on one seed."""
    found = []
    for rate in RATES:
        done = run(work / f"rate-{rate}", shorter, rate=rate, swa_rate=rate, cycle_high=rate,
                   arms=tuple(CHOSEN_BY), first_seed=TUNING_SEED, seeds=1)  # fmt: skip
        for arm, kind in CHOSEN_BY.items():
            last = done.epochs(arm=arm)[-1]["evaluations"][kind]
            found.append({"kind": "tuning", "arm": arm, "rate": rate, **last})
    return found


def best_rates(tuning: Records) -> dict[str, float]:
    """The rate of the lowest error of each arm."""
    found = {}
    for arm in CHOSEN_BY:
        trials = [trial for trial in tuning if trial["arm"] == arm]
        found[arm] = min(trials, key=lambda trial: (trial["error"], trial["nll"]))["rate"]
    return found


def summary(records: Records) -> str:
    """Sentences and tables, as Markdown."""
    tuning = [record for record in records if record["kind"] == "tuning"]
    with tempfile.TemporaryDirectory() as folder:
        done = as_run(records, Path(folder))
        finals, budget = Finals(done.finals()), budget_of(done)
    said = [*(shares(budget, done.recipe) if budget else []), *verdict.lines(finals, "swa")]
    said += [f"Cycles, {line}" for line in verdict.lines(finals, "cyclic")[:2]]
    lines = [verdict.verdict(finals, "swa"), "", *(f"- {sentence}" for sentence in said)]
    lines += ["", *finals_table("test images", finals)]
    lines += ["", f"(mean ± standard error, {done.recipe.seeds} seeds)", ""]
    title = "rate: validation error of one seed, % (chosen in bold)"
    return "\n".join([*lines, *rates_table(title, tuning, best_rates(tuning), "error", 2)])


def shares(budget: Budget, recipe: Recipe) -> list[str]:
    """From which part of the budget on each average has the error at the end of each annealed run."""
    left = "" if budget.is_constant else f", {recipe.swa_rate:g} from half of the budget on"
    whose = f"of the averaging run (rate {recipe.rate:g}{left})"
    said = []
    for arm in budget.annealed:
        reached = [budget.reached(kind, arm) for kind in ("ema", "swa")]
        said.append(
            f"The validation error at the end of SGD {ANNEALED[arm]} is reached by the EMA {whose} "
            f"{when(reached[0])}, by its SWA {when(reached[1])} {how_measured(reached)}."
        )
    return said


def as_run(records: Records, folder: Path) -> Run:
    """The run that the results file tells of."""
    (folder / "recipe.toml").write_text(next(r["toml"] for r in records if r["kind"] == "recipe"))
    of_run = [r for r in records if r["kind"] not in {"tuning", "recipe"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in of_run))
    return Run(folder)


def measure(work: Path, seeds: int, quick: bool) -> Records:
    """Tune, train every arm at its own rate, and give all records."""
    shorter = {"epochs": 8} if quick else {}
    tuning = tune(work, shorter)
    rates = best_rates(tuning)
    done = run(work / "final", shorter, rate=rates["sgd"], swa_rate=rates["swa"],
               cycle_high=rates["cyclic"], seeds=seeds)  # fmt: skip
    toml = (work / "final" / "recipe.toml").read_text()
    return [*tuning, {"kind": "recipe", "toml": toml}, *done.records()]


if __name__ == "__main__":
    tell("long", __doc__, RESULTS, measure, summary)
