"""What do Gaussians of weights, ensembles and temperature scaling do for likelihood and calibration?

    python benchmarks/uncertainty.py                     # 5 seeds: about 5 minutes of one quiet core
    python benchmarks/uncertainty.py --seeds 2 --epochs 4 --output /tmp/quick.jsonl       # a smoke test
    python benchmarks/uncertainty.py --summary           # the tables, as Markdown

The reference run's network on 1,500 of the embedded images, nothing tuned. One budget is `--epochs` epochs of
training: SGD that is annealed to 0; a run that holds its rate for the second half, captured 20 times,
which gives SWA and SWAG; two runs of half the length each, as an ensemble and as MultiSWAG. Three
budgets: the models of three seeds together. Temperatures are fitted on the validation images, scores
are those of the test images. After an interruption it continues with the next seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import polyak
from polyak import schedules, uncertainty
from polyak.reference_run.data import embedded_data
from polyak.reference_run.models import Net
from polyak.study.paired import estimate, paired

RESULTS = Path(__file__).parent / "results" / "uncertainty.jsonl"
IMAGES, BATCH, RATE, HELD, CAPTURES, RANK, DRAWS = 1500, 64, 0.05, 0.03, 20, 20, 15
METRICS = ("error", "nll", "brier", "ece")
DATA = embedded_data()
STEPS = IMAGES // BATCH

Log = dict[str, Tensor]  # name of a split -> logits of the mean prediction


def train(
    model: Net, seed: int, epochs: float, schedule: Any, after: Callable[[int], None]
) -> None:
    """SGD with momentum; the order of the images is a function of the seed and the epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    lr = polyak.LRSchedule(optimizer, schedule)
    done, total = 0, round(epochs * STEPS)
    while done < total:
        order = torch.Generator().manual_seed(1000 * seed + done // STEPS)
        for picked in torch.randperm(IMAGES, generator=order).split(BATCH)[:STEPS]:
            if done == total:
                return
            loss = cross_entropy(model(DATA.train.images[picked]), DATA.train.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr.step()
            done += 1
            after(done)


def new_model(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


def annealed(seed: int, epochs: float) -> Net:
    """Constant for half of the time, then down to a hundredth of it."""
    model, half = new_model(seed), round(epochs * STEPS / 2)
    down = schedules.Linear(RATE, RATE / 100, half)
    schedule = schedules.chain((half, schedules.Constant(RATE)), (half + 1, down))
    train(model, seed, epochs, schedule, lambda done: None)
    return model


def held(seed: int, epochs: float) -> polyak.SWAG:
    """The rate stays up in the second half, in which weights are captured."""
    model, half = new_model(seed), round(epochs * STEPS / 2)
    schedule = schedules.chain(
        (half, schedules.Constant(RATE)), (half + 1, schedules.Constant(HELD))
    )
    swag = polyak.SWAG(model, rank=RANK)
    every = max(1, half // CAPTURES)

    def capture(done: int) -> None:
        if done > half and (done - half) % every == 0:
            swag.update()

    train(model, seed, epochs, schedule, capture)
    return swag


def logits(members: Any, seed: int, model: Net | None = None) -> Log:
    found = {}
    for split in ("validation", "test"):
        batches = getattr(DATA, split).images.split(500)
        generator = torch.Generator().manual_seed(seed)
        found[split] = polyak.predict(
            members, batches, draws=DRAWS, generator=generator, model=model
        ).logits
    return found


def arms(seed: int, epochs: float) -> Iterator[tuple[str, Log]]:
    """Each of one budget."""
    half = epochs / 2
    yield "SGD", logits(annealed(seed, epochs), seed)
    swag = held(seed, epochs)
    yield "SWA", logits(swag.averaged_tensors(), seed, swag.model)
    yield "SWAG", logits(swag, seed)
    yield "2 half runs, SGD", logits([annealed(50 + seed, half), annealed(70 + seed, half)], seed)
    swags = [held(50 + seed, half), held(70 + seed, half)]
    yield "2 half runs, SWAG", logits(swags, seed)


def mean_of(several: list[Log]) -> Log:
    """The ensemble of what was predicted already."""
    return {
        split: torch.stack([one[split] for one in several]).logsumexp(0) for split in several[0]
    }


def scored(arm: str, seed: int, found: Log) -> Iterator[dict[str, Any]]:
    """Its scores as it is, and with the temperature that fits the validation images."""
    labels = DATA.test.labels
    temperature = uncertainty.best_temperature(found["validation"], DATA.validation.labels)
    for name, scale in ((arm, 1.0), (f"{arm}, T", temperature)):
        z = found["test"].double() / scale
        scores = {metric: getattr(uncertainty, metric)(z, labels) for metric in METRICS}
        yield {"arm": name, "seed": seed, "temperature": scale, **scores}


def run(seeds: int, epochs: float, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = output.with_suffix(".pt")
    by_seed: dict[int, dict[str, Log]] = torch.load(kept) if kept.exists() else {}
    for seed in range(seeds):
        if seed in by_seed:
            continue
        begun = time.perf_counter()
        by_seed[seed] = dict(arms(seed, epochs))
        torch.save(by_seed, kept)
        print(f"seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
    records: list[dict[str, Any]] = []
    for seed, found in by_seed.items():
        three = [by_seed[(seed + i) % seeds] for i in range(min(3, seeds))]
        found = found | {  # noqa: PLW2901 - and those of three budgets
            f"3 runs, {arm}": mean_of([one[arm] for one in three]) for arm in ("SGD", "SWA", "SWAG")
        }
        for arm, log in found.items():
            records += scored(arm, seed, log)
    for record in records:
        record["epochs"] = epochs
    output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    kept.unlink()


def summary(output: Path) -> str:
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    values = {}
    for record in records:
        for metric in METRICS:
            values.setdefault((record["arm"], metric), []).append(record[metric])
    lines = [
        "| arm | error, % | NLL | Brier | ECE, % | NLL beside SWA, T |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(record["arm"] for record in records):
        cells = []
        for metric in METRICS:
            mean = estimate(values[arm, metric]).mean
            cells.append(f"{100 * mean:.2f}" if metric in ("error", "ece") else f"{mean:.4f}")
        beside = paired(values[arm, "nll"], values["SWA, T", "nll"])
        half = beside.half_width()
        cells.append(f"{beside.mean:+.4f}" + (f" ± {half:.4f}" if half else ""))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true")
    given = parser.parse_args()
    if not given.summary:
        torch.set_num_threads(1)
        run(given.seeds, given.epochs, given.output)
    print(summary(given.output))
