"""From what was asked (`swa`, a profile, a list of weights) to one coefficient per input."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyak.checkpoints.merging.options import Settings
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.errors import ArgumentError
from polyak.maths.pieces import effective_samples, piece_weights
from polyak.maths.profiles import SWA, Profile
from polyak.maths.text import parse_profile
from polyak.version import __version__

How = Profile | str | Sequence[float]
"""How an output is made: a profile, its spelling, or a weight for every input as given."""

UNHASHED = "0" * 64
"""Stands where a SHA-256 will be written once it is known."""

_SUM_TOLERANCE = 1e-6
_OURS = {
    "polyak",
    "profile",
    "unit",
    "time",
    "count",
    "inputs",
    "base",
    "step",
    "batchnorm",
    "ties",
}


@dataclass(frozen=True)
class Recipe:
    """How one output is made. weights: float64, one per input, oldest first.

    label: the profile's repr, or `weights`. unit: of its time: `steps`, `captures` or `files`.
    """

    label: str
    unit: str
    weights: tuple[float, ...]

    @property
    def effective_samples(self) -> float:
        """How many equal weights would cancel as much noise."""
        return effective_samples(self.weights)


def in_natural_order(inputs: Sequence[Checkpoint]) -> list[int]:
    """The inputs' indices by training step if each is known, else as they were given."""
    steps = [one.step for one in inputs]
    if any(step is None for step in steps):
        return list(range(len(inputs)))
    return sorted(range(len(inputs)), key=lambda index: steps[index] or 0)


def recipe_for(
    how: How, inputs: Sequence[Checkpoint], order: Sequence[int], settings: Settings
) -> Recipe:
    """The coefficients of one output. inputs: oldest first; order: where each was in the call.

    Raises ArgumentError for weights that do not fit the inputs or do not sum to 1, and for profiles
    that need steps where there are none.
    """
    profile = parse_profile(how) if isinstance(how, str) else how
    if not isinstance(profile, Profile):
        weights = _explicit(profile, settings)
        if len(weights) != len(inputs):
            raise ArgumentError(
                f"{len(weights)} weights for {len(inputs)} inputs; one each is needed."
            )
        return Recipe("weights", "files", tuple(weights[index] for index in order))
    if settings.base is not None:
        raise ArgumentError(
            f"The weights of {profile!r} sum to 1, so the base would cancel out of the result. Give "
            "weights= (--weights) with a base, such as 0.5,0.5,0.5 to add half of each difference."
        )
    unit, times = _times(profile, inputs)
    return Recipe(repr(profile), unit, tuple(piece_weights(profile, times).tolist()))


def metadata_of(
    recipe: Recipe, inputs: Sequence[Checkpoint], settings: Settings, marks: Mapping[str, str]
) -> dict[str, str]:
    """What the output says about itself, strings only; `marks` are added (batchnorm, ties).

    What the newest said goes on, with `format`, without which Transformers refuses a file.
    """
    counted = [weight for weight in recipe.weights if weight]
    steps = [one.step for one in inputs]
    time = steps[-1] if recipe.unit == "steps" and steps[-1] is not None else len(counted)
    made = {
        "polyak": __version__,
        "profile": recipe.label,
        "unit": recipe.unit,
        "time": str(time),
        "count": str(len(counted)),
        "inputs": json.dumps(
            [_described(*pair, settings) for pair in zip(inputs, recipe.weights, strict=True)]
        ),
    }
    if settings.base is not None:
        made["base"] = settings.base
    for what, patterns in (("include", settings.include), ("exclude", settings.exclude)):
        if patterns:
            made[what] = json.dumps(patterns)
    if recipe.unit != "steps" and steps[-1] is not None:
        made["step"] = str(steps[-1])
    return {"format": "pt", **_carried(inputs[-1]), **made, **marks}


def _carried(newest: Checkpoint) -> dict[str, str]:
    """What a safetensors file says about itself beside what polyak says."""
    if not newest.format.startswith("safetensors"):
        return {}
    return {key: text for key, text in newest.metadata.items() if key not in _OURS}


def with_hashes(metadata: Mapping[str, str], hashes: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the SHA-256 of every input's files; hashes: path -> hex."""
    inputs = json.loads(metadata["inputs"])
    for one in inputs:
        for path in one.get("sha256", {}):
            one["sha256"][path] = hashes[path]
    return {**metadata, "inputs": json.dumps(inputs)}


def _described(one: Checkpoint, weight: float, settings: Settings) -> dict[str, object]:
    described: dict[str, object] = {"path": one.path, "bytes": sum(file.size for file in one.files)}
    if one.step is not None:
        described["step"] = one.step
    described["weight"] = weight
    if settings.verify:
        described["sha256"] = {file.path: UNHASHED for file in one.files}
    return described


def _explicit(how: Sequence[float], settings: Settings) -> list[float]:
    try:
        weights = [float(weight) for weight in how]
    except (TypeError, ValueError):
        raise ArgumentError(
            f"An output is to be made by {how!r}; expected a profile like polyak.SWA(), its spelling "
            "('swa'), or a weight for every input."
        ) from None
    total = math.fsum(weights)
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ArgumentError(f"The weights are {weights}; expected finite numbers, not all zero.")
    if settings.normalize:
        if not total:
            raise ArgumentError(f"The weights {weights} sum to 0 and cannot be normalised.")
        return [weight / total for weight in weights]
    if settings.base is None and abs(total - 1) > _SUM_TOLERANCE:
        raise ArgumentError(
            f"The weights {weights} sum to {total:.6g}, not to 1. Pass normalize=True (--normalize) "
            "to divide them by their sum, or a base to add differences to."
        )
    return weights


def _times(profile: Profile, inputs: Sequence[Checkpoint]) -> tuple[str, list[float]]:
    """The unit of the profile's time and the time of each input."""
    unknown = [one.path for one in inputs if one.step is None]
    if not unknown:
        steps = [float(one.step or 0) for one in inputs]
        if len(set(steps)) == len(steps):
            return "steps", steps
        if not isinstance(profile, SWA):
            raise ArgumentError(
                f"{profile!r} needs files of different training steps; found {steps}. Are these "
                "several runs? Give weights (--weights), or swa, which counts files equally."
            )
    elif profile.has_horizon:
        raise ArgumentError(
            f"{profile!r} is a length of training, and the step of {', '.join(unknown)} is not known. "
            "Put it in the name (checkpoint-500, step_000500.pt), or use swa or weights (--weights)."
        )
    return "captures", [float(index) for index in range(1, len(inputs) + 1)]
