"""A soup before anything is read: what is checked, and what the plan says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak.checkpoints.merging.deltas import ModelStock
from polyak.checkpoints.merging.execute import check_outputs
from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.prepare import (
    Input,
    Merge,
    checked_inputs,
    prepared,
    warn_of_lost_state,
)
from polyak.checkpoints.merging.spread import Spread, spread_of, warn_of_no_basin
from polyak.checkpoints.reading.stored import TORCH_DTYPES, accumulator, itemsize
from polyak.errors import require
from polyak.study.evaluations import data_identity
from polyak.study.mixing import Ingredient, Mix, mean_of, told_by
from polyak.study.soup_found import METHODS, SoupPlan

TRIED = 5
"""Curvatures for which the learned soup is evaluated."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A soup that was checked, before anything is read."""

    target: Path
    merge: Merge
    method: str
    ingredients: tuple[Ingredient, ...]
    spread: Spread | None
    plan: SoupPlan


def as_planned(planned: Planned) -> Mix:
    """The mix of a method that does not choose."""
    return mean_of(planned.ingredients, "model-stock" if planned.method == "model-stock" else "sum")


def told_beside(planned: Planned, options: MergeOptions, data: Any) -> str:
    """What makes a mix of the same ingredients another one: filters, the base, and the data that refresh it."""
    base = planned.merge.base
    parts = [options.include, options.exclude, base and told_by(base)]
    return "\n".join(map(str, [*parts, data if data is None else data_identity(data)]))


@contextmanager
def planned(
    inputs: Iterable[Input], output: Path, options: MergeOptions, method: str, *, scored: bool
) -> Iterator[Planned]:
    """Open the inputs, check everything that can be checked, and warn of what there is to warn of."""
    require(method in METHODS, f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    given = checked_inputs(inputs)
    require(
        len(given) > 1,
        f"A soup is of two ingredients at least; there {'is one' if given else 'are none'}.",
    )
    require(
        scored or method not in ("greedy", "learned"),
        f"The {method} soup is chosen by scores. Pass evaluate=, or take another method.",
    )
    require(
        options.base is None or method == "model-stock",
        f"base is {options.base}; expected it with model-stock only, since it cancels out of the {method} soup.",
    )
    way = ModelStock() if method == "model-stock" else "swa"
    with prepared(given, {output: way}, options) as merge:
        check_outputs(merge)
        warn_of_lost_state(merge)
        spread = spread_of(merge)
        warn_of_no_basin(spread)
        ingredients = tuple(Ingredient(one, told_by(one)) for one in merge.inputs)
        plan = _plan_of(merge, method, scored=scored)
        yield Planned(output, merge, method, ingredients, spread, plan)


def _plan_of(merge: Merge, method: str, *, scored: bool) -> SoupPlan:
    count = len(merge.inputs)
    once = sum(t.nbytes for one in merge.inputs for t in one.tensors.values())
    wide = sum(
        t.nbytes // itemsize(t.dtype) * accumulator(t.dtype).itemsize
        if t.numbers and t.dtype in TORCH_DTYPES
        else t.nbytes
        for t in merge.alignment.tensors
    )
    again = {"greedy": once, "learned": (2 + TRIED) * once}.get(method, merge.bytes_read)
    more = {"greedy": count - 1, "learned": 1 + TRIED}.get(method, 1)
    beside = 2 if method in ("greedy", "learned") else int(scored)
    return SoupPlan(
        method,
        tuple(one.path for one in merge.inputs),
        count + more if scored else 0,
        scored * once + again,
        merge.bytes_written,
        beside * wide,
    )
