"""`polyak search`, `polyak decay`, `polyak stop`: three questions to the record of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from polyak.cli.converters import Flag, MaybeWhole, NewFile, Whole
from polyak.cli.scorer import Scorer
from polyak.errors import ArgumentError

if TYPE_CHECKING:
    from polyak.study.found import Found
    from polyak.study.trajectory import Trajectory


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Asked:
    """What of the record is asked about, and what is written.

    Attributes:
        since: Search the record from this moment on.
        until: Search the record up to this moment.
        report: Write a page of the answer.
        output: Write the best average: a .safetensors file or a torch archive.
        overwrite: Replace the page and the output if they exist.

    """

    since: float | None = None
    until: float | None = None
    report: NewFile | None = None
    output: Annotated[NewFile | None, Parameter(name=["--output", "-o"])] = None
    overwrite: Annotated[bool, Flag] = False


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
        rule: Instead of searching: swad, the window that SWAD would have averaged, or two-tailed, what two-tailed
            averaging would have ended with. The other options of a search do not count then.

    """

    evaluations: MaybeWhole = None
    quick: Annotated[bool, Flag] = False
    family: Annotated[
        list[Literal["windows", "half-lives", "power", "annealed"]] | None,
        Parameter(negative="", consume_multiple=False),
    ] = None
    swa: str | None = None
    ema: str | None = None
    last: Path | None = None
    rule: Literal["swad", "two-tailed"] | None = None


_SCORER, _ASKED, _SEARCHED = Scorer(), Asked(), Searched()


def search(
    *trajectory: str,
    scorer: Scorer = _SCORER,
    asked: Asked = _ASKED,
    searched: Searched = _SEARCHED,
) -> None:
    """Find the best average of a recorded run.

    Args:
        trajectory: The record of a run, as polyak.Recorder writes it; or checkpoints.
        scorer: How averages are judged.
        asked: What of the record is asked about, and what is written.
        searched: What is searched.

    """
    if searched.rule is not None:
        _answer(searched.rule.replace("-", "_"), trajectory, scorer, asked, {})
        return
    options = {
        "evaluations": searched.evaluations,
        "quick": searched.quick,
        "families": tuple(searched.family or ("windows",)),
        "swa": searched.swa,
        "ema": searched.ema,
        "last": searched.last,
    }
    _answer("search", trajectory, scorer, asked, options)


def decay(
    *trajectory: str,
    points: Whole = 8,
    length: float | None = None,
    shape: Literal["sqrt", "linear", "cosine"] = "sqrt",
    scorer: Scorer = _SCORER,
    asked: Asked = _ASKED,
) -> None:
    """What if I had decayed the learning rate from here: averages shaped like a decay.

    Args:
        trajectory: The record of a run, as polyak.Recorder writes it; or checkpoints.
        points: How many ends.
        length: Of the decay, in the record's unit; by default an eighth of the record.
        shape: Of the decay.
        scorer: How averages are judged.
        asked: What of the record is asked about, and what is written.

    """
    _answer(
        "decay", trajectory, scorer, asked, {"points": points, "length": length, "shape": shape}
    )


def stop(
    *trajectory: str,
    points: Whole = 8,
    evaluations: Whole = 4,
    scorer: Scorer = _SCORER,
    asked: Asked = _ASKED,
) -> None:
    """When could I have stopped: the best average that ends at each point of the run.

    Args:
        trajectory: The record of a run, as polyak.Recorder writes it; or checkpoints.
        points: How many ends.
        evaluations: For each of them.
        scorer: How averages are judged.
        asked: What of the record is asked about, and what is written.

    """
    _answer("stop", trajectory, scorer, asked, {"points": points, "evaluations": evaluations})


def _answer(
    question: str, inputs: tuple[str, ...], scorer: Scorer, asked: Asked, options: dict[str, Any]
) -> None:
    _check_targets(asked)
    evaluate = scorer.evaluation()
    record = _opened(inputs)
    found: Found = getattr(record, question)(
        evaluate, **scorer.judging(), since=asked.since, until=asked.until, **options
    )
    _say(str(found))
    if asked.output is not None:
        _write(record, found, scorer, asked, asked.output)
        _say(f"{asked.output}: {found.best.profile} at {found.best.until:,g} {found.unit}")
    if asked.report is not None:
        from polyak.report.search import write_search

        _say(f"Page: {write_search([found], asked.report, overwrite=asked.overwrite)}")


def _check_targets(asked: Asked) -> None:
    """Refuse what could not be written, before hours of evaluations."""
    from polyak.checkpoints.writing.save import check_target
    from polyak.files import file_target

    if asked.output is not None:
        check_target(asked.output, overwrite=asked.overwrite)
    if asked.report is not None:
        file_target(asked.report, overwrite=asked.overwrite)
    given = [path.absolute() for path in (asked.output, asked.report) if path is not None]
    if len(set(given)) < len(given):
        raise ArgumentError(f"--output and --report are the same file, {asked.output}. Name two.")


def _write(record: Trajectory, found: Found, scorer: Scorer, asked: Asked, path: Path) -> None:
    """The best average, with the statistics that it was evaluated with."""
    import warnings

    from polyak.batchnorm.layers import norm_layers
    from polyak.batchnorm.update_file import update_bn_file
    from polyak.checkpoints.merging.outputs import begun_anew
    from polyak.errors import StaleStatistics
    from polyak.objects import call_object

    model = call_object(scorer.model) if scorer.model and scorer.data else None
    refresh = model is not None and bool(norm_layers(model))
    with warnings.catch_warnings(), begun_anew("search again: known scores are kept"):
        if refresh:
            warnings.simplefilter("ignore", StaleStatistics)
        best = found.best
        record.save(path, best.profile, best.until, overwrite=asked.overwrite)
    if model is not None and refresh:
        update_bn_file(path, model, call_object(str(scorer.data)))


def _opened(inputs: tuple[str, ...]) -> Trajectory:
    from polyak.checkpoints.record_or_checkpoints import means_record
    from polyak.study.trajectory import Trajectory

    if not inputs:
        raise ArgumentError("There is no input; name the record of a run, or its checkpoints.")
    if means_record(inputs) or (len(inputs) == 1 and not _may_be_checkpoints(inputs[0])):
        return Trajectory(inputs[0])
    return Trajectory.from_checkpoints(inputs)


def _may_be_checkpoints(text: str) -> bool:
    """Whether it is a pattern, or a file or a folder with something in it."""
    path = Path(text)
    return (
        any(c in text for c in "*?[") or path.is_file() or (path.is_dir() and any(path.iterdir()))
    )


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False).print(text, soft_wrap=True, markup=False)
