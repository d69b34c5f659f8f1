"""What is averaging worth? The reference run's networks, tuned, over paired seeds.

    python benchmarks/evidence.py                     # everything: about 15 minutes on 2 quiet cores
    python benchmarks/evidence.py --parts weak        # one part; parts add up in the results file
    python benchmarks/evidence.py --quick --output /tmp/evidence.jsonl     # a smoke test
    python benchmarks/evidence.py --summary           # the tables, as Markdown
    python benchmarks/evidence.py --write-docs        # the tables into docs/should-i-average.md

The rates of SGD, of the constant-rate arm and of the cyclic arm are tuned with equal trials: four
each, two seeds that are not reported, by the error on the validation images (NLL where equal). Then
five other seeds, on the test images. Parts: `weak` and `strong` regularisation, 40 epochs; `budgets`,
20 and 30 epochs under weak regularisation, tuned separately; `afterwards`, averages chosen from a record
of a run at a constant rate (which is not tuned: `evidence_afterwards.py`). After an interruption it continues: jobs
whose records are in the results file are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evidence_afterwards import answers as afterwards_answers
from evidence_answers import answers, in_short
from evidence_docs import write_docs
from evidence_jobs import Job, carry_out, start_worker
from evidence_tables import summary

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence.jsonl"
TUNING_SEED = 100  # tuning seeds count from here, reported ones from 0


@dataclass(frozen=True)
class Plan:
    """How much is done: the smoke does the same with less."""

    epochs: int = 40
    seeds: int = 5
    tuning_seeds: int = 2
    rates: tuple[float, ...] = (0.0125, 0.025, 0.05, 0.1)
    highs: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2)


QUICK = Plan(epochs=8, seeds=2, tuning_seeds=1, rates=(0.025, 0.05), highs=(0.05, 0.1))


class Results:
    """The results file: records, appended job by job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = read(path)

    def has(self, job: Job) -> bool:
        return any(record["job"] == job.key for record in self.records)

    def add(self, records: list[dict[str, Any]]) -> None:
        self.records += records
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))

    def best_rate(self, part: tuple[str, int], arm: str) -> float:
        """The rate with the lowest mean validation error; NLL decides between equals."""
        tried: dict[float, list[tuple[float, float]]] = {}
        for r in self.records:
            if r["kind"] == "trial" and (r["regime"], r["epochs"], r["arm"]) == (*part, arm):
                tried.setdefault(r["rate"], []).append((r["error"], r["nll"]))
        means = {rate: tuple(sum(column) / len(worth) for column in zip(*worth, strict=True))
                 for rate, worth in tried.items()}  # fmt: skip
        return min(means, key=lambda rate: means[rate])


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; a last line that was cut short is left out, and cut off."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def parts_of(plan: Plan, names: list[str]) -> dict[tuple[str, int], tuple[str, ...]]:
    """(regime, epochs) and the averaging arms that run there."""
    parts: dict[tuple[str, int], tuple[str, ...]] = {}
    for regime in ("weak", "strong"):
        if regime in names:
            parts[regime, plan.epochs] = ("swa", "cyclic")
    if "budgets" in names:
        for fraction in (0.5, 0.75):
            parts["weak", round(fraction * plan.epochs)] = ("swa",)
    return parts


def stages(plan: Plan, parts: dict[tuple[str, int], tuple[str, ...]], results: Results):
    """Lists of jobs; each needs the records of those before it."""
    tuning = range(TUNING_SEED, TUNING_SEED + plan.tuning_seeds)
    tried = {"swa": plan.rates, "cyclic": plan.highs}
    yield [Job("trial", *p, seed, rate) for p in parts for rate in plan.rates for seed in tuning]
    sgd = {part: results.best_rate(part, "sgd") for part in parts}
    yield [
        Job("branches", *part, seed, sgd[part], tuple((arm, tried[arm]) for arm in arms))
        for part, arms in parts.items()
        for seed in tuning
    ]
    yield [
        Job("final", *part, seed, sgd[part],
            tuple((arm, (results.best_rate(part, arm),)) for arm in arms))
        for part, arms in parts.items()
        for seed in range(plan.seeds)
    ]  # fmt: skip


def afterwards_jobs(plan: Plan) -> list[Job]:
    """Nothing is tuned there."""
    return [Job("afterwards", "weak", plan.epochs, seed, 0.05) for seed in range(plan.seeds)]


def run(plan: Plan, parts: list[str], results: Results, processes: int) -> None:
    """All jobs that have no records yet, the longest of a stage first."""
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=start_worker) as pool:
        chosen = [afterwards_jobs(plan)] if "afterwards" in parts else []
        others = stages(plan, tuned, results) if (tuned := parts_of(plan, parts)) else []
        for jobs in itertools.chain(chosen, others):
            left = sorted((j for j in jobs if not results.has(j)), key=lambda j: -j.epochs)
            for number, future in enumerate(
                as_completed([pool.submit(carry_out, j) for j in left])
            ):
                job, records = future.result()
                results.add([{**record, "torch": torch.__version__} for record in records])
                done = f"{number + 1}/{len(left)}"
                print(f"{time.monotonic() - start:6.0f} s  {done:>7}  {job.key}", file=sys.stderr)


def page(records: list[dict[str, Any]]) -> str:
    """Answers, the short table for the README, and all tables, as Markdown."""
    told = [answers(records), afterwards_answers(records)]
    if any(record["kind"] == "final" for record in records):
        short = f"**In short**: SWA minus annealed SGD, equal budget.\n\n{in_short(records)}"
        told += [short, summary(records)]
    return "\n\n".join(part for part in told if part)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=("weak", "strong", "budgets", "afterwards"),
                        default=["weak", "strong", "budgets", "afterwards"])  # fmt: skip
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="8 epochs, 2 seeds, 2 rates: a smoke")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into the docs")
    given = parser.parse_args()
    if given.quick and given.output == RESULTS:
        parser.error("--quick needs a different --output: its figures are not evidence")
    results = Results(given.output)
    if not (given.summary or given.write_docs):
        run(QUICK if given.quick else Plan(), given.parts, results, given.processes)
    if not results.records:
        parser.error(f"{given.output} has no records yet: run without --summary first")
    print(page(results.records))
    if given.write_docs:
        write_docs("evidence", page(results.records))


if __name__ == "__main__":
    main()
