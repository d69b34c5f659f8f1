"""What recording costs in a real run, beside an EMA of every step by ema-pytorch.

python benchmarks/record.py [--rounds 30] [--interval 58] [--models reference wide run]

Each round trains one interval three times: bare, recorded, followed. 58 steps is a run of 3,760 in 64
intervals; the cost of an interval is the same whatever its length.

The reference network (53,866 weights) and one of 4.6 million on its images, SGD, batches of 64. A round of
the recorder takes the weights 20 times and writes one interval. Memory is what is held beside the model.
`run` is an arm of `polyak train` with and without its record, an epoch and interval of 94 steps a round.
`processor_percent` counts the time of all threads on the processors, the writer's too: it hardly depends on
what else the machine does. `own_percent` is what the recorder itself took of the recorded run's time on the
processors: that in `update`, and that of the thread that writes. No other run is compared, so nothing but a
slower memory moves it; `steps_for_one_percent` is how long an interval has to be for 1%.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ema_pytorch import EMA
from timing import figure, interleaved
from torch import nn
from torch.nn.functional import cross_entropy

import polyak
from polyak.reference_run.arm import Arm
from polyak.reference_run.data import embedded_data
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.models import Net
from polyak.reference_run.recipe import Recipe

MODELS: dict[str, Callable[[], nn.Module]] = {
    "reference": Net,
    "wide": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 1450), nn.ReLU(), nn.Linear(1450, 10)
    ),
}  # fmt: skip


def training(model: nn.Module, after: Callable[[], object], steps: int) -> Callable[[], None]:
    """One interval of steps."""
    data = embedded_data().train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def run() -> None:
        for _ in range(steps):
            picked = torch.randint(len(data), (64,))
            loss = cross_entropy(model(data.images[picked]), data.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after()

    return run


class OwnTime:
    """Seconds on the processors: of a recorder's own work, and of the whole of the runs around it."""

    def __init__(self, recorder: polyak.Recorder) -> None:
        self._recorder = recorder
        self.seconds = self.whole = 0.0

    def update(self) -> None:
        begun = time.thread_time()
        self._recorder.update()
        self.seconds += time.thread_time() - begun

    def around(self, run: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            before = self.seconds, self.whole
            all_threads, this_one = time.process_time(), time.thread_time()
            run()
            self._recorder.state_dict()  # waits until all is written
            whole = time.process_time() - all_threads
            self.seconds += whole - (time.thread_time() - this_one)  # what writes is another thread
            self.whole += whole
            if not before[1]:  # the first round, which is not counted, imports what writes
                self.seconds, self.whole = 0.0, 1e-9

        return timed


def measure(name: str, rounds: int, interval: int, folder: Path) -> None:
    """Train the three side by side."""
    bare, recorded, followed = (MODELS[name]() for _ in range(3))
    recorder = polyak.Recorder(recorded, folder / name, interval=interval)
    ema = EMA(followed, beta=0.999, update_after_step=0, update_every=1)
    own = OwnTime(recorder)
    times = interleaved(
        {
            "bare": training(bare, lambda: None, interval),
            "record": own.around(training(recorded, own.update, interval)),
            "ema-pytorch": training(followed, ema.update, interval),
        },
        rounds=rounds,
    )
    recorder.close()
    trajectory = polyak.Trajectory(folder / name)
    assert len(trajectory.intervals) == rounds + 1
    assert trajectory.intervals[0].captures == 20
    weights = sum(p.numel() * 4 for p in bare.parameters())
    held = sum(t.nbytes for ts in recorder._member.accumulator.tensors_held() for t in ts)
    others = sum(t.nbytes for t in ema.ema_model.state_dict().values())
    share = own.seconds / own.whole
    steps = {"own_percent": 100 * share, "steps_for_one_percent": round(100 * interval * share)}
    for other, memory, rest in (("record", held, steps), ("ema-pytorch", others, {})):
        figure(
            "recording",
            model=name,
            interval=interval,
            what=other,
            overhead_percent=100 * (times.ratio(other, "bare") - 1),
            processor_percent=100 * (times.ratio(other, "bare", processor=True) - 1),
            sets_of_weights=memory / weights,
            milliseconds_a_step=1000 * times.median("bare") / interval,
            **rest,
        )


def measure_run(rounds: int, folder: Path) -> None:
    """An arm as `polyak train` trains it, with its EMA, schedule and flips."""
    recipe = Recipe(arms=("sgd",), device="cpu")
    data, hardware = embedded_data(), Hardware.named("cpu")
    epochs: dict[str, Callable[[], object]] = {}
    for name, record in (("bare", None), ("record", folder / "run")):
        arm = Arm(recipe, data, hardware, seed=0, name="sgd", record=record)
        count = itertools.count()
        epochs[name] = lambda arm=arm, count=count: arm.train_epoch(next(count))
    times = interleaved(epochs, rounds=min(rounds, recipe.epochs - 1))
    figure(
        "recording",
        model="run",
        interval=94,
        what="record",
        overhead_percent=100 * (times.ratio("record", "bare") - 1),
        processor_percent=100 * (times.ratio("record", "bare", processor=True) - 1),
        milliseconds_a_step=1000 * times.median("bare") / 94,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--interval", type=int, default=58)
    parser.add_argument("--models", nargs="+", default=[*MODELS, "run"], choices=[*MODELS, "run"])
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        for name in given.models:
            if name == "run":
                measure_run(given.rounds, folder)
            else:
                measure(name, given.rounds, given.interval, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
