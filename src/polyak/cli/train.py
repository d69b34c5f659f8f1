"""`polyak train`: the reference run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Parameter

from polyak.cli.converters import MaybeWhole, seed_range, whole_number
from polyak.errors import ArgumentError
from polyak.reference_run.recipe import Recipe, load_recipe, quick_version

if TYPE_CHECKING:
    Fields = Recipe
else:
    # Every field of a recipe as a flag that may be left out, with the field's own help.
    _TYPES = get_type_hints(Recipe) | {"seeds": str}

    def _converter(name: str) -> Any:
        if name == "seeds":
            return seed_range
        return whole_number if _TYPES[name] is int else None

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
                        converter=_converter(field.name),
                    ),
                ],
                dataclasses.field(default=None),
            )
            for field in dataclasses.fields(Recipe)
        ],
        kw_only=True,
    )
    Fields.__module__ = __name__  # cyclopts treats classes of the module `types` as builtins


def train(  # noqa: PLR0913 - keyword-only arguments do not count
    recipe: str | None = None,
    /,
    *,
    quick: Annotated[bool, Parameter(negative="")] = False,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    jobs: MaybeWhole = None,
    threads: MaybeWhole = None,
    fields: Annotated[Fields | None, Parameter(name="*", group="Recipe fields")] = None,
) -> None:
    """Train on real images or a text, annealed and with weight averaging at the same budget, and compare.

    The run is written to its own folder: recipe, metrics, weights, the averaged model
    (swa.safetensors) and a report. You can stop it at any time and continue with --resume.
    With torchrun --nproc-per-node N -m polyak train, N processes share each batch.

    Args:
        recipe: default, words, taught, batchnorm, annealing-wins, note, fashion, wrn, paper-vgg16,
            paper-preresnet, paper-wrn, or the path of a TOML file.
        quick: The same run in miniature: 8 epochs, 2 seeds, cycles and half-lives in proportion.
        output: Folder of the run; runs/NAME by default, or the next free of runs/NAME-2, ...
        resume: Continue the run that the same command began; with --output alone, the run in it.
        jobs: Train as many arms and seeds side by side, to the same bits; by default what the
            processors allow.
        threads: Threads of each; by default one or all, whichever a short probe finds faster.
        fields: Any field of the recipe.

    """
    overrides = {name: value for name, value in _given(fields).items() if value is not None}
    if seeds := overrides.pop("seeds", None):
        if seeds.keys() & overrides.keys():
            raise ArgumentError(
                "--seeds 3:8 says with which seed the run begins, and so does --first-seed. Pass one."
            )
        overrides |= seeds
    chosen = _chosen_recipe(recipe, overrides, quick=quick, output=output if resume else None)
    from polyak.cli.train_display import carry_out

    carry_out(
        chosen,
        lambda: _chosen_folder(output, chosen.name, resume=resume),
        resume=resume,
        threads=threads,
        jobs=jobs,
    )


def _chosen_recipe(
    name: str | None, overrides: dict[str, Any], *, quick: bool, output: Path | None
) -> Recipe:
    """The recipe that is named; without a name, that of the run to be resumed in `output`."""
    saved = output / "recipe.toml" if output else None
    if name is None and not quick and saved is not None and saved.is_file():
        return load_recipe(str(saved), overrides)
    chosen = load_recipe(name or "default")
    if quick:
        chosen = quick_version(chosen)
    return load_recipe(name or "default", {**dataclasses.asdict(chosen), **overrides})


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
