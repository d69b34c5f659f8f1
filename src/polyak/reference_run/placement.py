"""How a run uses the processors: threads in a process, and processes side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from polyak.errors import require
from polyak.reference_run.data import Data, load_data
from polyak.reference_run.evaluation import loss_of
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.models import build_model
from polyak.reference_run.recipe import Recipe

_FEW_EXAMPLES = (
    100_000  # seen in training: the start of a second process would cost more than it saves
)
_STEPS = 5
_MOST = 1024  # threads, processes: from some number on the system ends a process that asks for more


@dataclass(frozen=True)
class Placement:
    """Threads of each process, and how many processes train side by side."""

    threads: int
    jobs: int

    def __post_init__(self) -> None:
        check_placement(self.threads, self.jobs)

    @classmethod
    def chosen(cls, recipe: Recipe, threads: int | None, jobs: int | None) -> Placement:
        """What is asked for; without that, what is fastest here.

        OMP_NUM_THREADS counts as asking for threads. Otherwise a few training steps are timed with
        one thread and with all: a small network is faster with one thread in each of several
        processes. On a GPU, and for a run of a moment, there is one process.
        """
        check_placement(threads, jobs)
        if threads is None and "OMP_NUM_THREADS" in os.environ:
            threads = torch.get_num_threads()
        data = load_data(recipe)
        n_examples = recipe.epoch_size or len(data.train)
        seen = recipe.epochs * recipe.seeds * len(recipe.arms) * n_examples
        on_cpu = Hardware.named(recipe.device).device.type == "cpu"
        side_by_side = on_cpu and seen >= _FEW_EXAMPLES
        most = jobs or (most_legs_at_once(recipe) if side_by_side else 1)
        if threads is None:
            threads = (
                fastest_threads(recipe, data, most) if side_by_side else torch.get_num_threads()
            )
        return cls(threads, jobs or max(1, min(most, processors() // threads)))

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """Torch with these threads for the block."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def check_placement(threads: int | None, jobs: int | None) -> None:
    """Raise ArgumentError for numbers that no machine has; None leaves the choice."""
    for name, value in (("threads", threads), ("jobs", jobs)):
        ok = value is None or 1 <= value <= _MOST
        require(ok, f"{name} is {value}; expected 1 to {_MOST}.")


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def most_legs_at_once(recipe: Recipe) -> int:
    """How many legs of a run could train at the same time."""
    return recipe.seeds * max(1, len(recipe.arms) - 1)


def fastest_threads(recipe: Recipe, data: Data, jobs: int) -> int:
    """One thread or all, whichever trains more images a second in at most `jobs` processes."""
    n = processors()
    pace = {k: min(jobs, n // k) / _seconds_of_steps(recipe, data, k) for k in {1, n}}
    return n if pace[n] > 1.1 * pace[1] else 1


def _seconds_of_steps(recipe: Recipe, data: Data, threads: int) -> float:
    """The fastest of a few training steps; others may use the machine meanwhile."""
    hardware = Hardware(torch.device("cpu"))
    inputs = hardware.inputs(data.train.inputs[: recipe.batch_size])
    labels = hardware.labels(data.train.labels[: recipe.batch_size])
    times = []
    with Placement(threads, 1).in_effect(), torch.random.fork_rng(devices=[]):
        model = hardware.place(build_model(recipe, data)).train()
        for _ in range(_STEPS):
            start = time.perf_counter()
            loss_of(model, inputs, labels).backward()  # type: ignore[no-untyped-call]
            times.append(time.perf_counter() - start)
    return min(times)
