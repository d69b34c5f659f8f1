"""What choosing the average afterwards is worth: a job of `evidence.py`, and its answers in words.

One run at a constant rate with a record, four live EMAs beside it; the same budget annealed; and three real
decays of an eighth of the budget from a quarter, half and three quarters of the run. Everything is chosen by
temperature-scaled NLL on the validation images, and scored on the test images. The BatchNorm statistics of
every average are refreshed before it is evaluated, on the first 1,000 training images.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from evidence_tables import Record, format_estimate
from torch import nn

import polyak
from polyak.maths.numbers import count
from polyak.maths.text import parse_profile
from polyak.reference_run.arm import Arm
from polyak.reference_run.data import load_data
from polyak.reference_run.evaluation import final_record
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.recipe import Recipe
from polyak.study import ScaledNLL
from polyak.study.paired import estimate, paired

HALF_LIVES = (0.5, 1.0, 3.0, 8.0)  # epochs of 40, in proportion for other budgets
_BATCH = 250
_STATISTICS_IMAGES = 1000
_METRICS = {"error": ("error", "points", 2), "nll": ("NLL", "nats", 4),
            "nll_scaled": ("NLL after temperature scaling", "nats", 4)}  # fmt: skip
_OTHERS = {
    "swa": "the mean of the last quarter",
    "best-ema": "the best of four live EMAs",
    "stopped-ema": "early stopping of four live EMAs",
    "annealed": "annealed SGD",
    "iterate": "the last iterate",
}


def afterwards(job: Any) -> list[Record]:
    """The records of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        study = _Study(job, Path(folder))
        states = study.train()
        final = study.annealed(job)
        return [*study.averages(), final, *study.reached(final), *study.decays(job, states)]


class _Study:
    """One run at a constant rate, and what is found in its record."""

    def __init__(self, job: Any, folder: Path) -> None:
        self.epochs, self.length = job.epochs, max(1, job.epochs // 8)
        self.arm = _arm(job, folder / "record")
        data = self.arm.data.validation
        self.score = ScaledNLL(
            list(zip(data.images.split(_BATCH), data.labels.split(_BATCH), strict=True))
        )
        self.training = list(self.arm.data.train.inputs[:_STATISTICS_IMAGES].split(_BATCH))
        steps, ratio = self.arm.steps_per_epoch, job.epochs / 40
        profiles = {
            f"ema-{h:g}": f"ema:half_life={max(1, round(h * ratio * steps))}" for h in HALF_LIVES
        }
        self.live = polyak.Averages(self.arm.model, profiles)
        self.live.attach(self.arm.optimizer)
        self.stopped: tuple[float, str, dict[str, torch.Tensor]] = (float("inf"), "", {})
        self.iterates: dict[int, dict[str, float]] = {}  # at the ends of the decays
        self.folder = folder

    def train(self) -> dict[int, dict[str, Any]]:
        """Train; the states from which real decays begin."""
        states = {}
        for epoch in range(self.epochs):
            if epoch in self._branches():
                states[epoch] = copy.deepcopy(self.arm.state_dict())
            self.arm.train_epoch(epoch)
            self._watch(epoch + 1)
            if epoch + 1 - self.length in states:
                self.iterates[epoch + 1] = _metrics(self.arm.model, self.arm)
        self.arm.close_record()
        self.trajectory = polyak.Trajectory(self.folder / "record", cache_size=0)
        return states

    def averages(self) -> Iterator[Record]:
        """What was found, and what it is compared with."""
        begin = 0.75 * self.trajectory.end
        found = self.trajectory.search(
            self.score, model=self.arm.model, data=self.training,
            swa=polyak.After(begin, polyak.SWA()),
        )  # fmt: skip
        made = self._made(found.best.profile, found.best.until)
        yield self._scored(
            "found", made, found.best.score, f"{found.best.profile} at {found.best.until:g}"
        )
        swa = self._made(polyak.After(begin, polyak.SWA()))
        yield self._scored("swa", swa, self._validation(swa), "")
        ends = {name: self._state(average) for name, average in self.live.items()}
        worth = {name: self._validation(state) for name, state in ends.items()}
        best = min(worth, key=worth.__getitem__)
        yield self._scored("best-ema", ends[best], worth[best], best)
        score, name, state = self.stopped
        yield self._scored("stopped-ema", state, score, name)
        last = {name: value.clone() for name, value in self.arm.model.state_dict().items()}
        yield self._scored("iterate", last, self._validation(last), "")

    def annealed(self, job: Any) -> Record:
        """SGD at the same budget, annealed as in the reference run."""
        recipe = Recipe(epochs=job.epochs, rate=job.rate, arms=("sgd",), device="cpu")
        other = Arm(recipe, self.arm.data, self.arm.hardware, seed=job.seed, name="sgd")
        for epoch in range(job.epochs):
            other.train_epoch(epoch)
        state = other.model.state_dict()
        return self._scored("annealed", state, self._validation(state), "")

    def reached(self, final: Record) -> Iterator[Record]:
        """From which part of the budget on the best average is as good as annealed SGD at its end."""
        found = self.trajectory.stop(self.score, model=self.arm.model, data=self.training, points=8)
        worth = {one.until: self._test(one.profile, one.until) for one in found.answers}
        for metric in ("error", "nll_scaled"):
            enough = [t for t, metrics in worth.items() if metrics[metric] <= final[metric]]
            part = min(enough) / self.trajectory.end if enough else None
            yield {"kind": "afterwards-reached", "metric": metric, "part": part}

    def decays(self, job: Any, states: dict[int, dict[str, Any]]) -> Iterator[Record]:
        """Real decays, and what the record forecasts of them."""
        for begin, state in states.items():
            end = begin + self.length
            recipe = _recipe(job.rate, end, begin / end, final_ratio=0.01)
            real = Arm(recipe, self.arm.data, self.arm.hardware, seed=job.seed, name="sgd")
            real.load_state_dict(state)
            for epoch in range(begin, end):
                real.train_epoch(epoch)
            steps = self.arm.steps_per_epoch
            forecast = f"annealed:shape=linear,start={begin * steps}"
            yield {
                "kind": "afterwards-decay",
                "from": begin,
                "real": _metrics(real.model, real),
                "forecast": self._test(forecast, end * steps),
                "iterate": self.iterates[end],
            }

    def _branches(self) -> list[int]:
        return [self.epochs * quarter // 4 for quarter in (1, 2, 3)]

    def _watch(self, epoch: int) -> None:
        """Early stopping: the best EMA at the end of any epoch so far."""
        for name, average in self.live.items():
            state = self._state(average)
            if (score := self._validation(state)) < self.stopped[0]:
                self.stopped = (score, f"{name} at epoch {epoch}", state)

    def _state(self, average: polyak.Average) -> dict[str, torch.Tensor]:
        average.update_bn(self.training)
        with average.applied() as model:
            return {name: value.clone() for name, value in model.state_dict().items()}

    def _model(self, state: dict[str, torch.Tensor]) -> nn.Module:
        model = copy.deepcopy(self.arm.model)
        model.load_state_dict(state)
        return model.eval()

    def _validation(self, state: dict[str, torch.Tensor]) -> float:
        return float(self.score(self._model(state)).mean())

    def _test(self, profile: str, until: float) -> dict[str, float]:
        made = self._made(parse_profile(profile), until)
        return _metrics(self._model(made), self.arm)

    def _made(self, profile: polyak.Profile, until: float | None = None) -> dict[str, torch.Tensor]:
        """An average of the record, its BatchNorm statistics refreshed."""
        model = self._model(self.trajectory.average(profile, until))
        polyak.update_bn(model, self.training)
        return model.state_dict()

    def _scored(
        self, what: str, state: dict[str, torch.Tensor], validation: float, which: str
    ) -> Record:
        metrics = _metrics(self._model(state), self.arm)
        return {
            "kind": "afterwards",
            "what": what,
            "which": which,
            "validation": validation,
            **metrics,
        }


def _metrics(model: nn.Module, arm: Arm) -> dict[str, float]:
    found = final_record(model, arm.data, arm.hardware)
    return {name: found[name] for name in _METRICS}


def _recipe(rate: float, epochs: int, constant_until: float, **rest: Any) -> Recipe:
    return Recipe(
        epochs=epochs, rate=rate, arms=("sgd",), device="cpu",
        constant_until=constant_until, annealed_at=1.0, **rest,
    )  # fmt: skip


def _arm(job: Any, record: Path) -> Arm:
    recipe = _recipe(job.rate, job.epochs, 1.0)
    data = load_data(recipe)
    hardware = Hardware.named("cpu")
    return Arm(recipe, data, hardware, seed=job.seed, name="sgd", record=record)


def answers(records: Iterable[Record]) -> str:
    """Three answers, whichever way they point; nothing if there are no records."""
    records = [r for r in records if r["kind"].startswith("afterwards")]
    if not records:
        return ""
    seeds = sorted({r["seed"] for r in records})
    told = [_found(records), _reached(records, len(seeds)), _decays(records)]
    return f"**Chosen afterwards** ({count(len(seeds), 'seed')}).\n\n" + "\n".join(
        f"- {t}" for t in told
    )


def _found(records: list[Record]) -> str:
    by = {(r["what"], r["seed"]): r for r in records if r["kind"] == "afterwards"}
    seeds = sorted({seed for _, seed in by})
    said = []
    for other, name in _OTHERS.items():
        cells = []
        for metric, (title, unit, digits) in _METRICS.items():
            mine, theirs = ([by[w, s][metric] for s in seeds] for w in ("found", other))
            if len(seeds) > 1:
                cells.append(f"{title} {format_estimate(paired(mine, theirs), digits)} {unit}")
            else:
                cells.append(f"{title} {mine[0] - theirs[0]:+.{digits}f} {unit} (no interval)")
        said.append(f"minus {name}: {', '.join(cells)}")
    return f"The average found in the record {'; '.join(said)}."


def _reached(records: list[Record], n_seeds: int) -> str:
    said = []
    for metric in ("error", "nll_scaled"):
        rows = [
            r["part"]
            for r in records
            if r["kind"] == "afterwards-reached" and r["metric"] == metric
        ]
        parts = [part for part in rows if part is not None]
        when = f", at {', '.join(f'{p:.0%}' for p in sorted(parts))} of the budget" if parts else ""
        said.append(f"{_METRICS[metric][0]}: {len(parts)} of {n_seeds} seeds{when}")
    return f"An average as good as annealed SGD at its end, in {'; '.join(said)}."


def _decays(records: list[Record]) -> str:
    rows = [r for r in records if r["kind"] == "afterwards-decay"]
    said = []
    for metric, (title, unit, digits) in _METRICS.items():
        off = {
            what: estimate([abs(r[what][metric] - r["real"][metric]) for r in rows]).mean
            for what in ("forecast", "iterate")
        }
        said.append(
            f"{title} by {off['forecast']:.{digits}f} {unit} (the iterate by {off['iterate']:.{digits}f})"
        )
    return f"The forecast of {len(rows)} real decays is off in {', '.join(said)}, on average."
