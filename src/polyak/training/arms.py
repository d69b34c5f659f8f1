"""The arms of a run as schedules: the rate of every step, and when weights are averaged."""

from __future__ import annotations

from polyak.maths.schedules import Constant, Cosine, CyclicLinear, Linear, Schedule, chain
from polyak.training.recipe import Recipe


def steps_per_epoch(recipe: Recipe, n_images: int) -> int:
    """Batches in a pass over the images, the last one smaller where they do not come out even."""
    return -(-n_images // recipe.batch_size)


def arm_schedule(recipe: Recipe, arm: str, steps: int) -> Schedule:
    """The schedule of an arm over the whole budget, in steps, `steps` being one epoch's.

    sgd: constant, then down to `final_ratio` of the rate, then held. The others follow it up to
    the branch; then swa keeps a constant rate and averages once an epoch (or a step), and cyclic
    falls from high to low again and again and averages at the end of each cycle.

    >>> from polyak.training.recipe import load_recipe
    >>> note = arm_schedule(load_recipe("note"), "cyclic", steps=1)
    >>> note.averaging_points(), round(note(113), 12)
    ((100, 110, 120, 130, 140), 0.034)
    """
    sgd = _annealed(recipe, steps)
    if arm == "sgd":
        return sgd
    branch = recipe.branch_epoch * steps
    return chain((branch, sgd), (recipe.epochs * steps - branch, _averaging(recipe, arm, steps)))


def _annealed(recipe: Recipe, steps: int) -> Schedule:
    budget = recipe.epochs * steps
    low = recipe.rate * recipe.final_ratio
    start, end = round(recipe.constant_until * budget), round(recipe.annealed_at * budget)
    curve = Linear if recipe.annealing == "linear" else Cosine
    pieces = [
        (start, Constant(recipe.rate)),
        (end - start, curve(recipe.rate, low)),
        (budget - end, Constant(low)),
    ]
    return chain(*[(length, schedule) for length, schedule in pieces if length])


def _averaging(recipe: Recipe, arm: str, steps: int) -> Schedule:
    if arm == "swa":
        # A cycle that falls from a rate to the same rate is a constant that knows when to average.
        every = steps if recipe.swa_average == "epoch" else 1
        return CyclicLinear(high=recipe.swa_rate, low=recipe.swa_rate, cycle=every)
    cycle = recipe.cycle_epochs * steps
    return CyclicLinear(high=recipe.cycle_high, low=recipe.cycle_low, cycle=cycle)
