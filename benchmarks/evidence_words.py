"""Does averaging at a constant rate replace the decay of a language model? `polyak train words`, tuned.

    python benchmarks/evidence_words.py                # trains everything: about 15 minutes on 2 quiet cores
    python benchmarks/evidence_words.py --quick --output /tmp/words.jsonl     # a smoke test
    python benchmarks/evidence_words.py --write-docs   # the tables into docs/should-i-average.md

In the report of one run all arms have the same rate. Here the cosines over the whole, half and a quarter of the length
and the constant rate have each their own: the best of three, equal trials, by the validation loss of a seed that is
not reported (of the cosines' last weights, of the constant rate's EMA). Then five other seeds, on the test part of
the text. After an interruption it continues in --work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evidence_docs import Records, finals_table, rates_table, tell

from polyak.reference_run import Run, load_recipe, train
from polyak.report import words
from polyak.report.budget import Budget
from polyak.report.tables import Finals

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence-words.jsonl"
TUNING_SEED = 100
RATES = (0.004, 0.008, 0.016)
ARMS = ("cosine", "half", "quarter", "constant")
QUICK = {"epochs": 8, "epoch_size": 64, "context": 16}


@dataclasses.dataclass(frozen=True)
class Work:
    """Where runs are, how many seeds are reported, and what a smoke shortens."""

    folder: Path
    seeds: int
    shorter: Mapping[str, Any]

    def run(self, name: str, **fields: Any) -> Run:
        """A run of the recipe with some fields, or what is there of it, finished."""
        print(f"{name}: {fields}", flush=True)
        recipe = load_recipe("words", {**self.shorter, **fields})
        return train(recipe, self.folder / name, resume=True, jobs=2)


def tune(work: Work) -> Records:
    """The validation loss of every arm at every rate, on one seed."""
    found = []
    for rate in RATES:
        run = work.run(f"rate-{rate}", rate=rate, swa_rate=rate, first_seed=TUNING_SEED, seeds=1)
        for arm in ARMS:
            last = run.epochs(arm=arm)[-1]["evaluations"]
            nll = last["ema" if arm == "constant" else "iterate"]["nll"]
            found.append({"kind": "tuning", "arm": arm, "rate": rate, "nll": nll})
    return found


def best_rates(tuning: Records) -> dict[str, float]:
    """The rate of the lowest loss of each arm."""
    return {
        arm: min((t for t in tuning if t["arm"] == arm), key=lambda t: t["nll"])["rate"]
        for arm in ARMS
    }


def measure(work: Work, rates: Mapping[str, float]) -> Records:
    """The records of every arm at its own rate; a cosine that a run needs besides is not reported."""
    found: Records = []
    for rate in sorted({rates[arm] for arm in ARMS[:3]}):
        wanted = [arm for arm in ARMS[:3] if rates[arm] == rate]
        if "cosine" in wanted:
            wanted.append("constant")
        arms = [arm for arm in ARMS if arm in {"cosine", *wanted}]
        run = work.run(
            f"final-{rate}", rate=rate, swa_rate=rates["constant"], arms=arms, seeds=work.seeds
        )
        found += [record for record in run.records() if record["arm"] in wanted]
    return found


def budget_of(records: Records) -> Budget:
    """The validation losses over the budget, of the seeds of which every arm was measured."""
    done = {
        arm: {r["seed"] for r in records if r["kind"] == "final" and r["arm"] == arm}
        for arm in ARMS
    }
    seeds = set.intersection(*done.values())
    averaged: dict[str, Any] = {}
    annealed: dict[str, Any] = {arm: {} for arm in ARMS[:3]}
    for record in records:
        if record["kind"] != "epoch" or record["seed"] not in seeds:
            continue
        seed, epoch = record["seed"], record["epoch"]
        for kind, values in record["evaluations"].items():
            if record["arm"] == "constant":
                averaged.setdefault(kind, {}).setdefault(seed, {})[epoch] = values["nll"]
            elif kind == "iterate":
                annealed[record["arm"]].setdefault(seed, {})[epoch] = values["nll"]
    epochs = max(max(values) for values in averaged["iterate"].values())
    return Budget(epochs, averaged, annealed, is_constant=True)


def summary(records: Records) -> str:
    """Sentences and tables, as Markdown."""
    tuning = [r for r in records if r["kind"] == "tuning"]
    finals = Finals(r for r in records if r["kind"] == "final")
    lines = [words.verdict(finals, "constant"), ""]
    lines += [f"- {sentence}" for sentence in words.shares(budget_of(records))]
    lines += [f"- {sentence}" for sentence in words.lines(finals, "constant")]
    lines += ["", *finals_table("test part of the text", finals)]
    seeds = {
        arm: len({r["seed"] for r in records if r["kind"] == "final" and r["arm"] == arm})
        for arm in ARMS
    }
    told = ", ".join(f"{n} of {arm}" for arm, n in seeds.items())
    lines += ["", f"(mean ± standard error; seeds: {told})", ""]
    title = "rate: validation loss of one seed (chosen in bold)"
    lines += rates_table(title, tuning, best_rates(tuning), "nll", 3)
    return "\n".join(lines)


def evidence(folder: Path, seeds: int, quick: bool) -> Records:
    """Tune, train every arm at its own rate, and give all records."""
    work = Work(folder, seeds, QUICK if quick else {})
    tuning = tune(work)
    return [*tuning, *measure(work, best_rates(tuning))]


if __name__ == "__main__":
    tell("words", __doc__, RESULTS, evidence, summary)
