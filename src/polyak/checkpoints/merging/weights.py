"""From what was asked (`swa`, a profile, a list of weights) to one coefficient per input."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from polyak.checkpoints.merging.counted import average_rank
from polyak.checkpoints.merging.deltas import Combination, parse_method
from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.rules import SUM_TOLERANCE
from polyak.checkpoints.merging.units import measured_times
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.errors import ArgumentError, require
from polyak.maths.arguments import numbers
from polyak.maths.pieces import effective_samples, piece_weights
from polyak.maths.profile import Profile
from polyak.maths.profiles import SWA
from polyak.version import __version__

UNHASHED = "0" * 64
"""In place of a SHA-256 that is not known yet."""

_LARGEST, _TINIEST = 3e38, 1e-150
"""Weights are numbers of float32 where the tensors are, and their squares are of float64."""

_OUR_KEYS = {
    "polyak", "profile", "unit", "time", "count", "sum_squared_shares", "inputs", "base", "step",
    "batchnorm", "ties", "interval", "record",
}  # fmt: skip


@dataclass(frozen=True)
class OutputWeights:
    r"""The coefficient of each input in one output, $y = \sum_i c_i\, x_i$, used as they are.

    They may be negative and need not sum to 1, which is what a difference of two checkpoints needs:
    `OutputWeights((1.0, -1.0))`. As a method they are in the order in which the inputs were given; in a
    `MergeResult` they are oldest first. Raises ArgumentError unless all are finite and one is not zero.

    coefficients: float64, one per input. label: what the output's metadata gives as its profile.
    unit: of its time, `steps`, `captures` or `files`. metadata: what the output says about itself, in
    the place of a list of its inputs. combination: what is done with the inputs in place of the sum.
    """

    coefficients: tuple[float, ...]
    label: str = "weights"
    unit: str = "files"
    metadata: Mapping[str, str] | None = None
    combination: Combination | None = None

    def __post_init__(self) -> None:
        found = numbers("weights", self.coefficients).reshape(-1).tolist()
        if not all(map(math.isfinite, found)) or not any(found):
            raise ArgumentError(f"The weights are {found}; expected finite numbers, not all zero.")
        largest = max(map(abs, found))
        require(
            _TINIEST <= largest <= _LARGEST,
            f"The largest of the weights {found} is {largest:g} in size; expected {_TINIEST:g} to "
            f"{_LARGEST:g}. Lists of any size are divided by their sum with normalize=True.",
        )
        object.__setattr__(self, "coefficients", tuple(found))

    @property
    def effective_samples(self) -> float:
        """How many equal weights would cancel as much noise."""
        return effective_samples(self.coefficients)


Method = Profile | str | Sequence[float] | OutputWeights | Combination
"""How an output is made: a profile, its text, weights that sum to 1, coefficients as they are, or what
combines the inputs in another way than by a sum."""


def in_natural_order(inputs: Sequence[Checkpoint], options: MergeOptions) -> list[int]:
    """The inputs' indices by training step; those of unknown step first, as they were given."""
    steps = [-1 if one.step is None else one.step for one in inputs]
    measured = measured_times(inputs, options)
    return sorted(range(len(inputs)), key=(measured[1] if measured else steps).__getitem__)


def weights_for(
    method: Method, inputs: Sequence[Checkpoint], order: Sequence[int], options: MergeOptions
) -> OutputWeights:
    """The coefficients of one output. inputs: oldest first; order: where each was in the call.

    Raises ArgumentError for weights that do not fit the inputs or do not sum to 1, and for profiles
    that need steps where there are none.
    """
    method = parse_method(method) if isinstance(method, str) else method
    if isinstance(method, Profile):
        return _profile_weights(method, inputs, options)
    if isinstance(method, Combination):
        found = method.weights_of(len(inputs), has_base=options.base is not None)
        method = OutputWeights(found, repr(method), combination=method)
    ready = method if isinstance(method, OutputWeights) else _summing_to_1(method, options)
    found = ready.coefficients
    require(
        len(found) == len(inputs),
        f"{len(found)} weights for {len(inputs)} inputs: {', '.join(one.path for one in inputs)}. One "
        "each is needed; a copy of another input is none.",
    )
    return replace(ready, coefficients=tuple(found[index] for index in order))


def _summing_to_1(method: Sequence[float], options: MergeOptions) -> OutputWeights:
    try:
        weights = [float(weight) for weight in method]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ArgumentError(
            f"Cannot build an output from {method!r}; expected a profile like polyak.SWA(), its text "
            "('swa'), or a weight for every input."
        ) from None
    if options.normalize and all(map(math.isfinite, weights)):
        # Times a power of two, which changes no quotient: the sum of large ones would overflow.
        scale = -max((math.frexp(weight)[1] for weight in weights if weight), default=0)
        scaled = [math.ldexp(weight, scale) for weight in weights]
        total = math.fsum(scaled)
        require(total != 0, f"The weights {weights} sum to 0 and cannot be normalised.")
        return OutputWeights(tuple(weight / total for weight in scaled))
    ready = OutputWeights(tuple(weights))
    total = math.fsum(weights)
    if options.base is None and abs(total - 1) > SUM_TOLERANCE:
        raise ArgumentError(
            f"The weights {weights} sum to {total:.6g}, not to 1. Pass normalize=True to divide them by "
            "their sum, or pass base=PATH to add differences to a checkpoint."
        )
    return ready


def _profile_weights(
    profile: Profile, inputs: Sequence[Checkpoint], options: MergeOptions
) -> OutputWeights:
    if options.base is not None:
        raise ArgumentError(
            f"The weights of {profile!r} sum to 1, so the base would cancel out of the result. With a "
            "base give one weight per input, such as 0.5,0.5,0.5 to add half of each difference."
        )
    unit, times = _times(profile, inputs, options)
    return OutputWeights(tuple(piece_weights(profile, times).tolist()), repr(profile), unit)


def metadata_of(
    weights: OutputWeights,
    inputs: Sequence[Checkpoint],
    options: MergeOptions,
    marks: Mapping[str, str],
) -> dict[str, str]:
    """What the output says about itself, strings only; `marks` are added (batchnorm, ties).

    The newest's own metadata is kept, with `format`, without which Transformers refuses a file.
    """
    if weights.metadata is not None:
        return {"format": "pt", **_carried(inputs[-1]), **weights.metadata, **marks}
    counted = [weight for weight in weights.coefficients if weight]
    steps = [one.step for one in inputs]
    measured = measured_times(inputs, options)
    time = steps[-1] if weights.unit == "steps" and steps[-1] is not None else len(counted)
    if measured and weights.unit == measured[0]:
        time = round(measured[1][-1])
    made = {
        "polyak": __version__,
        "profile": weights.label,
        "unit": weights.unit,
        "time": str(time),
        "count": str(len(counted)),
        "inputs": json.dumps(
            [_described(*pair, options) for pair in zip(inputs, weights.coefficients, strict=True)]
        ),
    }
    if measured:
        made[f"{measured[0]} of inputs"] = json.dumps(measured[1])
    if options.base is not None:
        made["base"] = os.fspath(options.base)
    for what, patterns in (("include", options.include), ("exclude", options.exclude)):
        if patterns:
            made[what] = json.dumps(patterns)
    if weights.unit != "steps" and steps[-1] is not None:
        made["step"] = str(steps[-1])
    return {"format": "pt", **_carried(inputs[-1]), **made, **marks}


def _carried(newest: Checkpoint) -> dict[str, str]:
    """What a safetensors file says about itself apart from what polyak wrote."""
    if not newest.format.startswith("safetensors"):
        return {}
    return {key: text for key, text in newest.metadata.items() if key not in _OUR_KEYS}


def with_hashes(metadata: Mapping[str, str], hashes: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the SHA-256 of every input's files; hashes: path -> hex."""
    if "inputs" not in metadata:
        return dict(metadata)
    inputs = json.loads(metadata["inputs"])
    for one in inputs:
        for path in one.get("sha256", {}):
            one["sha256"][path] = hashes[path]
    return {**metadata, "inputs": json.dumps(inputs)}


def _described(one: Checkpoint, weight: float, options: MergeOptions) -> dict[str, object]:
    described: dict[str, object] = {"path": one.path, "bytes": sum(file.size for file in one.files)}
    if one.step is not None:
        described["step"] = one.step
    described["weight"] = weight
    if average_rank(one):
        described["average"] = True
    if options.verify:
        described["sha256"] = {file.path: UNHASHED for file in one.files}
    return described


def _times(
    profile: Profile, inputs: Sequence[Checkpoint], options: MergeOptions
) -> tuple[str, list[float]]:
    """The unit of the profile's time and the time of each input."""
    if (measured := measured_times(inputs, options)) is not None:
        unit, times = measured
        if len(set(times)) == len(times):
            return measured
        raise ArgumentError(
            f"Two inputs have the same time: {unit} {times}. Leave one of them out."
        )
    unknown = [one.path for one in inputs if one.step is None]
    if not unknown:
        steps = [float(one.step or 0) for one in inputs]
        if len(set(steps)) == len(steps):
            return "steps", steps
        if not isinstance(profile, SWA):
            raise ArgumentError(
                f"{profile!r} needs files of different training steps; found {steps}. If these are "
                "several runs, give a weight per input, or use swa, which counts files equally."
            )
    elif profile.has_horizon or (len(unknown) < len(inputs) and not isinstance(profile, SWA)):
        raise ArgumentError(
            f"{profile!r} is measured in training steps, but the step of {', '.join(unknown)} is "
            "unknown. Put it in the name (checkpoint-500, step_000500.pt), use swa, or give a weight "
            "per input."
        )
    return "captures", [float(index) for index in range(1, len(inputs) + 1)]
