"""Which average is best: the raw weights and every average, evaluated one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from polyak.averaging.average import Average
from polyak.batchnorm.batches import Forward
from polyak.errors import ArgumentError
from polyak.maths.text import profile_text
from polyak.tensors.modes import restored_modes

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The scores of the raw weights and of every average; `print(result)` shows them as a table.

    `scores` holds name -> metric -> value, first those of the raw weights; an average that is still
    empty has none. `values` are plain numbers to log: `{"raw/loss": 0.7, "ema/loss": 0.6}`, or
    `{"raw": 0.7, "ema": 0.6}` where the function returns one number.
    """

    scores: dict[str, dict[str, float]]

    @property
    def values(self) -> dict[str, float]:
        """All scores by name, plain floats."""
        return {
            f"{name}/{metric}" if metric else name: value
            for name, scores in self.scores.items()
            for metric, value in scores.items()
        }

    def __getitem__(self, name: str) -> dict[str, float]:
        return self.scores[name]

    def __str__(self) -> str:
        metrics = list(dict.fromkeys(m for scores in self.scores.values() for m in scores))
        rows = [["", *(metric or "score" for metric in metrics)]]
        for name, scores in self.scores.items():
            shown = [f"{scores[m]:.6g}" if m in scores else "-" for m in metrics]
            rows.append([name, *(shown if scores else ["empty"])])
        width = len(rows[0])
        rows = [row + [""] * (width - len(row)) for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def evaluate_averages(
    averages: Average | Mapping[str, Average] | Sequence[Average],
    evaluate: Callable[..., Any],
    *,
    update_bn: Iterable[Any] | None = None,
    batches: int | None = None,
    forward: Forward | None = None,
    raw: str = "raw",
) -> Evaluation:
    """Evaluate the raw weights, and then every average in the place of them.

    Each evaluation begins with the modes and the random state of torch that the call began with, so
    that all see the same noise; afterwards both are as they were. Nothing is kept of the evaluation:
    the model has its own weights again, also after an error. An empty average is not evaluated.

    Args:
        averages: an `Average`, `Averages`, or a dict or list of averages of one model. Averages
            in a list are named by their profiles.
        evaluate: called with the model, or without if it takes no argument; it returns a number or
            a dict of numbers. Put the model into evaluation mode in it.
        update_bn: training batches, such as a DataLoader, on which each average's BatchNorm
            statistics are refreshed first; they stay with the average, as by `average.update_bn`.
        batches: how many of them; all by default.
        forward: how to run the model on one of them, as for `polyak.update_bn`.
        raw: the name of the raw weights in the result.

    Raises ArgumentError for averages of different models, or none; for anything but numbers from
    `evaluate`; for an iterator in `update_bn`, which only the first average could read.

    >>> import torch, polyak
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> averages = polyak.Averages(model, {"swa": polyak.SWA(), "late": "swa:start=10"})
    >>> for value in (1.0, 3.0):
    ...     _ = torch.nn.init.constant_(model.weight, value)
    ...     averages.update()
    >>> result = polyak.evaluate_averages(averages, lambda model: model.weight.item())
    >>> print(result)
          score
    raw   3
    swa   2
    late  empty
    >>> result.values
    {'raw': 3.0, 'swa': 2.0}

    """
    members = _named(averages, raw)
    model = next(iter(members.values())).model
    call = _caller(evaluate, model)
    if isinstance(update_bn, Iterator):
        raise ArgumentError(
            "update_bn is an iterator, which can be read only once; pass a list or a DataLoader."
        )
    start = _random_state()
    scores: dict[str, dict[str, float]] = {}
    try:
        for name, average in {raw: None, **members}.items():
            if average is not None and average.empty:
                scores[name] = {}
                continue
            if average is not None and update_bn is not None:
                average.update_bn(update_bn, forward=forward, limit=batches)
            _set_random_state(start)
            with restored_modes(model), average.applied() if average else nullcontext():
                scores[name] = _numbers(call(), name)
    finally:
        _set_random_state(start)
    return Evaluation(scores)


def _named(averages: Any, raw: str) -> dict[str, Average]:
    if isinstance(averages, Average):
        averages = [averages]
    if isinstance(averages, (list, tuple)):
        texts = [
            profile_text(a.profile) if isinstance(a, Average) else type(a).__name__
            for a in averages
        ]
        keys = [t if texts.count(t) == 1 else f"{t} ({i})" for i, t in enumerate(texts, 1)]
        averages = dict(zip(keys, averages, strict=True))
    found = dict(averages) if isinstance(averages, Mapping) else {}
    if not found or not all(isinstance(average, Average) for average in found.values()):
        raise ArgumentError(
            "evaluate_averages() takes an Average, Averages, or a dict or list of averages; found "
            f"{averages!r}."
        )
    if len({id(average.model) for average in found.values()}) > 1:
        raise ArgumentError("These are averages of different models; evaluate one model at a time.")
    if raw in found:
        raise ArgumentError(
            f"An average is named {raw!r}, like the raw weights; pass raw='weights'."
        )
    return found


def _caller(evaluate: Any, model: Module) -> Callable[[], Any]:
    if not callable(evaluate) or isinstance(evaluate, Module):
        raise ArgumentError(
            f"evaluate is a {type(evaluate).__name__}; expected a function of the model that returns a "
            "number or a dict of numbers."
        )
    try:
        inspect.signature(evaluate).bind()
    except (TypeError, ValueError):  # it takes an argument, or is a builtin without a signature
        return partial(evaluate, model)
    without_model: Callable[[], Any] = evaluate
    return without_model


def _numbers(result: Any, name: str) -> dict[str, float]:
    scores = result if isinstance(result, Mapping) else {"": result}
    try:
        return {str(metric): _number(value) for metric, value in scores.items()}
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(
            f"evaluate returned {' '.join(repr(result).split())[:80]} for {name}; expected a number or a "
            "dict of numbers."
        ) from None


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def _random_state() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if _has_cuda() else ())]


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if _has_cuda():
        torch.cuda.set_rng_state_all(state[1:])


def _has_cuda() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
