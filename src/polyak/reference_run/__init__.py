"""The reference run: recipes, data, models, the training loop, and the surface around its results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.objects import lazy_names

_HOME_OF = {
    "Recipe": "polyak.reference_run.recipe",
    "Run": "polyak.reference_run.run",
    "arm_schedule": "polyak.reference_run.arm",
    "load_recipe": "polyak.reference_run.recipe",
    "measure_landscape": "polyak.reference_run.flatness",
    "shipped_recipes": "polyak.reference_run.recipe",
    "train": "polyak.reference_run.loop",
}

if TYPE_CHECKING:
    from polyak.reference_run.arm import arm_schedule as arm_schedule
    from polyak.reference_run.flatness import measure_landscape as measure_landscape
    from polyak.reference_run.loop import train as train
    from polyak.reference_run.recipe import Recipe as Recipe
    from polyak.reference_run.recipe import load_recipe as load_recipe
    from polyak.reference_run.recipe import shipped_recipes as shipped_recipes
    from polyak.reference_run.run import Run as Run

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME_OF)
