"""The three questions to a run's record, as sections of its page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from polyak.batchnorm.layers import norm_layers
from polyak.errors import PolyakError
from polyak.maths.profiles import EMA, SWA, After
from polyak.reference_run.arm import steps_per_epoch
from polyak.reference_run.data import Split
from polyak.reference_run.evaluation import BATCH, CURVE_EXAMPLES, WindowLoss
from polyak.reference_run.recipe import CONSTANT_ARMS, Recipe
from polyak.reference_run.run import Run, weights_path
from polyak.report.search import search_sections
from polyak.report.sections import Section
from polyak.study.classify import ScaledNLL
from polyak.study.found import Found

_ENDS = 6  # of "decay" and "stop": each needs averages that are evaluated
_WINDOWS = 3  # of "stop", for each end


def question_sections(run: Run) -> list[Section]:
    """Asked of the first seed's averaging arm; nothing if the run has no record.

    Averages are chosen on one half of the validation images, or windows, and compared on the other one. Scores are kept
    in the record, so that a page is only expensive once.
    """
    arm = run.averaging_arm()
    if arm is None or not run.has_record(run.recipe.first_seed, arm):
        return []
    try:
        found = _ask(run, arm)
    except PolyakError as error:
        return [Section("What the record answers", f"Nothing: {error}")]
    which, decay, stop = search_sections(found)
    return [
        replace(which, sentence=f"{_introduced(run, arm)} {which.sentence}"),
        replace(decay, sentence=f"{decay.sentence}{_where_the_rate_moved(run)}"),
        stop,
    ]


def _ask(run: Run, arm: str) -> list[Found]:
    data, model, recipe = run.data, run.model(), run.recipe
    steps = steps_per_epoch(recipe, len(data.train))
    is_text = recipe.task == "words"
    evaluate: Any = WindowLoss(data.validation) if is_text else ScaledNLL(_pairs(data.validation))
    few = Split(data.train.inputs[:CURVE_EXAMPLES], data.train.labels[:CURVE_EXAMPLES])
    record = run.trajectory(recipe.first_seed, arm)
    common: dict[str, Any] = {
        "model": model,
        "data": list(few.batches(BATCH)) if norm_layers(model) else None,
    }
    which = record.search(
        evaluate,
        swa=After(_begins(recipe, arm) * steps, SWA()),
        ema=EMA.from_half_life(recipe.ema_half_life * steps),
        last=weights_path(run.folder, recipe.first_seed, arm, "iterate"),
        **common,
    )
    decay = record.decay(evaluate, points=_ENDS, **common)
    return [which, decay, record.stop(evaluate, points=_ENDS, evaluations=_WINDOWS, **common)]


def _begins(recipe: Recipe, arm: str) -> int:
    """The number of epochs after which an arm's SWA begins."""
    return recipe.swa_epoch if arm in CONSTANT_ARMS else recipe.branch_epoch


def _pairs(split: Split) -> list[tuple[Tensor, Tensor]]:
    return list(zip(split.inputs.split(BATCH), split.labels.split(BATCH), strict=True))  # type: ignore[no-untyped-call]


def _introduced(run: Run, arm: str) -> str:
    scores = (
        "losses in nats per byte of validation windows"
        if run.recipe.task == "words"
        else "temperature-scaled NLL on validation images"
    )
    return (
        f"The record of the first seed's {arm} arm holds the mean of each of "
        f"{len(run.trajectory(run.recipe.first_seed, arm).intervals)} intervals, from which any average is made. Scores are "
        f"{scores} (lower is better). The recipe's SWA is here the mean of all "
        f"steps after epoch {_begins(run.recipe, arm)}, the EMA that with its half-life."
    )


def _where_the_rate_moved(run: Run) -> str:
    """Nothing, if the arm had a constant rate throughout."""
    recipe = run.recipe
    begin, end = recipe.constant_until * recipe.epochs, recipe.branch_epoch
    if begin >= end and recipe.rate == recipe.swa_rate:
        return ""
    return (
        f" A forecast supposes a constant rate up to where the average begins; in this run the rate changes from "
        f"epoch {min(begin, end):g} on."
    )
