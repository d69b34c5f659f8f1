"""What making the averages of a search costs, beside reading their pieces once.

python benchmarks/search.py [--intervals 64] [--megabytes 25] [--folder /tmp]

A record is written, and searched with 16 evaluations whose evaluation does nothing: all that is timed is
making the averages, means of neighbours that are kept for later included. Each is compared with reading the
intervals that count in it once into one buffer, right before it; files are in the page cache for both.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from timing import figure

import polyak
from polyak.study.plan import Plan


def record(folder: Path, intervals: int, megabytes: int) -> polyak.Trajectory:
    """A record of a model with so many megabytes in 8 tensors."""
    model = torch.nn.ParameterList(torch.randn(megabytes * 131072 // 4) for _ in range(8))
    with polyak.Recorder(model, folder, interval=1, captures=1) as recorder:
        for _ in range(intervals):
            with torch.no_grad():
                model[0].add_(0.01)
            recorder.update()
    return polyak.Trajectory(folder)


def seconds_to_read(plan: Plan, buffer: bytearray) -> float:
    """Every piece that counts, once, into one buffer."""
    begun = time.perf_counter()
    for piece in plan.pieces:
        if piece.weight:
            with piece.path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return time.perf_counter() - begun


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
            begun = time.perf_counter()
            yield from inner(one, **options)  # type: ignore[arg-type]
            making.append(time.perf_counter() - begun)

        trajectory.plan, trajectory.tensors = plan, tensors  # type: ignore[method-assign]
        found = trajectory.search(lambda state: 0.0, minimize=True, cache=False)
        ratios = [m / r for m, r in zip(making, reading, strict=True)]
        figure(
            "search",
            intervals=given.intervals,
            megabytes=given.megabytes,
            evaluations=found.evaluations,
            seconds_reading=sum(reading),
            seconds_making=sum(making),
            ratio_of_all=sum(making) / sum(reading),
            ratio_median=sorted(ratios)[len(ratios) // 2],
            ratio_worst=max(ratios),
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
