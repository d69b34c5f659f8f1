"""Recipes: all settings of a reference run in one flat, typed, frozen record.

A recipe is a TOML file (those that ship are in `recipes/`); every field is also a flag of
`polyak train`, and the resolved recipe is saved with the run. No torch here: `polyak train --help`
reads this module.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from polyak.errors import ArgumentError, FormatError, require

RECIPES = Path(__file__).parent / "recipes"
ARMS = {
    "images": ("sgd", "half", "swa", "cyclic"),
    "words": ("cosine", "half", "quarter", "constant"),
}
"""By task; the first is annealed over the whole length, and what the others are compared with."""
AVERAGING_ARMS = ("swa", "cyclic", "constant")
CONSTANT_ARMS = ("swa", "constant")  # of those, the ones at a constant rate
SHORT_ARMS = {"half": 2, "quarter": 4}
"""The annealed arms of a part of the length: a half, a quarter."""
AVERAGES = ("ema", "power", "swa", "wsm")
LANGUAGE_NETWORKS = ("transformer", "transformer-4x256")
NETWORKS = (
    "residual", "taught", "wrn-16-4", "wrn-28-10", "preresnet-20", "preresnet-110", "preresnet-164",
    "vgg16", "vgg16-bn",
)  # fmt: skip
QUICK_EPOCHS = 8


def _field(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One reference run. Times are fractions of the budget or epochs, as their help says.

    Raises ArgumentError for a value outside its domain.

    >>> recipe = Recipe(epochs=40)
    >>> recipe.branch_epoch, recipe.swa_epoch, recipe.last_epoch("half")
    (20, 30, 20)
    """

    name: str = _field("default", "What the run is called; names its folder in runs/.")
    task: str = _field("images", "What is learned: images (their classes), words (the next byte).")
    network: str = _field(
        "residual",
        f"The network: {', '.join(NETWORKS)}; for words {', '.join(LANGUAGE_NETWORKS)}.",
    )
    context: int = _field(64, "words: bytes in a window, which the network sees.")
    epochs: int = _field(30, "The budget of every arm, in passes over the training images.")
    epoch_size: int = _field(
        0, "Examples in an epoch, drawn at random from all; 0 for a pass over them."
    )
    batch_size: int = _field(64, "Images, or windows of a text, in a batch.")
    optimizer: str = _field("sgd", "sgd or adamw.")
    rate: float = _field(0.1, "Learning rate of the annealed arm before annealing.")
    warmup_epochs: int = _field(1, "Epochs in which the rate comes up linearly; 0 for none.")
    momentum: float = _field(0.9, "Momentum of SGD, first beta of AdamW, 0 <= momentum < 1.")
    beta2: float = _field(0.95, "Second beta of AdamW, 0 <= beta2 < 1.")
    nesterov: bool = _field(True, "Nesterov's momentum.")
    weight_decay: float = _field(1e-3, "Weight decay; AdamW's is decoupled, of matrices only.")
    constant_until: float = _field(0.5, "Annealed arms: fraction of the budget at the full rate.")
    annealed_at: float = _field(0.975, "Annealed arms: fraction at which the rate has come down.")
    final_ratio: float = _field(0.01, "Annealed arms: the last rate as a fraction of the first.")
    annealing: str = _field("linear", "Annealed arms: the way down, linear or cosine.")
    arms: tuple[str, ...] = _field(
        ("sgd", "half", "swa"),
        "Which arms run: sgd (always), half, swa, cyclic; for words cosine (always), half, quarter, constant.",
    )
    branch_at: float = _field(
        0.5,
        "Fraction of the budget at which the averaging arms leave the annealed one; 0 for own runs.",
    )
    swa_from: float = _field(0.75, "Fraction of the budget at which SWA begins at a constant rate.")
    swa_rate: float = _field(0.1, "swa and constant arm: their constant rate.")
    swa_average: str = _field(
        "epoch", "swa and constant arm: average after each epoch or each step."
    )
    cycle_high: float = _field(0.1, "cyclic arm: the rate a cycle falls from.")
    cycle_low: float = _field(
        0.01, "cyclic arm: the rate a cycle ends at, where weights are taken."
    )
    cycle_epochs: int = _field(2, "cyclic arm: the length of a cycle in epochs.")
    record_intervals: int = _field(
        40, "Intervals of every arm whose means are recorded, to average afterwards; 0 for none."
    )
    averages: tuple[str, ...] = _field(
        ("ema",),
        "Averages in every arm of the whole length: ema, power (an EMA that widens with the run), swa, wsm "
        "(from the record, weighted as a decay from swa_from on).",
    )
    ema_half_life: float = _field(2.0, "Half-life of the EMA that runs in every arm, in epochs.")
    power_std: float = _field(0.1, "Width of the power EMA: its standard deviation, of the run.")
    flips: bool = _field(True, "Flip training images left to right at random.")
    shift: int = _field(0, "Shift training images by up to this many pixels at random.")
    batchnorm: bool = _field(False, "The network `taught` with BatchNorm.")
    model: str = _field("", "package.module:function that builds a custom model.")
    data: str = _field(
        "", "package.module:function that returns custom data; for words the path of a text file."
    )
    data_folder: str = _field("", "Folder of a full set: four IDX files, or CIFAR's binary files.")
    own_data: bool = _field(
        False,
        "The recipe is for other images than those that ship: data_folder or data has to name them.",
    )
    seeds: int = _field(3, "Number of seeds; on the command line also the first and the end, 3:8.")
    first_seed: int = _field(0, "The first seed; the others follow it.")
    device: str = _field("auto", "cpu, cuda, or auto: cuda if there is one.")
    strategy: str = _field(
        "ddp", "Under torchrun: a whole model (ddp) or a shard (fsdp) in each process."
    )

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Recipe).items():
            object.__setattr__(self, name, _typed(name, kind, getattr(self, name)))
        _check_counts(self)
        _check_rates(self)
        _check_times(self)
        _check_choices(self)

    @property
    def baseline(self) -> str:
        """The arm that is annealed over the whole length, which the others leave."""
        return ARMS[self.task][0]

    @property
    def branch_epoch(self) -> int:
        """The number of epochs after which the averaging arms leave the annealed arm."""
        return round(self.branch_at * self.epochs)

    @property
    def swa_epoch(self) -> int:
        """The number of epochs after which SWA begins in an arm at a constant rate."""
        return max(self.branch_epoch, round(self.swa_from * self.epochs))

    @property
    def all_seeds(self) -> range:
        """The seeds of the run."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def first_epoch(self, arm: str) -> int:
        """The number of epochs that an arm takes over from the annealed arm."""
        if arm in SHORT_ARMS:
            return int(self.constant_until * self.last_epoch(arm))
        return 0 if arm == self.baseline else self.branch_epoch

    def last_epoch(self, arm: str) -> int:
        """The number of epochs after which an arm ends: all, and half of them for `half`."""
        return self.epochs // SHORT_ARMS.get(arm, 1)

    def differences(self, other: Recipe) -> list[str]:
        """One line for each field in which two recipes differ: `epochs: 40 here, 20 there`."""
        return [
            f"{f.name}: {getattr(self, f.name)!r} here, {getattr(other, f.name)!r} there"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]

    def to_toml(self) -> str:
        """The recipe as a TOML file, every field with its help as a comment."""
        lines = ["# The resolved recipe of a polyak reference run."]
        for f in fields(self):
            lines += [f"# {f.metadata['help']}", f"{f.name} = {_toml(getattr(self, f.name))}"]
        return "\n".join(lines) + "\n"


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with polyak.

    >>> "default" in shipped_recipes()
    True
    """
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by its shipped name or the path of a TOML file, with some fields replaced.

    Raises ArgumentError for an unknown name, field, or value, FormatError for a file that is not
    TOML.

    >>> load_recipe("default", {"epochs": 8}).epochs
    8
    """
    path = RECIPES / f"{name}.toml" if name in shipped_recipes() else Path(name)
    if not path.is_file():
        raise ArgumentError(
            f"No recipe {name!r}. Expected one of {', '.join(shipped_recipes())}, "
            "or the path of a TOML file."
        )
    values = {"name": path.stem, **_read_toml(path), **(overrides or {})}
    return recipe_from(values, where=str(path))


def recipe_from(values: Mapping[str, Any], *, where: str) -> Recipe:
    """A recipe from plain values, whose names are checked."""
    known = [f.name for f in fields(Recipe)]
    if unknown := sorted(set(values) - set(known)):
        raise ArgumentError(
            f"{where}: unknown {', '.join(unknown)}. The fields of a recipe are {', '.join(known)}."
        )
    return Recipe(**values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not a TOML file: {error}.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from None


def _typed(name: str, kind: Any, value: Any) -> Any:
    if kind == tuple[str, ...] and isinstance(value, list | tuple):
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind != tuple[str, ...] and type(value) is kind:
        return value
    expected = kind.__name__ if isinstance(kind, type) else "a list of names"
    raise ArgumentError(f"Recipe field {name} is {value!r}; expected {expected}.")


def _toml(value: Any) -> str:
    # JSON's spelling of strings, numbers, booleans and lists is TOML's too.
    return json.dumps(list(value) if isinstance(value, tuple) else value)


# Every epoch and every seed has its place in the plan; torch takes seeds below 2^63.
_MOST = {"epochs": 10**6, "seeds": 10**4, "first_seed": 2**48, "epoch_size": 10**12}

# Rates are numbers of float32, and an epoch has one step or more.
_LIMITS = [
    *((name, 1e-30, 1e30) for name in ("rate", "swa_rate", "cycle_high", "cycle_low")),
    ("ema_half_life", 1e-3, 1e6),
    ("weight_decay", 0.0, 1e6),
]


def _check_counts(recipe: Recipe) -> None:
    require(recipe.task in ARMS, f"task is {recipe.task!r}; expected {' or '.join(ARMS)}.")
    for name in ("epochs", "batch_size", "cycle_epochs", "seeds", "context"):
        value = getattr(recipe, name)
        require(value >= 1, f"Recipe field {name} is {value}; expected 1 or more.")
    for name, most in _MOST.items():
        value = getattr(recipe, name)
        require(value <= most, f"Recipe field {name} is {value}; expected {most} at most.")
    require(
        recipe.record_intervals >= 0,
        f"record_intervals is {recipe.record_intervals}; expected a number of intervals, or 0 to record "
        "nothing.",
    )
    for name in ("warmup_epochs", "first_seed", "epoch_size"):
        value = getattr(recipe, name)
        require(value >= 0, f"Recipe field {name} is {value}; expected 0 or more.")
    require(0 <= recipe.shift <= 8, f"shift is {recipe.shift}; expected 0 to 8 pixels.")


def _check_rates(recipe: Recipe) -> None:
    for name, least, most in _LIMITS:
        value = getattr(recipe, name)
        expected = f"a number from {least:g} to {most:g}"
        require(least <= value <= most, f"Recipe field {name} is {value}; expected {expected}.")
    require(
        recipe.cycle_low <= recipe.cycle_high,
        f"cycle_low is {recipe.cycle_low}, above cycle_high, {recipe.cycle_high}; "
        "a cycle falls from high to low.",
    )
    for name in ("momentum", "beta2"):
        value = getattr(recipe, name)
        require(0 <= value < 1, f"{name} is {value}; expected 0 <= {name} < 1.")
    require(
        1e-6 <= recipe.power_std < 0.28,
        f"power_std is {recipe.power_std}; expected a width from 1e-6 to below 0.28, that of the plain mean.",
    )
    require(
        0 <= recipe.final_ratio <= 1,
        f"final_ratio is {recipe.final_ratio}; expected 0 <= final_ratio <= 1.",
    )


def _check_times(recipe: Recipe) -> None:
    require(
        0 <= recipe.constant_until <= recipe.annealed_at <= 1,
        f"constant_until is {recipe.constant_until} and annealed_at {recipe.annealed_at}; "
        "expected 0 <= constant_until <= annealed_at <= 1, fractions of the budget.",
    )
    require(
        0 <= recipe.branch_at < 1,
        f"branch_at is {recipe.branch_at}; expected a fraction of the budget below 1, or 0 for averaging arms "
        "that are runs of their own.",
    )
    require(0 < recipe.swa_from < 1, f"swa_from is {recipe.swa_from}; expected a fraction of 1.")
    require(
        recipe.task != "words"
        or "constant" not in recipe.arms
        or recipe.branch_at <= recipe.constant_until,
        f"branch_at is {recipe.branch_at}, where the arm {recipe.baseline}, which is annealed from constant_until "
        f"{recipe.constant_until} on, no longer has its rate; the arm constant would not be at a constant rate. Leave "
        "branch_at at 0 for a run of its own, or raise constant_until.",
    )
    _check_warmup(recipe)
    _check_lengths(recipe)
    require(
        not ({*CONSTANT_ARMS} & {*recipe.arms} or {"swa", "wsm"} & {*recipe.averages})
        or recipe.swa_epoch < recipe.epochs,
        f"swa_from is {recipe.swa_from}: averaging would begin after the last of {recipe.epochs} epochs. "
        "Lower it, or raise epochs.",
    )
    left = recipe.epochs - recipe.branch_epoch
    require(
        "cyclic" not in recipe.arms or recipe.cycle_epochs <= left,
        f"cycle_epochs is {recipe.cycle_epochs}, and only {left} of {recipe.epochs} epochs are left "
        f"after branch_at {recipe.branch_at}: no cycle would end, so there would be no weights to "
        "average. Shorten the cycle, raise epochs, or leave cyclic out of arms.",
    )


def _check_lengths(recipe: Recipe) -> None:
    for arm, part in SHORT_ARMS.items():
        require(
            arm not in recipe.arms or recipe.epochs >= 2 * part,
            f"With {recipe.epochs} epochs the arm {arm} would have {recipe.epochs // part}; it needs two at "
            f"least. Raise epochs, or leave {arm} out of arms.",
        )
    branches = bool(set(recipe.arms) & set(AVERAGING_ARMS)) and recipe.branch_at > 0
    require(
        not branches or 1 <= recipe.branch_epoch < recipe.epochs,
        f"With {recipe.epochs} epochs the averaging arms would leave the arm {recipe.baseline} after epoch "
        f"{recipe.branch_epoch} (branch_at {recipe.branch_at}); they need at least one epoch "
        "before and one after. Raise epochs.",
    )


def _check_warmup(recipe: Recipe) -> None:
    shortest = next((arm for arm in ("quarter", "half") if arm in recipe.arms), recipe.baseline)
    constant = recipe.constant_until * recipe.last_epoch(shortest)
    require(
        recipe.warmup_epochs <= max(constant, 1),
        f"warmup_epochs is {recipe.warmup_epochs}, and the arm {shortest} is annealed from epoch "
        f"{constant:g} on (constant_until {recipe.constant_until}). Shorten the warm-up or raise epochs.",
    )


def _check_choices(recipe: Recipe) -> None:
    choices = {
        "network": LANGUAGE_NETWORKS if recipe.task == "words" else NETWORKS,
        "optimizer": ("sgd", "adamw"),
        "annealing": ("linear", "cosine"),
        "swa_average": ("epoch", "step"),
        "strategy": ("ddp", "fsdp"),
    }
    for name, allowed in choices.items():
        value = getattr(recipe, name)
        require(value in allowed, f"{name} is {value!r}; expected {' or '.join(allowed)}.")
    _check_names(recipe)
    _check_words(recipe)
    require(
        "wsm" not in recipe.averages or recipe.strategy == "ddp",
        "averages has wsm, which is made in a whole copy of the model, and strategy is 'fsdp'. Leave one out.",
    )
    require(
        bool(recipe.name) and "/" not in recipe.name and not recipe.name.startswith("."),
        f"name is {recipe.name!r}; expected a plain folder name.",
    )
    require(
        not (recipe.data and recipe.data_folder),
        "data and data_folder exclude each other; pass only one.",
    )
    require(
        not (recipe.model and recipe.batchnorm),
        "model and batchnorm exclude each other: batchnorm is an option of polyak's own network.",
    )
    require(
        not recipe.batchnorm or recipe.network == "taught",
        f"batchnorm is an option of the network taught, and network is {recipe.network!r}. Choose one.",
    )
    require(
        not recipe.nesterov or (recipe.momentum > 0 and recipe.optimizer == "sgd"),
        "nesterov needs a momentum of SGD above 0. Raise momentum, or leave nesterov out.",
    )


def _check_names(recipe: Recipe) -> None:
    first, *others = ARMS[recipe.task]
    require(
        recipe.arms == tuple(a for a in (first, *others) if a in recipe.arms)
        and first in recipe.arms,
        f"arms is {list(recipe.arms)}; expected {first}, then any of {', '.join(others)}, in this order"
        f"{' (the task is words: begin with the recipe words)' if recipe.task == 'words' else ''}.",
    )
    require(
        recipe.averages == tuple(a for a in AVERAGES if a in recipe.averages)
        and "ema" in recipe.averages,
        f"averages is {list(recipe.averages)}; expected ema, then any of {', '.join(AVERAGES[1:])}, in this "
        "order.",
    )
    require(
        "wsm" not in recipe.averages or recipe.record_intervals > 0,
        "averages has wsm, which is made from the record, and record_intervals is 0. Record, or leave wsm out.",
    )


def _check_words(recipe: Recipe) -> None:
    """A text has no pixels."""
    if recipe.task != "words":
        return
    of_images = {
        "flips": recipe.flips, "shift": recipe.shift, "batchnorm": recipe.batchnorm,
        "data_folder": recipe.data_folder,
    }  # fmt: skip
    given = [name for name, value in of_images.items() if value]
    require(
        not given,
        f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for images, and the task is words. Leave it "
        "out; an own text is --data FILE.",
    )
    require(
        recipe.strategy == "ddp",
        "strategy is 'fsdp', and the task is words, whose weights are rounded to 8 bits one whole tensor at a "
        "time. Leave it at ddp.",
    )


def quick_version(recipe: Recipe) -> Recipe:
    """The run in miniature: 8 epochs, at most 2 seeds, cycles and half-lives in proportion.

    >>> quick = quick_version(Recipe())
    >>> quick.epochs, quick.branch_epoch, quick.swa_epoch, quick.name
    (8, 4, 6, 'default-quick')
    """
    ratio = QUICK_EPOCHS / recipe.epochs
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-quick",
        epochs=QUICK_EPOCHS,
        seeds=min(2, recipe.seeds),
        cycle_epochs=max(1, round(recipe.cycle_epochs * ratio)),
        warmup_epochs=min(recipe.warmup_epochs, 1),
        ema_half_life=recipe.ema_half_life * ratio,
    )
