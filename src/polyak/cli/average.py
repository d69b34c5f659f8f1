"""`polyak average`: average checkpoints into new files, or convert one.

Its flags come in groups. The fields of `Tensors`, `Work` and `Outputs` that have the name of a
`MergeOptions` field are passed on as they are.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from polyak.cli.converters import Flag, Many, MaybeWhole, each, file_or_folder
from polyak.cli.trajectory import Record, average_record
from polyak.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from polyak.checkpoints.merging.average import MergeResult
    from polyak.checkpoints.merging.options import MergeOptions
    from polyak.checkpoints.merging.prepare import Merge, PathLike
    from polyak.checkpoints.merging.selection import Found, Selection
    from polyak.checkpoints.merging.spread import Spread
    from polyak.checkpoints.merging.weights import Method, OutputWeights

_WIDE = 10_000


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Which of the checkpoints to take.

    Attributes:
        last: Keep the N latest, by training step.
        steps: Keep a range of training steps, FIRST:LAST, both included; either may be missing.
        every: Keep those whose step is a multiple of this.
        best: Keep the N best by --metric.
        metric: eval_loss, val_accuracy, ...; min:NAME or max:NAME where the name does not say.
        scores: A CSV or JSONL file with the columns step (or file) and the metric. Without it
            trainer_state.json or Lightning's callback state is read.
        steps_unit: What times in --method count instead of steps, like tokens: a column of
            --steps-from, or the number after this word in the names (step100-tokens4B).
        steps_from: A CSV or JSONL file with the columns step (or file) and the unit.

    """

    last: MaybeWhole = None
    steps: str | None = None
    every: MaybeWhole = None
    best: MaybeWhole = None
    metric: str | None = None
    scores: Path | None = None
    steps_unit: str | None = None
    steps_from: Path | None = None

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
        method: swa, ema:half_life=3000, ema:decay=0.999, power:std=0.1, polynomial:c=1,k=0.5,
            window:length=10000, annealed:shape=linear|cosine|sqrt; times in training steps. Of separate
            fine-tunes, with --base: ties:density=0.2, dare:density=0.1, model-stock; of two,
            slerp:t=0.5. By default swa.
        weights: One weight per input in the order given, like 0.2,0.3,0.5, instead of --method.
        normalize: Divide the weights by their sum.

    """

    output: Annotated[
        list[Path],
        Parameter(
            name=["--output", "-o"],
            negative="",
            consume_multiple=False,
            converter=each(file_or_folder),
        ),
    ]
    method: Annotated[list[str], Many] | None = None
    weights: Annotated[list[str], Many] | None = None
    normalize: Annotated[bool, Flag] = False

    def methods(self) -> dict[PathLike, Method]:
        """Output -> method; ArgumentError where their numbers differ."""
        if self.method and self.weights:
            raise ArgumentError("--method and --weights exclude each other.")
        methods: list[Method] = [comma_separated(text) for text in self.weights or ()]
        methods = methods or list(self.method or ["swa"])
        if len(methods) != len(self.output):
            raise ArgumentError(
                f"{len(methods)} methods and {len(self.output)} outputs; give one --method for each -o."
            )
        if len(set(self.output)) < len(self.output):
            raise ArgumentError("Two outputs have the same path.")
        return dict(zip(self.output, methods, strict=True))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What happens to the tensors.

    Attributes:
        dtype: Of floating tensors as written: float32, bfloat16, float16, float64.
        include: Average only the tensors that fit this pattern; may be repeated.
        exclude: Take the tensors that fit this pattern from the newest; may be repeated.
        base: A checkpoint to add weighted differences to: base + sum of weight x (input - base).
        key: Where the tensors are inside nested dicts, with dots.
        shard_size: The size of a shard, where the output is a folder; 5GB by default.
        format: Of a folder: safetensors, the default, or dcp (torch.distributed.checkpoint).
        dcp_files: How many files a DCP folder has; by default as many as the newest input.
        dcp_key: Where the tensors are in a DCP folder, like model; by default as in the newest.
        keep_state: Carry over what the newest DCP folder holds beside the model.

    """

    dtype: str | None = None
    include: Annotated[list[str], Many] | None = None
    exclude: Annotated[list[str], Many] | None = None
    base: str | None = None
    key: str | None = None
    shard_size: str | None = None
    format: str | None = None
    dcp_files: MaybeWhole = None
    dcp_key: str | None = None
    keep_state: Annotated[bool, Flag] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done.

    Attributes:
        max_memory: For buffers, above what Python and torch take.
        threads: By default one per core, at most 16.
        part: I/N: one of N processes that share the work on a shared disk; the last one publishes.
            Under torchrun each rank takes its part.
        resume: Continue a merge that was interrupted.
        verify: Hash the inputs while they are read, then read the output back and check it.
        overwrite: Replace outputs that exist.
        dry_run: Print the plan and stop.

    """

    max_memory: str = "128MiB"
    threads: MaybeWhole = None
    part: str | None = None
    resume: Annotated[bool, Flag] = False
    verify: Annotated[bool, Flag] = False
    overwrite: Annotated[bool, Flag] = False
    dry_run: Annotated[bool, Flag] = False


def comma_separated(text: str) -> list[float]:
    """The numbers of --weights."""
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


_INPUTS, _TENSORS, _WORK, _RECORD = Inputs(), Tensors(), Work(), Record()


def average(
    *inputs: str,
    outputs: Outputs,
    which: Inputs = _INPUTS,
    tensors: Tensors = _TENSORS,
    work: Work = _WORK,
    record: Record = _RECORD,
) -> None:
    """Average checkpoints into new files. One input converts: to the suffix of -o, to --dtype.

    Of the record of a run (the folder of a polyak.Recorder) any average is made, seen from any moment.

    Args:
        inputs: Checkpoints, folders of them, globs: safetensors, torch archives, Transformers,
            Lightning, DCP, npz; local or s3://, gs://, https://.
        outputs: What to write, and how it is averaged.
        which: Which of the checkpoints to take.
        tensors: What happens to the tensors.
        work: How the work is done.
        record: Where the one input is the record of a run.

    """
    from rich.console import Console

    from polyak.checkpoints.merging.average import run_merge
    from polyak.checkpoints.merging.options import MergeOptions
    from polyak.checkpoints.merging.selection import find_checkpoints
    from polyak.checkpoints.record_or_checkpoints import means_record

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE  # a path in a file or a pipe stays in one piece
    shared = _part_of_torchrun()
    console.quiet = shared is not None and not shared.startswith("1/")  # one plan, not one per rank
    methods = outputs.methods()
    if tensors.shard_size and not any(not path.suffix for path in outputs.output):
        raise ArgumentError("--shard-size is for outputs that are folders; these are single files.")
    options = MergeOptions(**_options(which, outputs, tensors, work))
    options = replace(options, part=work.part or shared)
    if means_record(inputs):
        if shared:
            raise ArgumentError(
                "A record is averaged by one process. Run the same command without torchrun."
            )
        if which != _INPUTS or outputs.weights:
            raise ArgumentError(
                "The input is the record of a run: --method and --until say what of it to take, not "
                "--weights or a selection of checkpoints."
            )
        with notices(console), _continuable(methods), _progress(console) as progress:
            average_record(
                console,
                inputs[0],
                methods,
                replace(options, progress=progress),
                record,
                work.dry_run,
            )
        return
    if record != _RECORD:
        raise ArgumentError(
            "--until and --cache-size are for the record of a run: one folder with interval-<k>.safetensors."
        )
    with ExitStack() as opened, notices(console):
        found = find_checkpoints(inputs, which.selection(), key=tensors.key)
        _note_fewer(console, which, len(found.kept))
        for checkpoint in found.kept:
            opened.enter_context(checkpoint)
        if work.dry_run:
            _dry_run(console, found, methods, options)
            return
        with _continuable(methods), _progress(console) as progress:
            done = run_merge(
                found.kept,
                methods,
                replace(options, progress=progress),
                announce=partial(_print_inputs, console, found.left_out),
            )
    console.quiet = console.quiet and not done.published
    _print_done(console, done)


def _part_of_torchrun() -> str | None:
    """The part of the work that is this process's where torchrun has started several."""
    world = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" not in os.environ or world == "1":
        return None
    return f"{int(os.environ['RANK']) + 1}/{world}"


def _note_fewer(console: Console, which: Inputs, found: int) -> None:
    """Say where fewer checkpoints are left than were asked for."""
    for flag, asked in (("--last", which.last), ("--best", which.best)):
        if asked is not None and found < asked:
            console.print(
                f"Note: {flag} {asked}, but only {found} checkpoints are there.", style="yellow"
            )


def _options(*groups: Any) -> dict[str, Any]:
    """The flags that were given, by the names of the keywords of `average_checkpoints`."""
    from polyak.checkpoints.merging.options import MergeOptions

    names = {field.name for field in fields(MergeOptions)}
    given = {f.name: getattr(group, f.name) for group in groups for f in fields(group)}
    return {name: value for name, value in given.items() if name in names and value is not None}


def _dry_run(
    console: Console, found: Found, methods: dict[PathLike, Method], options: MergeOptions
) -> None:
    from polyak.checkpoints.merging.execute import check_outputs
    from polyak.checkpoints.merging.prepare import prepared, warn_of_lost_state, warn_of_stale
    from polyak.checkpoints.merging.spread import spread_of, warn_of_no_basin

    with prepared(found.kept, methods, options) as merge:
        check_outputs(merge)
        warn_of_stale(merge)
        warn_of_lost_state(merge)
        spread = spread_of(merge)
        warn_of_no_basin(spread)
        _print_inputs(console, found.left_out, merge, spread)
        _print_plan(console, merge)


def _print_inputs(
    console: Console, left_out: dict[str, str], merge: Merge, spread: Spread | None
) -> None:
    """Every input with its step and its weights, and what does not count."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from polyak.checkpoints.merging.units import measured_times

    console.print(f"Inputs: {len(merge.inputs)} taken, {len(left_out)} left out")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("input", overflow="fold")
    table.add_column("step", justify="right")
    measured = measured_times(merge.inputs, merge.options)
    if measured:
        table.add_column(Text(measured[0]), justify="right")
    for one in merge.blueprints:
        table.add_column(Text(one.target.name), justify="right")
    for index, given in enumerate(merge.inputs):
        shares = [_share(one, index) for one in merge.weights]
        step = "?" if given.step is None else str(given.step)
        times = [f"{measured[1][index]:.6g}"] if measured else []
        table.add_row(Text(given.path), step, *times, *shares)
    blank = [""] * (2 if measured else 1)
    if not all(one.combination for one in merge.weights):
        samples = ["" if w.combination else f"{w.effective_samples:.3g}" for w in merge.weights]
        table.add_row("effective samples", *blank, *samples)
    if spread is not None and any(one is not None for one in spread.relative):
        apart = ["" if one is None else f"{one:.2%}" for one in spread.relative]
        table.add_row("spread (RMS, of the mean)", *blank, *apart)
    console.print(table)
    for path, why in left_out.items():
        console.print(f"Left out: {path}: {why}", markup=False, soft_wrap=True)


def _share(one: OutputWeights, index: int) -> str:
    if one.combination is not None and not one.combination.is_weighted:
        return "by tensor"
    return f"{one.coefficients[index]:.4g}"


def _print_plan(console: Console, merge: Merge) -> None:
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


def _print_done(console: Console, done: MergeResult) -> None:
    if not done.published:
        console.print("This part is done; the last of the others will publish the result.")
        return
    for path, weights, stock in zip(done.outputs, done.weights, done.stock, strict=True):
        counted = sum(weight != 0 for weight in weights.coefficients)
        effective = "" if weights.combination else f" ({weights.effective_samples:.3g} effective)"
        lines = [
            f"{path}: {weights.label} of {counted} checkpoints{effective}, {done.tensors} tensors"
        ]
        lines += [] if stock is None else [f"  {stock}"]
        console.print("\n".join(lines), soft_wrap=True, markup=False)
    console.print(
        f"{_size(done.bytes_read)} read, {_size(done.bytes_written)} written in {done.seconds:.1f} s"
    )


@contextmanager
def notices(console: Console) -> Iterator[None]:
    """Print what the library warns about, once, as a sentence."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        console.print(f"Note: {warning.message}", style="yellow", markup=False, soft_wrap=True)


@contextmanager
def _continuable(outputs: Iterable[PathLike]) -> Iterator[None]:
    """Let Ctrl-C say what was kept, and how to go on."""
    from polyak.checkpoints.merging.outputs import leftovers

    try:
        yield
    except KeyboardInterrupt:
        kept = [str(folder) for output in outputs for folder in leftovers(Path(output))]
        raise KeyboardInterrupt(
            f"Stopped. What was done is kept in {', '.join(kept)}. Continue with the same command and "
            "--resume, or remove it."
            if kept
            else "Stopped. Nothing was written."
        ) from None


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
