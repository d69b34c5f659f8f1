"""The output of `polyak train`: progress while it runs, and the results."""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from polyak.errors import MissingExtra, OutputError
from polyak.maths.numbers import count, rounded
from polyak.reference_run.data import load_data
from polyak.reference_run.flatness import measure_landscape
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.loop import Watch, plan, ready, train
from polyak.reference_run.placement import Placement, check_placement
from polyak.reference_run.ranks import joined
from polyak.reference_run.recipe import Recipe
from polyak.reference_run.run import Run, recorded_threads
from polyak.report.opening import describe_data
from polyak.report.page import write_report
from polyak.report.tables import IMAGES, Finals, Metric, format_estimate

_PLAIN_WIDTH = 100  # of tables in a file or a pipe, which have no width
_LEGENDS = {
    "images": """
NLL, scaled: with the temperature that is best on the validation images.
ECE: expected calibration error, 15 bins. Lower is better everywhere.
""",
    "words": """
Test loss in nats per byte; wrong: the most probable next byte is not the one that comes.
int8, int4: by how many thousandths of a nat the loss rises when matrices are rounded to so many bits.
Lower is better everywhere.
""",
}
_HEADINGS = {
    "images": {"error": "test error %", "nll": "NLL", "nll_scaled": "NLL, scaled", "ece": "ECE %"},
    "words": {"nll": "test loss", "error": "wrong %", "int8_rise": "int8", "int4_rise": "int4"},
}
_RECENT_SECONDS, _FEWEST_EPOCHS, _FEWEST_TO_SAY = 60, 8, 4  # what the pace is taken from
_NAMES = {"iterate": "iterate", "swa": "SWA", "ema": "EMA", "power": "power", "wsm": "WSM"}


def carry_out(
    recipe: Recipe,
    choose_folder: Callable[[], Path],
    *,
    resume: bool,
    threads: int | None = None,
    jobs: int | None = None,
) -> None:
    """Train with a live table, or with plain lines if there is no terminal, then print the results.

    Of several processes only the first one prints.
    """
    check_placement(threads, jobs)
    with joined(recipe.strategy, Hardware.named(recipe.device).device) as ranks:
        folder = ranks.first(choose_folder)
        if ranks.count > 1:
            placement = Placement(threads or torch.get_num_threads(), jobs or 1)
        else:
            known = recorded_threads(folder) if resume else None
            placement = Placement.chosen(recipe, threads or known, jobs)
        with placement.in_effect():
            if ranks.index:
                train(recipe, folder, resume=resume)
                return
            console, run = _train(recipe, folder, resume=resume, placement=placement)
    with placement.in_effect():  # alone: the report measures statistics, which ranks would pool
        _print_results(console, run)


def _train(
    recipe: Recipe, folder: Path, *, resume: bool, placement: Placement
) -> tuple[Console, Run]:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    with ready(recipe, folder, resume=resume, jobs=placement.jobs) as begin:
        before = Run(folder).records()
        verb = "Resuming" if before else "Running"
        for line in (
            f"{verb} recipe {recipe.name} in {folder}",
            f"Data: {describe_data(recipe, load_data(recipe))}",
            describe_work(recipe, placement),
        ):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        try:
            with _display(console, recipe, before) as watch:
                return console, begin(watch)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "Stopped; finished epochs are kept. Continue with: "
                f"polyak train --resume --output {shlex.quote(str(folder))}"
            ) from None


def describe_work(recipe: Recipe, placement: Placement) -> str:
    """How much there is to train, and on what.

    >>> describe_work(Recipe(), Placement(threads=1, jobs=2))
    '159 epochs in all: 3 seeds of sgd, half, swa; 2 side by side, 1 thread each'
    """
    seeds, threads = count(recipe.seeds, "seed"), count(placement.threads, "thread")
    where = f"{placement.jobs} side by side, {threads} each" if placement.jobs > 1 else threads
    arms = ", ".join(recipe.arms)
    return f"{count(len(plan(recipe)), 'epoch')} in all: {seeds} of {arms}; {where}"


@contextmanager
def _display(console: Console, recipe: Recipe, before: list[dict[str, Any]]) -> Iterator[Watch]:
    left = TimeLeft(sum(r["kind"] == "epoch" for r in before) / len(plan(recipe)))
    if not console.is_terminal:
        yield lambda record, done: console.print(
            plain_line(recipe, record, left.text(done)), highlight=False, soft_wrap=True
        )
        return
    table = LiveTable(recipe, before)
    with Live(table.render(""), console=console, refresh_per_second=4) as live:

        def watch(record: dict[str, Any], done: float) -> None:
            table.take(record)
            live.update(table.render(left.text(done)))

        yield watch


class TimeLeft:
    """The time left to train, from the pace of the last minute or so of this process.

    `before` is the fraction that was finished when it began.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._seen = deque([(time.monotonic(), before)])

    def text(self, done: float) -> str:
        """`1:05 left to train`, given the finished fraction; empty until a few epochs have ended."""
        now = time.monotonic()
        self._seen.append((now, done))
        while len(self._seen) > _FEWEST_EPOCHS and now - self._seen[1][0] > _RECENT_SECONDS:
            self._seen.popleft()
        start, done_then = self._seen[0]
        if done >= 1 or done <= done_then or len(self._seen) < _FEWEST_TO_SAY:
            return ""
        seconds = round((now - start) / (done - done_then) * (1 - done))
        return f"{seconds // 60}:{seconds % 60:02d} left to train"


def plain_line(recipe: Recipe, record: dict[str, Any], left: str) -> str:
    """One record as a line."""
    is_text = recipe.task == "words"
    place = f"seed {record['seed']} {record['arm']:<{max(6, *map(len, recipe.arms))}}"
    if record["kind"] == "final":
        return f"{place} {_NAMES[record['weights']]}: {_final_text(record, is_text=is_text)}"
    metrics = ", ".join(
        f"{_NAMES[kind]} {'' if is_text else rounded(value['error'], 2) + '% '}{rounded(value['nll'], 4)}"
        for kind, value in record["evaluations"].items()
    )
    return (
        f"{place} epoch {record['epoch']:>3}/{recipe.last_epoch(record['arm'])}  rate {record['rate']:.4f}  "
        f"loss {record['train_loss']:.4f}  validation: {metrics}  {left}"
    ).rstrip()


def _final_text(record: dict[str, Any], *, is_text: bool) -> str:
    nll, error = rounded(record["nll"], 4), rounded(record["error"], 2)
    if is_text:
        rise = rounded(record["int8_rise"], 2, signed=True)
        return f"test loss {nll} nats per byte, next byte wrong {error}%, int8 {rise} millinats"
    return f"test error {error}%, NLL {nll}, calibration error {rounded(record['ece'], 2)}%"


class LiveTable:
    """A row for each arm of each seed, filled in as records come."""

    def __init__(self, recipe: Recipe, before: Iterable[dict[str, Any]] = ()) -> None:
        self._recipe = recipe
        self._latest: dict[tuple[int, str], dict[str, Any]] = {}
        self._rows = list(dict.fromkeys((unit.seed, unit.arm) for unit in plan(recipe)))
        kinds = {"iterate", "swa", *recipe.averages} - {"wsm"}  # which is made at the end
        self._kinds = [kind for kind in _NAMES if kind in kinds]
        for record in before:
            self.take(record)

    def take(self, record: dict[str, Any]) -> None:
        """Show this record in its row."""
        if record["kind"] == "epoch":
            self._latest[record["seed"], record["arm"]] = record

    def render(self, left: str) -> Table:
        """The table with the latest records."""
        what = "loss in nats per byte of validation windows"
        if self._recipe.task == "images":
            what = "error % / NLL on the validation images"
        title = f"recipe {self._recipe.name}: {what}"
        table = _table(title, left or None)
        for name in (
            "seed",
            "arm",
            "epoch",
            "rate",
            "loss",
            *(_NAMES[kind] for kind in self._kinds),
        ):
            table.add_column(name, justify="left" if name == "arm" else "right")
        for seed, arm in self._rows:
            table.add_row(str(seed), arm, *self._cells(self._latest.get((seed, arm))))
        return table

    def _cells(self, record: dict[str, Any] | None) -> list[str]:
        if record is None:
            return ["waits"]
        metrics = record["evaluations"]
        is_text = self._recipe.task == "words"
        return [
            f"{record['epoch']}/{self._recipe.last_epoch(record['arm'])}",
            f"{record['rate']:.4f}",
            f"{record['train_loss']:.4f}",
            *(
                f"{'' if is_text else rounded(metrics[kind]['error'], 2) + ' / '}"
                f"{rounded(metrics[kind]['nll'], 3)}"
                if kind in metrics
                else "-"
                for kind in self._kinds
            ),
        ]


def _print_results(console: Console, run: Run) -> None:
    finals = Finals(run.finals())
    console.print(values_table(finals))
    if len(finals.rows) > 1:
        console.print(differences_table(finals))
    console.print(_LEGENDS[run.recipe.task], style="dim")
    console.print(f"run folder      {run.folder}", highlight=False)
    if (run.folder / "swa.safetensors").exists():
        console.print(f"averaged model  {run.folder / 'swa.safetensors'}", highlight=False)
    _print_report(console, run)


def _print_report(console: Console, run: Run) -> None:
    first = "Measuring the surface around the solutions and drawing"
    if run.recipe.task == "words":
        first = "Asking the record and drawing"
    console.print(f"{first} the report ...", highlight=False)
    try:
        measure_landscape(run)
        console.print(f"report          {write_report(run.folder)}", highlight=False)
    except MissingExtra as missing:
        console.print(f"report          none: {missing}", highlight=False)
    except OutputError:
        console.print(
            f"The run is complete. For its report: polyak report {shlex.quote(str(run.folder))}",
            highlight=False,
        )
        raise


def values_table(finals: Finals) -> Table:
    """Every metric of every kind of weights."""
    seeds = count(finals.n_seeds, "seed")
    table = _metrics_table(finals, f"On {finals.terms.tested_on}: mean ± standard error, {seeds}")
    for row in finals.rows:
        means = ((finals.mean(row, metric.key), _digits(metric)) for metric in finals.metrics)
        table.add_row(finals.label(row), *(format_estimate(mean, digits) for mean, digits in means))
    return table


def differences_table(finals: Finals) -> Table:
    """The difference of every kind of weights to the annealed arm's last iterate."""
    to = finals.terms.baseline_name
    table = _metrics_table(
        finals, f"Difference to {to}, paired by seed: mean ± half the 95% interval"
    )
    for row in finals.rows:
        if row != finals.baseline:
            pairs = ((finals.difference(row, m.key), _digits(m)) for m in finals.metrics)
            table.add_row(
                finals.label(row),
                *(
                    format_estimate(value, digits, signed=True) if value else ""
                    for value, digits in pairs
                ),
            )
    return table


def _metrics_table(finals: Finals, title: str) -> Table:
    table = _table(title)
    headings = _HEADINGS["images" if finals.terms == IMAGES else "words"]
    table.add_column("weights", no_wrap=True)
    for metric in finals.metrics:
        table.add_column(headings[metric.key], justify="right", no_wrap=True)
    return table


def _table(title: str, caption: str | None = None) -> Table:
    """Without edges and with narrow gaps, to fit a terminal of 80 columns."""
    return Table(
        title=f"\n{title}",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0),
        pad_edge=False,
    )


def _digits(metric: Metric) -> int:
    return min(3, metric.digits)
