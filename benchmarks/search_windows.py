"""How close 16 evaluations, and 5, come to the best of all windows: on the records of `polyak train`.

polyak train taught --arms sgd --constant-until 1 --annealed-at 1 --rate 0.05 --epochs 40 \
    --record-intervals 20 --seeds 4 -o RUN
python benchmarks/search_windows.py RUN

Every one of the 210 windows on the edges of 20 intervals is evaluated on the 2,000 validation images, then
searched as users do, from the same scores: NLL, and NLL after temperature scaling. What is given is how much
worse than the best of all the found one is (its regret), in nats; beside it how far apart the windows are, and
the regret of the plain mean of the last quarter.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from timing import figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import polyak
from polyak.reference_run.data import embedded_data
from polyak.reference_run.models import Net
from polyak.study import ScaledNLL

_BATCH = 250


class Logits:
    """Of the validation images, for every set of weights once."""

    def __init__(self) -> None:
        self.data = embedded_data().validation
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, model: nn.Module) -> Tensor:
        digest = hashlib.sha256()
        for tensor in model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        key = digest.digest()
        if key not in self._known:
            with torch.inference_mode():
                self._known[key] = torch.cat([model(x) for x in self.data.images.split(_BATCH)])
        return self._known[key]


def evaluations(logits: Logits) -> dict[str, Callable[[nn.Module], Tensor]]:
    """Scores per example, by metric."""
    labels = logits.data.labels

    def nll(model: nn.Module) -> Tensor:
        return cross_entropy(logits(model), labels, reduction="none")

    def nll_scaled(model: nn.Module) -> Tensor:
        known = ScaledNLL([(logits(model), labels)])
        return known(nn.Identity().eval())

    return {"nll": nll, "nll_scaled": nll_scaled}


def measure(folder: Path) -> None:
    """One record: a figure for each metric."""
    trajectory, logits = polyak.Trajectory(folder), Logits()
    count = len(trajectory.intervals)
    for metric, evaluate in evaluations(logits).items():
        options = {"model": Net(), "minimize": True, "holdout": 0, "cache": False}
        every = trajectory.search(evaluate, evaluations=count * (count + 1) // 2, **options)
        scores = [one.score for one in every.scored if one.family == "windows"]
        assert len(scores) == count * (count + 1) // 2
        best = min(scores)
        figure(
            "search-windows",
            record=str(folder)[-10:],
            metric=metric,
            windows=len(scores),
            regret_of_16=trajectory.search(evaluate, **options).best.score - best,
            regret_of_5=trajectory.search(evaluate, quick=True, **options).best.score - best,
            regret_of_last_quarter=every.references["SWA of the last quarter"].score - best,
            regret_of_median_window=statistics.median(scores) - best,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    for folder in sorted((parser.parse_args().run / "record").glob("seed-*/sgd")):
        measure(folder)


if __name__ == "__main__":
    main()
