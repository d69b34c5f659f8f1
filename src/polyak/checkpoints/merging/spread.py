r"""How far the inputs of a merge are apart, from a sample of their values, before the work begins.

Averages gain where checkpoints differ within one basin: along a run, or between fine-tunes of one base. The
matrices of networks that were initialised apart are uncorrelated, and their mean is no network at all: its
norm is that of noise. So the cosine between the same matrix of two inputs tells the two cases apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyak.checkpoints.merging.align import MergedTensor
from polyak.checkpoints.merging.prepare import Merge
from polyak.checkpoints.reading.stored import TORCH_DTYPES, StoredTensor, itemsize
from polyak.errors import warn

LEAST_COSINE = 0.1
"""The least that the median over matrices may be. Independent ones have 1 / sqrt(values) or so."""

_TENSORS, _PIECES, _VALUES = 64, 2, 2048
_ENOUGH = 1024  # values of a matrix whose cosine says something


@dataclass(frozen=True)
class Spread:
    r"""What a sample says.

    relative: per output, the RMS distance of the inputs to their weighted mean $y$,
    $\sqrt{\sum_i c_i |x_i - y|^2} / |y|$; None where the weights are no mean. cosine: of the two inputs that
    are least alike, the median over matrices; 1 where none has enough values to tell. pair: these two.
    """

    relative: tuple[float | None, ...]
    cosine: float
    pair: tuple[str, str]


def spread_of(merge: Merge) -> Spread | None:
    """The spread of the inputs; None where nothing is averaged or the values are not finite."""
    count = len(merge.inputs)
    means = [t for t in merge.alignment.tensors if t.mean and t.numbers and t.nbytes]
    matrices = [tensor for tensor in means if len(tensor.shape) > 1] or means
    if count < 2 or not matrices:
        return None
    sampled = matrices[:: -(-len(matrices) // _TENSORS)]
    grams = np.array([_gram(tensor, count) for tensor in sampled])
    large = [len(t.shape) > 1 and t.nbytes >= _ENOUGH * itemsize(t.dtype) for t in sampled]
    norms = np.sqrt(np.einsum("tii->ti", grams))
    if not np.isfinite(grams).all():
        return None
    with np.errstate(invalid="ignore"):
        cosines = grams / (norms[:, :, None] * norms[:, None, :])
    known = cosines[np.isfinite(cosines).all((1, 2)) & np.array(large)]
    median = np.median(known, 0) if len(known) else np.ones((count, count))
    first, second = np.unravel_index(median.argmin(), median.shape)
    total = grams.sum(0)
    return Spread(
        tuple(_relative(total, one.coefficients) for one in merge.weights),
        float(median[first, second]),
        (merge.inputs[int(first)].path, merge.inputs[int(second)].path),
    )


def warn_of_no_basin(spread: Spread | None) -> None:
    """Warn where two inputs have nothing in common, as networks of separate initialisations."""
    if spread is not None and spread.cosine < LEAST_COSINE:
        warn(
            f"The weights of {spread.pair[0]} and {spread.pair[1]} are unrelated (cosine "
            f"{spread.cosine:.2g}), as those of runs that were initialised apart, and their average will not "
            "work. Average checkpoints of one run, or fine-tunes of one model."
        )


def _gram(tensor: MergedTensor, count: int) -> Any:
    """Products of every two inputs over the whole tensor, estimated from a few pieces of it."""
    sources = [source for source in tensor.sources[-count:] if source is not None]
    values = np.stack([_sample(source, tensor) for source in sources])
    size = tensor.nbytes / itemsize(tensor.dtype)
    return values @ values.T * (size / values.shape[1])


def _sample(source: StoredTensor, tensor: MergedTensor) -> Any:
    dtype = tensor.numbers[0] if tensor.numbers else source.dtype
    size = itemsize(dtype)
    total = source.nbytes // size
    taken = min(total, _VALUES)
    starts = {round(part * (total - taken) / max(1, _PIECES - 1)) for part in range(_PIECES)}
    raw = bytearray(taken * size * len(starts))
    for number, start in enumerate(sorted(starts)):
        source.read_into(start * size, memoryview(raw)[number * taken * size :][: taken * size])
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[dtype]).double().numpy()


def _relative(gram: Any, coefficients: Sequence[float]) -> float | None:
    weights = np.array(coefficients)
    if (weights < 0).any() or abs(weights.sum() - 1) > 1e-6:
        return None
    mean = weights @ gram @ weights
    apart = weights @ np.diag(gram) - mean
    return math.sqrt(max(0.0, apart) / mean) if mean > 0 else None
