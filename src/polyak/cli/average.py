"""`polyak average`: average checkpoints into new files, or convert one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from polyak.cli.average_options import Inputs, Outputs, Tensors, Work

if TYPE_CHECKING:
    from rich.console import Console

    from polyak.checkpoints.merging.average import Averaged
    from polyak.checkpoints.merging.options import Options
    from polyak.checkpoints.merging.paths import PathLike
    from polyak.checkpoints.merging.prepare import Merge
    from polyak.checkpoints.merging.recipes import How

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
    paths = select_checkpoints(inputs, which.selection(), key=tensors.key)
    with _notices(console):
        if work.dry_run:
            _dry_run(console, paths, recipes, options)
            return
        with _progress(console) as progress:
            options["progress"] = progress
            done = average_checkpoints(paths, recipes, **options)
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
    console: Console, paths: list[str], recipes: dict[PathLike, How], options: Options
) -> None:
    from polyak.checkpoints.merging.execute import check_outputs
    from polyak.checkpoints.merging.options import Settings
    from polyak.checkpoints.merging.prepare import prepared, warn_of_stale

    with prepared(paths, recipes, Settings.of(options)) as merge:
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
