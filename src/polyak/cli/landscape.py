"""`polyak landscape`: scores between and around checkpoints, curves, and the Hessian's eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from polyak.cli.converters import Flag, NewFile, Whole, each, file_name
from polyak.cli.scorer import Scorer
from polyak.errors import ArgumentError

if TYPE_CHECKING:
    from polyak.report.scans import Scan
    from polyak.study.scanning import Points

landscape = App(name="landscape", help="Scores between and around checkpoints.")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where points come from, and where the answer goes.

    Attributes:
        trajectory: The record of a run: the inputs are then first, last, mean or profiles like
            ema:half_life=500, each with @MOMENT where not at the end.
        key: Where the weights are inside the files, as in ema.state_dict.
        output: Write the scores (.json, .csv) or a picture (.png, .svg, .pdf); may be repeated.
        overwrite: Replace the outputs if they exist.

    """

    trajectory: Path | None = None
    key: str | None = None
    output: Annotated[
        list[Path],
        Parameter(
            name=["--output", "-o"], consume_multiple=False, negative="", converter=each(file_name)
        ),
    ] = field(default_factory=list)
    overwrite: Annotated[bool, Flag] = False

    def options(self, scorer: Scorer) -> dict[str, Any]:
        """Of the library."""
        found = scorer.judging() | {"key": self.key}
        if found["cache"] is None and self.trajectory is not None:
            from polyak.checkpoints.intervals import the_record

            found["cache"] = the_record(self.trajectory) / ".scores"
        elif found["cache"] is None:
            beside = self.output[0].absolute().parent if self.output else Path.cwd()
            found["cache"] = beside / ".scores"
        return found


_SCORER, _PLACED = Scorer(), Placed()


@landscape.command
def line(
    *inputs: str,
    curve: Path | None = None,
    points: Whole = 21,
    beyond: float = 0.0,
    scorer: Scorer = _SCORER,
    placed: Placed = _PLACED,
) -> None:
    """The way through checkpoints, and the barrier between each and the next.

    Args:
        inputs: Two checkpoints or more, in the order of the way.
        curve: A file with the control point of a Bezier curve between two checkpoints, to follow instead.
        points: On each segment, its two ends included.
        beyond: How far to go on beyond the ends, as a fraction of a segment.
        scorer: How points are judged.
        placed: Where points come from, and where the answer goes.

    """
    from polyak.study.scanning import scan_line

    options = {"curve": curve, "points": points, "beyond": beyond}
    _scan(scan_line, inputs, ("last", "mean"), scorer, placed, options)


@landscape.command
def plane(
    *inputs: str,
    points: Whole = 11,
    margin: float = 0.2,
    scorer: Scorer = _SCORER,
    placed: Placed = _PLACED,
) -> None:
    """The plane through three checkpoints, or a trajectory's own: its two leading principal directions.

    Args:
        inputs: Three checkpoints; further ones are shown at the foot of their perpendicular.
        points: On each side of the square.
        margin: Beyond the outermost checkpoint, as a fraction of the extent.
        scorer: How points are judged.
        placed: Where points come from, and where the answer goes.

    """
    from polyak.study.scanning import scan_plane

    _scan(scan_plane, inputs, (), scorer, placed, {"points": points, "margin": margin})


@landscape.command
def rays(  # noqa: PLR0913 - each one is an option
    *inputs: str,
    rays: Whole = 10,
    points: Whole = 6,
    reach: float | None = None,
    normalize: Literal["filter"] | None = None,
    seed: Whole = 0,
    scorer: Scorer = _SCORER,
    placed: Placed = _PLACED,
) -> None:
    """Random rays from each checkpoint, in the same directions from each.

    Args:
        inputs: One checkpoint or more.
        rays: How many directions.
        points: On each ray, its centre included.
        reach: The longest distance; by default 0.6 of the length of the weights, with --normalize filter 1.
        normalize: filter: directions as long as the weights, filter by filter (Li et al. 2018).
        seed: Of the directions.
        scorer: How points are judged.
        placed: Where points come from, and where the answer goes.

    """
    from polyak.study.scanning import scan_rays

    options = {
        "rays": rays,
        "points": points,
        "reach": reach,
        "normalize": normalize,
        "seed": seed,
    }
    _scan(scan_rays, inputs, ("last", "mean"), scorer, placed, options)


@landscape.command
def connect(  # noqa: PLR0913 - each one is an option
    *inputs: str,
    model: str,
    loss: str,
    data: str,
    output: Annotated[NewFile, Parameter(name=["--output", "-o"])],
    epochs: Whole = 10,
    rate: float = 0.05,
    key: str | None = None,
    overwrite: Annotated[bool, Flag] = False,
) -> None:
    """Train a curve of low loss between two checkpoints; line --curve then follows it.

    Args:
        inputs: Two checkpoints.
        model: package.module:function that builds the model; called without arguments.
        loss: package.module:function of the model and a batch; it returns the mean, or one value for each example.
        data: package.module:function that returns batches to train on.
        output: Write the curve's control point: a .safetensors file or a torch archive.
        epochs: How often the data is read.
        rate: The learning rate of SGD with momentum 0.9.
        key: Where the weights are inside the files, as in ema.state_dict.
        overwrite: Replace the output if it exists.

    """
    from rich.console import Console

    from polyak.checkpoints.writing.save import check_target
    from polyak.objects import call_object, load_object
    from polyak.study.curves import connect as train

    check_target(output, overwrite=overwrite)
    _refuse_inputs([output], inputs, key)
    built, taken = call_object(model), load_object(loss)
    curve = train(inputs, built, taken, call_object(data), epochs=epochs, rate=rate, key=key)
    curve.save(output, overwrite=overwrite)
    first, last = curve.losses[0], curve.losses[-1]
    Console(highlight=False).print(
        f"{output}: the mean loss on the curve went from {first:.4g} to {last:.4g} in {epochs} epochs",
        soft_wrap=True, markup=False,
    )  # fmt: skip


@landscape.command
def curvature(  # noqa: PLR0913 - each one is an option
    *inputs: str,
    model: str,
    loss: str,
    data: str,
    k: Whole = 1,
    which: Literal["largest", "smallest", "magnitude"] = "largest",
    iterations: Whole = 100,
    tolerance: float = 1e-3,
    key: str | None = None,
) -> None:
    """The Hessian's extreme eigenvalues at each checkpoint, by Lanczos.

    Args:
        inputs: One checkpoint or more. BatchNorm uses the statistics in them: polyak update-bn first.
        model: package.module:function that builds the model; called without arguments.
        loss: package.module:function of the model and a batch; it returns the mean, or one value for each example.
        data: package.module:function that returns batches.
        k: How many eigenvalues.
        which: The largest or smallest ones, or those of the largest magnitude.
        iterations: At most so many products with the Hessian.
        tolerance: Of the largest eigenvalue.
        key: Where the weights are inside the files, as in ema.state_dict.

    """
    from rich.console import Console

    from polyak.objects import call_object, load_object
    from polyak.study.curvature import curvatures

    built, taken = call_object(model), load_object(loss)
    options = {"k": k, "which": which, "iterations": iterations, "tolerance": tolerance}
    found = curvatures(inputs, built, taken, call_object(data), key=key, **options)
    for name, one in found:
        Console(highlight=False).print(f"{name}: {one}", soft_wrap=True, markup=False)


def _refuse_inputs(outputs: Iterable[Path], inputs: Iterable[str], key: str | None) -> None:
    """Refuse outputs that would take the place of a checkpoint, also with --overwrite."""
    from polyak.checkpoints.merging.prepare import refuse_replacing
    from polyak.checkpoints.reading.opening import open_checkpoint

    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path, key=key)) for path in inputs]
        refuse_replacing(outputs, opened)


def _scan(
    scan: Callable[..., Scan],
    inputs: tuple[str, ...],
    default: tuple[str, ...],
    scorer: Scorer,
    placed: Placed,
    options: Mapping[str, Any],
) -> None:
    from rich.console import Console

    from polyak.report.scans import check_scan_targets, save_scan

    check_scan_targets(placed.output, overwrite=placed.overwrite)
    if placed.trajectory is None:
        _refuse_inputs(placed.output, inputs, placed.key)
    evaluate = scorer.evaluation()
    found = scan(_points(inputs, default, placed), evaluate, **options, **placed.options(scorer))
    console = Console(highlight=False)
    console.print(str(found), soft_wrap=True, markup=False)
    name = str(getattr(evaluate, "__name__", "score"))
    for path in placed.output:
        save_scan(found, path, ylabel=name, overwrite=placed.overwrite)
        console.print(f"{path}", soft_wrap=True, markup=False)


def _points(inputs: tuple[str, ...], default: tuple[str, ...], placed: Placed) -> Points:
    from polyak.study.principal import named_points
    from polyak.study.trajectory import Trajectory

    if placed.trajectory is not None:
        record = Trajectory(placed.trajectory)
        names = inputs or default
        return named_points(record, names) if names else record
    if not inputs:
        raise ArgumentError(
            "There is no input; name checkpoints, or the record of a run by --trajectory."
        )
    return list(inputs)
