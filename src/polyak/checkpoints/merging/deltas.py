r"""Combinations of separate runs that are no plain average: TIES, DARE, Model Stock, SLERP.

All but SLERP start from the base $b$ from which the runs began, and combine the deltas $d_i = x_i - b$. They
stream through the same engine as averages, after one more reading of the inputs where they need one.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from polyak.checkpoints.merging.align import MergedTensor
from polyak.checkpoints.merging.measure import (
    Inputs,
    gram_matrix,
    kth_largest_changes,
    values_of,
)
from polyak.checkpoints.merging.rules import (
    ElectedDeltas,
    Rule,
    StockShare,
    SumOfDeltas,
    SumPerTensor,
)
from polyak.checkpoints.reading.stored import accumulator
from polyak.errors import ArgumentError, require
from polyak.maths import text
from polyak.maths.arguments import count, number
from polyak.maths.profile import Profile

_NUMPY: Mapping[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}
_LARGEST_SCALE = 1e28  # which float32 holds even where DARE divides it by a density of 2^-32


class Combination(ABC):
    """A way to make one output of all inputs that is more than a weighted sum."""

    buffers: ClassVar[int] = 1
    """Rows of a chunk that its rule needs."""
    reads: ClassVar[int] = 2
    """How often the inputs are read."""
    is_weighted: ClassVar[bool] = True
    """Whether the weight of an input is more than its place in a mean."""

    @abstractmethod
    def weights_of(self, inputs: int, *, has_base: bool) -> tuple[float, ...]:
        """A weight per input, in the order of the call; ArgumentError where it cannot be made of these."""

    @abstractmethod
    def rule(self, inputs: Inputs) -> Rule:
        """The rule for these inputs, with what it has to know of them."""


@dataclass(frozen=True)
class Ties(Combination):
    r"""TIES: trim, elect a sign, average what agrees: $b + \lambda\, \frac{\sum_i w_i d_i [s]}{\sum_i w_i [s]}$.

    Per tensor and input the share `density` of its deltas with the largest magnitudes is kept. For each value
    $s$ is the sign of $\sum_i w_i d_i$ of what was kept (+ where that is 0), and $[s]$ leaves out the inputs whose
    delta is 0 or has the other sign. Values that equal the smallest magnitude kept are kept too.

    Args:
        density: the share $k$ that is kept, above 0 to 1. The paper keeps 0.2.
        scale: $\lambda$, by which the merged delta is multiplied, at most 1e28 in size. The paper's choice without
            validation is 1.
        weights: $w_i$, one per input and not negative; equal by default.

    Raises ArgumentError outside these domains, and without a base.

    Source: Yadav et al. 2023, arXiv 2306.01708.

    >>> Ties(density=0.5)
    Ties(density=0.5, scale=1.0, weights=None)

    """

    density: float = 0.2
    scale: float = 1.0
    weights: tuple[float, ...] | None = None

    buffers: ClassVar[int] = 7

    def __post_init__(self) -> None:
        _check_delta_method(self)

    def weights_of(self, inputs: int, *, has_base: bool) -> tuple[float, ...]:
        """A weight per input."""
        _require_base(self, has_base)
        return _weights(self.weights, inputs, 1.0)

    def rule(self, inputs: Inputs) -> Rule:
        """The rule, with what it has to know of the inputs."""

        # `hardshrink` keeps what is larger than its bound; what is as large as ours is to stay.
        def find(tensor: MergedTensor) -> list[float]:
            dtype = _NUMPY[accumulator(tensor.numbers[0] if tensor.numbers else tensor.dtype)]
            least = kth_largest_changes(tensor, self.density)
            return [
                np.nextafter(dtype(bound), dtype(0)).item() if bound else 0.0 for bound in least
            ]

        below = inputs.each(find)

        def trim(delta: Tensor, name: str, index: int, begin: int) -> None:
            if bound := below[name][index]:
                torch.hardshrink(delta, bound, out=delta)

        return ElectedDeltas(inputs.weights, self.scale, trim)


@dataclass(frozen=True)
class Dare(Combination):
    r"""DARE: drop deltas at random and rescale the rest: $b + \lambda \sum_i w_i\, m_i d_i / p$.

    The masks $m_i$ are 1 with probability $p$, else 0. Every value has a random number of its own, of the seed, the tensor's name, the input's place and the
    value's index, so the result depends neither on threads nor on how the files are cut.

    Args:
        density: $p$, the share that is kept, above 0 to 1. The paper drops 90% to 99% of fine-tunes. It is rounded
            to a multiple of $2^{-16}$, of $2^{-32}$ where it is below 1/64.
        scale: $\lambda$, by which the merged delta is multiplied, at most 1e28 in size.
        weights: $w_i$, one per input and not negative; $1/N$ by default.
        elect: combine what is left as `Ties` does: elect a sign, average what agrees.
        seed: of the random numbers, a whole number that is not negative.

    Raises ArgumentError outside these domains, and without a base.

    Source: Yu et al. 2024, arXiv 2311.03099.

    >>> Dare(density=0.1, elect=True)
    Dare(density=0.1, scale=1.0, weights=None, elect=True, seed=0)

    """

    density: float
    scale: float = 1.0
    weights: tuple[float, ...] | None = None
    elect: bool = False
    seed: int = 0

    buffers: ClassVar[int] = 7
    reads: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_delta_method(self)
        if not 0 <= count("seed", self.seed) < 2**64:
            raise ArgumentError(
                f"seed is {self.seed!r}; expected a whole number from 0 to 2^64 - 1."
            )

    def weights_of(self, inputs: int, *, has_base: bool) -> tuple[float, ...]:
        """A weight per input."""
        _require_base(self, has_base)
        return _weights(self.weights, inputs, 1 / inputs)

    def rule(self, inputs: Inputs) -> Rule:
        """The rule, with what it has to know of the inputs."""

        def drop(delta: Tensor, name: str, index: int, begin: int) -> None:
            kept = kept_at_random(self.seed, name, index, begin, len(delta), self.density)
            values: Any = delta.numpy()
            with np.errstate(invalid="ignore"):  # of an infinity, which is named in the end
                np.multiply(values, kept.numpy().view(np.uint8), out=values)

        rule = ElectedDeltas if self.elect else SumOfDeltas
        return rule(inputs.weights, self.scale / share_kept(self.density), drop)


@dataclass(frozen=True)
class ModelStock(Combination):
    r"""Model Stock: from the base towards the mean, as far as the angle between runs says, per tensor.

    $(1 - t)\, b + t\, \frac1N \sum_i x_i$ with $t = N c / (1 + (N - 1) c)$, where $c$ is the mean cosine between the
    deltas of two inputs. Where it is negative, the runs share no direction and $t$ is 0.

    Raises ArgumentError without a base, and for fewer than two inputs.

    Source: Jang et al. 2024, arXiv 2403.19522.
    """

    is_weighted: ClassVar[bool] = False

    def weights_of(self, inputs: int, *, has_base: bool) -> tuple[float, ...]:
        """A weight per input."""
        _require_base(self, has_base)
        require(inputs > 1, "Model Stock needs the angle between runs; there is one input.")
        return (1 / inputs,) * inputs

    def rule(self, inputs: Inputs) -> Rule:
        """The rule, with what it has to know of the inputs."""
        runs = len(inputs.weights)

        def find(tensor: MergedTensor) -> list[float]:
            gram = gram_matrix(tensor, has_base=True)
            if not np.isfinite(gram).all():
                # All count, so that merging meets the value and names it.
                return [0.5, *[0.5 / runs] * runs]
            cosines = _cosines(gram)
            mean = max(0.0, float(cosines[~np.eye(runs, dtype=bool)].mean()))
            share = runs * mean / (1 + (runs - 1) * mean)
            return [1 - share, *[share / runs] * runs]

        found = inputs.each(find)
        rule = SumPerTensor(found, runs + 1)
        if found:
            rule.stock = _stock_share({name: 1 - one[0] for name, one in found.items()}, inputs)
        return rule


@dataclass(frozen=True)
class Slerp(Combination):
    r"""SLERP: along the arc from one input to the other, per tensor.

    $b + \frac{\sin((1 - t)\, \Omega)}{\sin \Omega}\, d_1 + \frac{\sin(t\, \Omega)}{\sin \Omega}\, d_2$ with
    $\Omega$ the angle between $d_1$ and $d_2$; without a base the same of the inputs themselves ($b = 0$). Tensors
    that are parallel, opposite or zero are interpolated linearly.

    Args:
        t: how far from the first input to the second, 0 to 1.

    Raises ArgumentError outside this domain, and for any number of inputs but two.

    Source: Ramé et al. 2024, arXiv 2406.16768, of two deltas; Shoemake 1985.

    >>> Slerp(0.3)
    Slerp(t=0.3)

    """

    t: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= number("t", self.t) <= 1, f"t is {self.t}; expected 0 to 1.")

    def weights_of(self, inputs: int, *, has_base: bool) -> tuple[float, ...]:
        """A weight per input."""
        require(inputs == 2, f"SLERP is of two inputs; there are {inputs}.")
        return (1 - self.t, self.t)

    def rule(self, inputs: Inputs) -> Rule:
        """The rule, with what it has to know of the inputs."""

        def find(tensor: MergedTensor) -> list[float]:
            cosine = float(_cosines(gram_matrix(tensor, has_base=inputs.has_base))[0, 1])
            along = _along_arc(inputs.weights, cosine)
            return [1 - math.fsum(along), *along] if inputs.has_base else along

        return SumPerTensor(inputs.each(find), len(inputs.weights) + inputs.has_base)


def parse_method(method: str) -> Profile | Combination:
    """The profile or the combination that a text names.

    >>> parse_method("ties:density=0.3,weights=0.5/1"), parse_method("slerp:t=0.3")
    (Ties(density=0.3, scale=1.0, weights=(0.5, 1.0)), Slerp(t=0.3))
    >>> parse_method("swa")
    SWA()
    """
    if method.strip().partition(":")[0] in _METHODS:
        combination: Combination = text.parse(method, _METHODS)
        return combination
    try:
        return text.parse_profile(method)
    except ArgumentError as error:
        if not str(error).startswith("Unknown method"):
            raise
        others = ", ".join(example for one in _METHODS.values() for example in one.examples)
        raise ArgumentError(f"{str(error).removesuffix('.')}, {others}.") from None


def kept_at_random(
    seed: int, name: str, index: int, begin: int, values: int, density: float
) -> Tensor:
    """Which of the values `begin` to `begin + values` of a tensor are kept: a share of them, at random."""
    kind, bound = _threshold(density)
    numbers = np.random.PCG64DXSM(_seeds(seed, name, index))
    each = 8 // np.dtype(kind).itemsize  # of them in a step, which has 64 bits
    numbers.advance(begin // each)
    raw = numbers.random_raw(values // each + 2).view(kind)[begin % each :][:values]
    return torch.from_numpy(raw <= kind(bound - 1))


def share_kept(density: float) -> float:
    """What `kept_at_random` keeps of all values on average."""
    kind, bound = _threshold(density)
    return bound / float(np.iinfo(kind).max + 1)


def _threshold(density: float) -> tuple[Any, int]:
    """The random numbers, whole and without a sign, and how many of these values are below it."""
    kind, bits = (np.uint16, 16) if density >= 1 / 64 else (np.uint32, 32)
    return kind, max(1, round(density * 2**bits))


@lru_cache(maxsize=4096)  # a tensor has many chunks
def _seeds(seed: int, name: str, index: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(name.encode()), index])


def _stock_share(shares: Mapping[str, float], inputs: Inputs) -> StockShare:
    sizes = {tensor.name: values_of(tensor) for tensor in inputs.tensors if tensor.name in shares}
    average = math.fsum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())
    return StockShare(average, min(shares.values()), max(shares.values()))


def _along_arc(weights: Sequence[float], cosine: float) -> list[float]:
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-6 or not math.isfinite(angle):
        return list(weights)
    return [math.sin(weight * angle) / math.sin(angle) for weight in weights]


def _cosines(gram: Any) -> Any:
    """Cosines of a Gram matrix; 0 with a zero vector, and with one that is not finite."""
    norms = np.sqrt(np.diag(gram))
    product = norms[:, None] * norms[None, :]
    known = (product > 0) & np.isfinite(gram)
    return np.divide(gram, product, out=np.zeros_like(gram), where=known)


def _check_delta_method(method: Any) -> None:
    density, scale = number("density", method.density), number("scale", method.scale)
    require(0 < density <= 1, f"density is {density}; expected more than 0, to 1.")
    require(
        abs(scale) <= _LARGEST_SCALE,
        f"scale is {scale:g}; expected a number from {-_LARGEST_SCALE:g} to {_LARGEST_SCALE:g}.",
    )
    if method.weights is not None:
        weights = tuple(number("weights", weight) for weight in method.weights)
        require(
            all(0 <= weight < math.inf for weight in weights) and any(weights),
            f"weights are {weights}; expected finite numbers that are not negative, and one above 0.",
        )
        object.__setattr__(method, "weights", weights)


def _weights(weights: tuple[float, ...] | None, inputs: int, each: float) -> tuple[float, ...]:
    found = (each,) * inputs if weights is None else weights
    require(len(found) == inputs, f"{len(found)} weights for {inputs} inputs; one each is needed.")
    return found


def _require_base(method: Combination, has_base: bool) -> None:
    require(
        has_base,
        f"{method!r} combines what runs have changed, so it needs the checkpoint that they began from. "
        "Pass base=PATH.",
    )


def _parse_weights(given: str, value: str) -> tuple[float, ...]:
    return tuple(text.parse_float(given, one) for one in value.split("/"))


_DELTAS: Mapping[str, text.Reader] = {
    "density": text.parse_float,
    "scale": text.parse_float,
    "weights": _parse_weights,
}
_METHODS = {
    "ties": text.Method(lambda values: Ties(**values), _DELTAS, examples=("ties:density=0.2",)),
    "dare": text.Method(
        lambda values: Dare(**values),
        {**_DELTAS, "elect": text.parse_bool, "seed": text.parse_int},
        needs=(("density",),),
        examples=("dare:density=0.1",),
    ),
    "model-stock": text.Method(lambda values: ModelStock(), {}, examples=("model-stock",)),
    "slerp": text.Method(
        lambda values: Slerp(**values), {"t": text.parse_float}, examples=("slerp:t=0.5",)
    ),
}
