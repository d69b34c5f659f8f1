"""What a record is worth beside other ways to average afterwards: one real run, four records of it.

python benchmarks/posthoc.py [--epochs 40] [--sets 64]

The reference network (53,866 weights) trains at a constant rate; 40 epochs are 3,760 steps. Beside it run a
`polyak.Recorder`, two power EMAs that are kept 32 times as in EDM2 (Karras et al. 2024, from the paper's
formulas), ema-pytorch's PostHocEMA (twice: files in float32 and in its default, float16) and plain snapshots.
The true averages are sums in float64 over the weights after every step.

error: |made - true| / |true - last weights|, for averages at the end, at half the run, and at 70% of it.
sum: of the absolute weights with which stored sets are combined. live: sets of float32 weights held while
training. written: bytes. seconds: what the record took of the thread that trains, on the processor.
`null`: PostHocEMA makes no other averages than power EMAs.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ema_pytorch import PostHocEMA
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from timing import figure
from torch import Tensor, nn

import polyak
from polyak import EMA, Annealed, PowerEMA, Profile, Window
from polyak.reference_run.arm import Arm
from polyak.reference_run.data import embedded_data
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.recipe import Recipe

Weights = dict[str, Tensor]
Array = NDArray[np.float64]
STDS = (0.05, 0.10)  # of the two power EMAs, as in EDM2


def targets(now: int) -> dict[str, Profile]:
    """The averages to be made, seen from `now`."""

    def ema(part: float) -> EMA:
        return EMA(math.exp(-1 / (part * now)))

    def half(shape: str) -> Profile:
        return polyak.After(now / 2, Annealed.from_shape(shape))

    return {
        **{f"EMA {part:.0%}": ema(part) for part in (0.01, 0.03, 0.10, 0.30)},
        **{f"power {std:g}": PowerEMA.from_relative_std(std) for std in (0.03, 0.05, 0.15, 0.25)},
        "cosine, last half": half("cosine"),
        "1-sqrt, last half": half("sqrt"),
        "window of 25.7%": Window(round(0.257 * now)),
        "window of 25%": Window(now // 4),
    }


def flat(weights: Weights) -> Array:
    """All weights in float64, in the order of their names."""
    return np.concatenate([weights[n].detach().double().numpy().ravel() for n in sorted(weights)])


def own(model: nn.Module) -> Weights:
    """A model's weights."""
    return {name: p.detach() for name, p in model.named_parameters()}


def keep(weights: Weights, path: Path) -> None:
    """A plain file."""
    save_file({name: value.contiguous() for name, value in weights.items()}, path)


class Truth:
    """The averages themselves: sums in float64 over the weights after every step."""

    def __init__(self, nows: list[int], size: int) -> None:
        self.profiles = {(now, name): p for now in nows for name, p in targets(now).items()}
        self.shares = np.zeros((len(self.profiles), max(nows)))
        for row, ((now, _), profile) in zip(self.shares, self.profiles.items(), strict=True):
            row[:now] = profile.weights(range(1, now + 1))
        self._sums = np.zeros((len(self.profiles), size))
        self.last: dict[int, Array] = {}

    def step(self, model: nn.Module, step: int) -> None:
        weights = flat(own(model))
        rows = np.flatnonzero(self.shares[:, step - 1])
        self._sums[rows] += np.outer(self.shares[rows, step - 1], weights)
        if step in {now for now, _ in self.profiles}:
            self.last[step] = weights

    def error(self, made: Array, now: int, name: str) -> float:
        true = self._sums[[*self.profiles].index((now, name))]
        return float(np.linalg.norm(made - true) / np.linalg.norm(true - self.last[now]))


class Record:
    """One way to record. `made` gives an average, and the sum of the absolute weights it took."""

    live = 0.0
    seconds = 0.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def step(self, model: nn.Module, step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Training is over."""

    def made(self, name: str, profile: Profile, now: int) -> tuple[Array, float] | None:
        raise NotImplementedError

    def written(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


class Intervals(Record):
    """polyak: the means of the intervals."""

    def __init__(self, folder: Path, model: nn.Module, total: int, sets: int) -> None:
        super().__init__(folder)
        self._recorder = polyak.Recorder(model, folder / "record", total=total, intervals=sets)

    def step(self, model: nn.Module, step: int) -> None:
        self._recorder.update()

    def close(self) -> None:
        held = self._recorder._member.accumulator
        nbytes = sum(t.nbytes for ts in held.tensors_held() for t in ts)
        self.live = nbytes / sum(p.nbytes for p in self._recorder.model.parameters())
        self._recorder.close()
        self._trajectory = polyak.Trajectory(self.folder / "record", cache_size=0)

    def made(self, name: str, profile: Profile, now: int) -> tuple[Array, float]:
        return flat(self._trajectory.average(profile, now)), 1.0


class TwoPowers(Record):
    """Two power EMAs of every step, kept from time to time; solved for in float64.

    A power EMA with exponent g has the cumulative share (x / t)^(g + 1): its density at step i is the
    difference of that at i and i - 1. All stored sets are combined so that their density comes closest to
    the wanted one (least squares), those kept later than the moment in question included.
    """

    live = 2.0

    def __init__(self, folder: Path, total: int, sets: int) -> None:
        super().__init__(folder)
        self._total = total
        self._kept = [round(k * total / (sets // 2)) for k in range(1, sets // 2 + 1)]
        self._powers = [PowerEMA.from_relative_std(std).gamma + 1 for std in STDS]
        self._live: list[list[Tensor]] = []

    def step(self, model: nn.Module, step: int) -> None:
        weights = list(own(model).values())
        self._live = self._live or [[w.clone() for w in weights] for _ in self._powers]
        for held, power in zip(self._live, self._powers, strict=True):
            torch._foreach_lerp_(held, weights, 1 - (1 - 1 / step) ** power)
        if step in self._kept:
            for index, held in enumerate(self._live):
                named = dict(zip(own(model), held, strict=True))
                keep(named, self.folder / f"{index}-{step}.safetensors")

    def made(self, name: str, profile: Profile, now: int) -> tuple[Array, float]:
        stored = [(i, t) for i in range(2) for t in self._kept]
        steps = np.arange(self._total + 1)
        rows = [np.diff(np.minimum(steps / t, 1) ** self._powers[i]) for i, t in stored]
        wanted = np.pad(profile.weights(range(1, now + 1)), (0, self._total - now))
        found = np.linalg.lstsq(np.array(rows).T, wanted, rcond=None)[0]
        files = (load_file(self.folder / f"{i}-{t}.safetensors") for i, t in stored)
        made = sum(c * flat(one) for c, one in zip(found, files, strict=True))
        return np.asarray(made), float(np.abs(found).sum())


class PostHoc(Record):
    """ema-pytorch: two power EMAs as it keeps and combines them."""

    def __init__(self, folder: Path, model: nn.Module, total: int, sets: int, dtype: Any) -> None:
        super().__init__(folder)
        self._emas = PostHocEMA(
            model,
            sigma_rels=STDS,
            checkpoint_every_num_steps="manual",
            checkpoint_folder=str(folder),
            checkpoint_dtype=dtype,
            update_every=1,
        )
        self._kept = {round(k * total / (sets // 2)) for k in range(1, sets // 2 + 1)}
        nbytes = sum(p.nbytes for ema in self._emas.ema_models for p in ema.ema_model.parameters())
        self.live = nbytes / sum(p.nbytes for p in model.parameters())

    def step(self, model: nn.Module, step: int) -> None:
        self._emas.update()
        if step in self._kept:
            self._emas.checkpoint()

    def made(self, name: str, profile: Profile, now: int) -> tuple[Array, float] | None:
        if not name.startswith("power"):
            return None
        made = self._emas.synthesize_ema_model(gamma=profile.gamma, step=now)
        return flat(own(made.ema_model)), self._absolute(profile.gamma, now)

    def _absolute(self, gamma: float, now: int) -> float:
        from ema_pytorch.post_hoc_ema import solve_weights

        pairs = [(i, t) for i in range(2) for t in sorted(self._kept)]
        times = torch.tensor([t for _, t in pairs])
        gammas = torch.tensor([self._emas.gammas[i] for i, _ in pairs])
        solved = solve_weights(times, gammas, torch.tensor([now]), torch.tensor([gamma]))
        return float(solved.abs().sum())


class Snapshots(Record):
    """Checkpoints, each with the weight that polyak gives it."""

    def __init__(self, folder: Path, total: int, sets: int) -> None:
        super().__init__(folder)
        self._kept = {round(k * total / sets) for k in range(1, sets + 1)}

    def step(self, model: nn.Module, step: int) -> None:
        if step in self._kept:
            keep(own(model), self.folder / f"checkpoint-{step}.safetensors")

    def made(self, name: str, profile: Profile, now: int) -> tuple[Array, float]:
        there = [self.folder / f"checkpoint-{t}.safetensors" for t in sorted(self._kept)]
        return flat(polyak.Trajectory.from_checkpoints(there).average(profile, now)), 1.0


def trained(epochs: int) -> Arm:
    """The reference network at a constant rate."""
    recipe = Recipe(epochs=epochs, arms=("sgd",), constant_until=1.0, annealed_at=1.0, device="cpu")
    return Arm(recipe, embedded_data(), Hardware.named("cpu"), seed=0, name="sgd")


def records(folder: Path, model: nn.Module, total: int, sets: int) -> dict[str, Record]:
    return {
        "polyak": Intervals(folder / "polyak", model, total, sets),
        "two power EMAs": TwoPowers(folder / "powers", total, sets),
        "ema-pytorch": PostHoc(folder / "posthoc", model, total, sets, torch.float32),
        "ema-pytorch, float16": PostHoc(folder / "half", model, total, sets, torch.float16),
        "snapshots": Snapshots(folder / "snapshots", total, sets),
    }


def train(arm: Arm, found: dict[str, Record], truth: Truth, epochs: int) -> None:
    count = 0

    def after(*_: object) -> None:
        nonlocal count
        count += 1
        truth.step(arm.model, count)
        for record in found.values():
            begin = time.thread_time()
            record.step(arm.model, count)
            record.seconds += time.thread_time() - begin

    arm.optimizer.register_step_post_hook(after)
    for epoch in range(epochs):
        arm.train_epoch(epoch)
    for record in found.values():
        record.close()


def score(name: str, record: Record, truth: Truth, now: int) -> None:
    errors: dict[str, float | None] = {}
    sums: dict[str, float | None] = {}
    for target, profile in targets(now).items():
        made = record.made(target, profile, now)
        errors[target] = made and float(f"{truth.error(made[0], now, target):.3g}")
        sums[target] = made and float(f"{made[1]:.3g}")
    figure(
        "posthoc",
        record=name,
        now=now,
        error=errors,
        sum=sums,
        live=record.live,
        written=record.written(),
        seconds=record.seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--sets", type=int, default=64)
    given = parser.parse_args()
    arm = trained(given.epochs)
    total = given.epochs * arm.steps_per_epoch
    nows = [total, total // 2, round(0.7 * total)]
    truth = Truth(nows, sum(p.numel() for p in arm.model.parameters()))
    with tempfile.TemporaryDirectory() as folder:
        found = records(Path(folder), arm.model, total, given.sets)
        train(arm, found, truth, given.epochs)
        for now in nows:
            for name, record in found.items():
                score(name, record, truth, now)


if __name__ == "__main__":
    main()
