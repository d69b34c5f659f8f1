"""What making the averages of a search costs, beside reading their pieces once.

python benchmarks/search.py [--intervals 64] [--megabytes 25] [--folder /tmp]

A record is written, and searched with 16 evaluations whose evaluation does nothing: all that is timed is
making the averages, means of neighbours that are kept for later included. Each is compared with reading the
intervals that count in it once into one buffer, right before it; files are in the page cache for both. Averages
are made in a model. `processor` ratios are of the time on the processors, which other work moves less.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import figure

import polyak
from polyak.study.plan import Plan


@dataclass(frozen=True)
class Seconds:
    """On the clock, and of all threads on the processors."""

    clock: float
    processor: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.clock - other.clock, self.processor - other.processor)


def model_of(megabytes: int) -> torch.nn.Module:
    """So many megabytes in 8 tensors."""
    return torch.nn.ParameterList(torch.randn(megabytes * 131072 // 4) for _ in range(8))


def record(folder: Path, intervals: int, megabytes: int) -> polyak.Trajectory:
    """A record of such a model."""
    model = model_of(megabytes)
    with polyak.Recorder(model, folder, interval=1, captures=1) as recorder:
        for _ in range(intervals):
            with torch.no_grad():
                model[0].add_(0.01)
            recorder.update()
    return polyak.Trajectory(folder)


def clocks() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def seconds_to_read(plan: Plan, buffer: bytearray) -> Seconds:
    """Every piece that counts, once, into one buffer."""
    begun = clocks()
    for piece in plan.pieces:
        if piece.weight:
            with piece.path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return clocks() - begun


def ratios(prefix: str, making: list[float], reading: list[float]) -> dict[str, float]:
    """Of all together, the median of each, and the worst."""
    each = sorted(m / r for m, r in zip(making, reading, strict=True))
    return {
        f"{prefix}ratio_of_all": sum(making) / sum(reading),
        f"{prefix}ratio_median": each[len(each) // 2],
        f"{prefix}ratio_worst": each[-1],
        f"{prefix}at_most_1.5": sum(one <= 1.5 for one in each),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--intervals", type=int, default=64)
    parser.add_argument("--megabytes", type=int, default=25)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        trajectory = record(folder / "record", given.intervals, given.megabytes)
        buffer = bytearray(given.megabytes << 20)
        reading, making = [], []
        inner, planned = trajectory.tensors, trajectory.plan

        def plan(*arguments: object) -> Plan:
            found = planned(*arguments)  # type: ignore[arg-type]
            reading.append(seconds_to_read(found, buffer))
            return found

        def tensors(one: Plan, **options: object):  # type: ignore[no-untyped-def]
            begun = clocks()
            yield from inner(one, **options)  # type: ignore[arg-type]
            making.append(clocks() - begun)

        trajectory.plan, trajectory.tensors = plan, tensors  # type: ignore[method-assign]
        found = trajectory.search(
            lambda model: 0.0, model=model_of(given.megabytes), minimize=True, cache=False
        )
        figure(
            "search",
            intervals=given.intervals,
            megabytes=given.megabytes,
            evaluations=found.evaluations,
            seconds_reading=sum(one.clock for one in reading),
            seconds_making=sum(one.clock for one in making),
            **ratios("", [one.clock for one in making], [one.clock for one in reading]),
            **ratios("processor_", [m.processor for m in making], [r.processor for r in reading]),
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
