"""`polyak train`: the reference run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Parameter

from polyak.cli.converters import whole_number
from polyak.errors import ArgumentError
from polyak.reference_run.recipe import Recipe, load_recipe, quick_version

if TYPE_CHECKING:
    Fields = Recipe
else:
    # Every field of a recipe as a flag that may be left out, with the field's own help.
    _TYPES = get_type_hints(Recipe)
    Fields = dataclasses.make_dataclass(
        "Fields",
        [
            (
                field.name,
                Annotated[
                    _TYPES[field.name] | None,
                    Parameter(
                        help=field.metadata["help"],
                        consume_multiple=True,
                        negative_iterable=(),
                        converter=whole_number if _TYPES[field.name] is int else None,
                    ),
                ],
                dataclasses.field(default=None),
            )
            for field in dataclasses.fields(Recipe)
        ],
        kw_only=True,
    )
    Fields.__module__ = __name__  # cyclopts treats classes of the module `types` as builtins


def train(
    recipe: str = "default",
    /,
    *,
    quick: Annotated[bool, Parameter(negative="")] = False,
    output: Path | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    fields: Annotated[Fields | None, Parameter(name="*", group="Recipe fields")] = None,
) -> None:
    """Train on real images with SGD and with weight averaging at the same budget, and compare.

    The run is written to its own folder: recipe, metrics, weights, the averaged model
    (swa.safetensors) and a report. You can stop it at any time and continue with --resume.
    With torchrun --nproc-per-node N -m polyak train, N processes share each batch.

    Args:
        recipe: default, batchnorm, annealing-wins, note, fashion, or the path of a TOML file.
        quick: The same run in miniature: 8 epochs, 2 seeds, cycles and half-lives in proportion.
        output: Folder of the run; runs/NAME by default, or the next free of runs/NAME-2, ...
        resume: Continue the run that the same command began.
        fields: Any field of the recipe.

    """
    overrides = {name: value for name, value in _given(fields).items() if value is not None}
    chosen = load_recipe(recipe)
    if quick:
        chosen = quick_version(chosen)
    chosen = load_recipe(recipe, {**dataclasses.asdict(chosen), **overrides})
    from polyak.cli.train_display import carry_out

    carry_out(chosen, lambda: _chosen_folder(output, chosen.name, resume=resume), resume=resume)


def _given(fields: Any) -> dict[str, Any]:
    return {} if fields is None else vars(fields)


def _chosen_folder(output: Path | None, name: str, *, resume: bool) -> Path:
    folder = output or _default_folder(name, resume=resume)
    if resume and not folder.exists():
        raise ArgumentError(
            f"There is no run in {folder} to resume. Leave out --resume to start one there, or name "
            "the folder of a run with --output."
        )
    return folder


def _default_folder(name: str, *, resume: bool) -> Path:
    """The next free of runs/name, runs/name-2, ...; with `resume`, the last that exists."""
    number = 1
    while _numbered(name, number).exists():
        number += 1
    return _numbered(name, max(1, number - 1) if resume else number)


def _numbered(name: str, number: int) -> Path:
    return Path("runs") / (name if number == 1 else f"{name}-{number}")
