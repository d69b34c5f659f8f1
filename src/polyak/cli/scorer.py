"""The flags by which weights are judged: of `polyak search` and its kin, and of `polyak soup`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polyak.cli.converters import Flag
from polyak.errors import ArgumentError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How weights are judged.

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
        cache: The folder of known scores; by default .scores in the record, beside the output, or here.
        timeout: Seconds for one evaluation.

    """

    validation: str | None = None
    evaluate: str | None = None
    command: str | None = None
    model: str | None = None
    data: str | None = None
    minimize: Annotated[bool, Flag] = False
    maximize: Annotated[bool, Flag] = False
    holdout: float = 0.5
    cache: Path | None = None
    timeout: float | None = None

    @property
    def is_named(self) -> bool:
        """Whether an evaluation is named."""
        return any(x is not None for x in (self.validation, self.evaluate, self.command))

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
            "cache": self.cache,
            "timeout": self.timeout,
        }
