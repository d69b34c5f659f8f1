"""`polyak search`, `polyak decay`, `polyak stop`: three questions to the record of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from polyak.cli.converters import Whole
from polyak.errors import ArgumentError, PolyakError

if TYPE_CHECKING:
    from polyak.study.found import Found
    from polyak.study.trajectory import Trajectory

_Flag = Parameter(negative="")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Asked:
    """How averages are judged.

    Attributes:
        validation: package.module:function that returns pairs of inputs and labels, in the same order every
            time: the score is the temperature-scaled NLL of the classifier that --model builds.
        evaluate: package.module:function that gets the model which --model builds, holding the average,
            or without --model its state dict; it returns a number or a 1-D tensor, one score per example.
        command: A program, like 'python eval.py {file}'; the last number that it prints is the score.
        model: package.module:function that builds the model; called without arguments.
        data: package.module:function that returns batches to train on: BatchNorm statistics are
            refreshed for each average.
        minimize: Lower scores are better.
        maximize: Higher scores are better.
        holdout: The share of the examples that does not choose, on which averages are compared.
        since: Search the record from this moment on.
        until: Search the record up to this moment.
        cache: The folder of known scores; by default .scores in the record.
        timeout: Seconds for one evaluation.
        report: Write a page of the answer.
        output: Write the best average: a .safetensors file or a torch archive.
        overwrite: Replace the page and the output if they exist.

    """

    validation: str | None = None
    evaluate: str | None = None
    command: str | None = None
    model: str | None = None
    data: str | None = None
    minimize: Annotated[bool, _Flag] = False
    maximize: Annotated[bool, _Flag] = False
    holdout: float = 0.5
    since: float | None = None
    until: float | None = None
    cache: Path | None = None
    timeout: float | None = None
    report: Path | None = None
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None
    overwrite: Annotated[bool, _Flag] = False

    def evaluation(self) -> Callable[..., Any]:
        """The one that was named."""
        from polyak.objects import call_object, load_object
        from polyak.study.classify import ScaledNLL
        from polyak.study.command import Command

        given = [x for x in (self.validation, self.evaluate, self.command) if x is not None]
        if len(given) != 1:
            raise ArgumentError(
                f"{len(given)} evaluations are named; expected one of --validation (a classifier's data), "
                "--evaluate (a function) and --command (a program)."
            )
        if self.evaluate is not None:
            return load_object(self.evaluate)
        if self.command is not None:
            return Command(self.command, self.timeout)
        if self.model is None:
            raise ArgumentError(
                "--validation needs the classifier: --model package.module:function."
            )
        return ScaledNLL(call_object(given[0]))

    def judging(self) -> dict[str, Any]:
        """The options of the library."""
        from polyak.objects import call_object

        return {
            "model": call_object(self.model) if self.model else None,
            "data": call_object(self.data) if self.data else None,
            "minimize": self.minimize,
            "maximize": self.maximize,
            "holdout": self.holdout,
            "since": self.since,
            "until": self.until,
            "cache": self.cache,
            "timeout": self.timeout,
        }


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Searched:
    """What is searched.

    Attributes:
        evaluations: Of windows; by default 16, or 5 with --quick.
        quick: Only windows that end at the end.
        family: windows, half-lives, power, annealed; may be repeated. By default windows.
        swa: The recipe's SWA, to compare with, like swa:start=3000; by default the last quarter.
        ema: The recipe's EMA, to compare with, like ema:half_life=500.
        last: A file with the last iterate, to compare with; by default the last interval.

    """

    evaluations: Whole = None
    quick: Annotated[bool, _Flag] = False
    family: Annotated[
        list[Literal["windows", "half-lives", "power", "annealed"]] | None,
        Parameter(negative="", consume_multiple=False),
    ] = None
    swa: str | None = None
    ema: str | None = None
    last: Path | None = None


_ASKED, _SEARCHED = Asked(), Searched()


def search(*trajectory: str, asked: Asked = _ASKED, searched: Searched = _SEARCHED) -> None:
    """Find the best average of a recorded run.

    Args:
        trajectory: The record of a run, as polyak.Recorder writes it; or checkpoints.
        asked: How averages are judged.
        searched: What is searched.

    """
    options = {
        "evaluations": searched.evaluations,
        "quick": searched.quick,
        "families": tuple(searched.family or ("windows",)),
        "swa": searched.swa,
        "ema": searched.ema,
        "last": searched.last,
    }
    _answer("search", trajectory, asked, options)


def decay(
    *trajectory: str,
    points: int = 8,
    length: float | None = None,
    shape: Literal["sqrt", "linear", "cosine"] = "sqrt",
    asked: Asked = _ASKED,
) -> None:
    """What if I had decayed the learning rate from here: averages shaped like a decay.

    Args:
        trajectory: The record of a run, as polyak.Recorder writes it; or checkpoints.
        points: How many ends.
        length: Of the decay, in the record's unit; by default an eighth of the record.
        shape: Of the decay.
        asked: How averages are judged.

    """
    _answer("decay", trajectory, asked, {"points": points, "length": length, "shape": shape})


def stop(*trajectory: str, points: int = 8, evaluations: int = 4, asked: Asked = _ASKED) -> None:
    """When could I have stopped: the best average that ends at each point of the run.

    Args:
        trajectory: The record of a run, as polyak.Recorder writes it; or checkpoints.
        points: How many ends.
        evaluations: For each of them.
        asked: How averages are judged.

    """
    _answer("stop", trajectory, asked, {"points": points, "evaluations": evaluations})


def _answer(question: str, inputs: tuple[str, ...], asked: Asked, options: dict[str, Any]) -> None:
    _check_targets(asked)
    evaluate = asked.evaluation()
    record = _opened(inputs)
    found: Found = getattr(record, question)(evaluate, **asked.judging(), **options)
    _say(str(found))
    if asked.output is not None:
        _write(record, found, asked, asked.output)
        _say(f"{asked.output}: {found.best.profile} at {found.best.until:,g} {found.unit}")
    if asked.report is not None:
        from polyak.report.search import write_search

        _say(f"Page: {write_search([found], asked.report, overwrite=asked.overwrite)}")


def _check_targets(asked: Asked) -> None:
    """Refuse what could not be written, before hours of evaluations."""
    from polyak.checkpoints.writing.save import check_target
    from polyak.files import refuse_existing

    if asked.output is not None:
        check_target(asked.output, overwrite=asked.overwrite)
    if asked.report is not None:
        refuse_existing(asked.report, overwrite=asked.overwrite)
    given = [path.absolute() for path in (asked.output, asked.report) if path is not None]
    if len(set(given)) < len(given):
        raise ArgumentError(f"--output and --report are the same file, {asked.output}. Name two.")
    for path in given:
        if not path.parent.is_dir():
            raise ArgumentError(f"There is no folder {path.parent} for {path.name}. Make it first.")


def _write(record: Trajectory, found: Found, asked: Asked, path: Path) -> None:
    """The best average, with the statistics that it was evaluated with."""
    import warnings

    from polyak.batchnorm.layers import norm_layers
    from polyak.batchnorm.update_file import update_bn_file
    from polyak.errors import StaleStatistics
    from polyak.objects import call_object

    model = call_object(asked.model) if asked.model and asked.data else None
    refresh = model is not None and bool(norm_layers(model))
    with warnings.catch_warnings():
        if refresh:
            warnings.simplefilter("ignore", StaleStatistics)
        best = found.best
        record.save(path, best.profile, best.until, overwrite=asked.overwrite)
    if model is not None and refresh:
        update_bn_file(path, model, call_object(str(asked.data)))


def _opened(inputs: tuple[str, ...]) -> Trajectory:
    from polyak.checkpoints.intervals import is_record, records_in
    from polyak.study.trajectory import Trajectory

    if not inputs:
        raise ArgumentError("There is no input; name the record of a run, or its checkpoints.")
    if len(inputs) == 1 and (is_record(inputs[0]) or not _may_be_checkpoints(inputs[0])):
        return Trajectory(inputs[0])
    try:
        return Trajectory.from_checkpoints(inputs)
    except PolyakError:
        if len(inputs) == 1 and Path(inputs[0]).is_dir() and records_in(Path(inputs[0])):
            return Trajectory(inputs[0])  # the folder of a run, without weights of its own
        raise


def _may_be_checkpoints(text: str) -> bool:
    """Whether it is a pattern, or a file or a folder with something in it."""
    path = Path(text)
    return (
        any(c in text for c in "*?[") or path.is_file() or (path.is_dir() and any(path.iterdir()))
    )


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False).print(text, soft_wrap=True, markup=False)
