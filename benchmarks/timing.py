"""Fair timing: candidates take turns in one run, and what counts is the median of their ratios.

A machine's speed drifts within seconds (clocks, other processes), so each round runs every
candidate once, in an order that rotates, and the ratio to the base is taken within the round.
Every benchmark prints one JSON line per figure.

    times = interleaved({"add_": lambda: x.add_(y), "ours": average.update}, rounds=30)
    figure("update", model="64 x 1M", ratio=times.ratio("ours", "add_"))
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of each candidate, round by round: on the clock, and of all threads on the processors."""

    seconds: dict[str, list[float]]
    processor: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a candidate."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str, *, processor: bool = False) -> float:
        """Median over the rounds of the time of `name` divided by that of `base`."""
        times = self.processor if processor else self.seconds
        pairs = zip(times[name], times[base], strict=True)
        return statistics.median(a / b for a, b in pairs)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    device: str = "cpu",
    before: Callable[[], object] = lambda: None,
) -> Times:
    """Run every candidate once a round, in rotating order, after one round that is not counted.

    before: called before each, outside of its time.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            before()
            elapsed, computed = _timed(candidates[name], device)
            if index:
                seconds[name].append(elapsed)
                processor[name].append(computed)
    return Times(seconds, processor)


def figure(name: str, **values: Any) -> None:
    """Print one JSON line: what was measured, the figures (4 digits), and on what."""
    rounded = {key: _rounded(value) for key, value in values.items()}
    print(json.dumps({"figure": name, **rounded, **_where()}), flush=True)


def _timed(call: Callable[[], object], device: str) -> tuple[float, float]:
    _wait(device)
    start, computed = time.perf_counter(), time.process_time()
    call()
    _wait(device)
    return time.perf_counter() - start, time.process_time() - computed


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _where() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
