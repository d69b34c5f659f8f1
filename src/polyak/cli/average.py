"""What `polyak average` can be told, in groups; each becomes what the library takes.

`polyak average`: average checkpoints into new files, or convert one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from polyak.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from polyak.checkpoints.merging.average import Averaged
    from polyak.checkpoints.merging.options import Options
    from polyak.checkpoints.merging.prepare import Merge, PathLike
    from polyak.checkpoints.merging.selection import Selection
    from polyak.checkpoints.merging.weights import How
    from polyak.checkpoints.reading.stored import Checkpoint

_Flag = Parameter(negative="")
_Many = Parameter(negative="", consume_multiple=False)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Which of the checkpoints to take.

    Attributes:
        last: So many of the latest, by training step.
        steps: A range of training steps, FIRST:LAST, both included; either may be missing.
        every: Only those whose step is a multiple of this.
        best: So many with the best --metric.
        metric: eval_loss, val_accuracy, ...; min:NAME or max:NAME where the name does not say.
        scores: A CSV or JSONL file with the columns step (or file) and the metric. Without it
            trainer_state.json or Lightning's callback state is read.

    """

    last: int | None = None
    steps: str | None = None
    every: int | None = None
    best: int | None = None
    metric: str | None = None
    scores: Path | None = None

    def selection(self) -> Selection:
        """As the library takes it."""
        from polyak.checkpoints.merging.selection import Selection

        return Selection(
            steps=_range(self.steps),
            every=self.every,
            best=self.best,
            metric=self.metric,
            scores=self.scores,
            last=self.last,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What to write, and how it is averaged.

    Attributes:
        output: A .safetensors file, a torch archive (.pt .pth .bin .ckpt), or a folder. Repeat
            --method and -o for several outputs in one pass.
        method: swa, ema:half_life=3000, ema:decay=0.999, power:std=0.1, window:length=10000,
            annealed:shape=linear|cosine|sqrt; times in training steps. swa unless given.
        weights: One weight per input in the order given, like 0.2,0.3,0.5, instead of --method.
        normalize: Divide the weights by their sum.

    """

    output: Annotated[
        list[Path], Parameter(name=["--output", "-o"], negative="", consume_multiple=False)
    ]
    method: Annotated[list[str], _Many] | None = None
    weights: Annotated[list[str], _Many] | None = None
    normalize: Annotated[bool, _Flag] = False

    def recipes(self) -> dict[PathLike, How]:
        """Output -> how; ArgumentError where their numbers differ."""
        if self.method and self.weights:
            raise ArgumentError("--method and --weights exclude each other.")
        hows: list[How] = [_numbers(text) for text in self.weights or ()]
        hows = hows or list(self.method or ["swa"])
        if len(hows) != len(self.output):
            raise ArgumentError(
                f"{len(hows)} methods and {len(self.output)} outputs; give one --method for each -o."
            )
        if len(set(self.output)) < len(self.output):
            raise ArgumentError("Two outputs have the same path.")
        return dict(zip(self.output, hows, strict=True))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What of the tensors.

    Attributes:
        dtype: What floating tensors are written as: float32, bfloat16, float16, float64.
        include: Average only the tensors that fit this pattern; may be repeated.
        exclude: Take the tensors that fit this pattern from the newest; may be repeated.
        base: A checkpoint to add weighted differences to: base + sum of weight x (input - base).
        key: Where the tensors lie inside nested dicts, with dots.
        shard_size: The size of a shard, where the output is a folder.

    """

    dtype: str | None = None
    include: Annotated[list[str], _Many] | None = None
    exclude: Annotated[list[str], _Many] | None = None
    base: str | None = None
    key: str | None = None
    shard_size: str = "5GB"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done.

    Attributes:
        max_memory: For buffers, above what Python and torch take.
        threads: As many as there are cores, unless given.
        part: I/N: one of N processes that share the work on a shared disk; the last one publishes.
        resume: Go on with a merge that was interrupted.
        verify: Hash the inputs while they are read, then read the output back and check it.
        overwrite: Replace outputs that exist.
        dry_run: Print the plan and stop.

    """

    max_memory: str = "128MiB"
    threads: int | None = None
    part: str | None = None
    resume: Annotated[bool, _Flag] = False
    verify: Annotated[bool, _Flag] = False
    overwrite: Annotated[bool, _Flag] = False
    dry_run: Annotated[bool, _Flag] = False


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"--weights {text!r}: expected numbers like 0.2,0.3,0.5.") from None


def _range(text: str | None) -> tuple[int | None, int | None] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    try:
        bounds = (int(first) if first else None, int(last) if last else None)
    except ValueError:
        colon = ""
    if not colon:
        raise ArgumentError(f"--steps {text!r}: expected FIRST:LAST, like 1000:5000 or 1000:")
    return bounds


_INPUTS, _TENSORS, _WORK = Inputs(), Tensors(), Work()


def average(
    *inputs: str,
    outputs: Outputs,
    which: Inputs = _INPUTS,
    tensors: Tensors = _TENSORS,
    work: Work = _WORK,
) -> None:
    """Average checkpoints into new files. One input and another suffix or --dtype of -o converts.

    Args:
        inputs: Checkpoints, folders of them, globs: safetensors, torch archives, Transformers,
            Lightning, DCP, npz; local or s3://, gs://, https://.
        outputs: What to write.
        which: Which checkpoints.
        tensors: Which tensors.
        work: How.

    """
    from rich.console import Console

    from polyak.checkpoints.merging.average import average_checkpoints
    from polyak.checkpoints.merging.selection import select_checkpoints

    console = Console(highlight=False)
    recipes = outputs.recipes()
    options = _options(outputs, tensors, work)
    with ExitStack() as opened, _notices(console):
        selected = select_checkpoints(inputs, which.selection(), key=tensors.key)
        for checkpoint in selected:
            opened.enter_context(checkpoint)
        if work.dry_run:
            _dry_run(console, selected, recipes, options)
            return
        with _progress(console) as progress:
            options["progress"] = progress
            done = average_checkpoints(selected, recipes, **options)
    _print_done(console, done)


def _options(outputs: Outputs, tensors: Tensors, work: Work) -> Options:
    return {
        "dtype": tensors.dtype,
        "include": tensors.include or (),
        "exclude": tensors.exclude or (),
        "base": tensors.base,
        "key": tensors.key,
        "normalize": outputs.normalize,
        "shard_size": tensors.shard_size,
        "max_memory": work.max_memory,
        "threads": work.threads,
        "part": work.part,
        "resume": work.resume,
        "verify": work.verify,
        "overwrite": work.overwrite,
    }


def _dry_run(
    console: Console, selected: list[Checkpoint], recipes: dict[PathLike, How], options: Options
) -> None:
    from polyak.checkpoints.merging.execute import check_outputs
    from polyak.checkpoints.merging.options import Settings
    from polyak.checkpoints.merging.prepare import prepared, warn_of_stale

    with prepared(selected, recipes, Settings.of(options)) as merge:
        warn_of_stale(merge)
        _print_plan(console, merge)
        if not merge.settings.resume:
            check_outputs(merge)


def _print_plan(console: Console, merge: Merge) -> None:
    from rich import box
    from rich.table import Table

    table = Table("input", box=box.SIMPLE_HEAD)
    table.add_column("step", justify="right")
    for one in merge.blueprints:
        table.add_column(one.target.name, justify="right")
    for index, given in enumerate(merge.inputs):
        shares = [f"{recipe.weights[index]:.4g}" for recipe in merge.recipes]
        table.add_row(given.path, "?" if given.step is None else str(given.step), *shares)
    table.add_row("effective samples", "", *[f"{r.effective_samples:.3g}" for r in merge.recipes])
    console.print(table)
    means = sum(tensor.mean for tensor in merge.alignment.tensors)
    console.print(
        f"{means} tensors averaged, {len(merge.alignment.tensors) - means} taken from the newest; "
        f"{_size(merge.bytes_read)} to read, {_size(merge.bytes_written)} to write",
        soft_wrap=True,
    )
    console.print(
        f"{merge.threads} threads, {_size(merge.memory)} of buffers at the peak, about "
        f"{merge.expected_seconds():.1f} s to read and average (probed), writing not counted",
        soft_wrap=True,
    )


def _print_done(console: Console, done: Averaged) -> None:
    if not done.published:
        console.print("This part is done; the last of the others will publish the result.")
        return
    for path, recipe in zip(done.outputs, done.recipes, strict=True):
        counted = sum(weight != 0 for weight in recipe.weights)
        console.print(
            f"{path}: {recipe.label} of {counted} checkpoints "
            f"({recipe.effective_samples:.3g} effective), {done.tensors} tensors",
            soft_wrap=True,
            markup=False,
        )
    console.print(
        f"{_size(done.bytes_read)} read, {_size(done.bytes_written)} written in {done.seconds:.1f} s"
    )


@contextmanager
def _notices(console: Console) -> Iterator[None]:
    """Print what the library warns about, once, as a sentence."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        console.print(f"Note: {warning.message}", style="yellow", markup=False, soft_wrap=True)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("averaging", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _size(nbytes: int) -> str:
    from polyak.cli.inspect import size

    return size(nbytes)
