"""Quantised tensors: they only mean something together with others, so there is no mean of them.

Some are known by their names or dtypes. The others are known by what they are: a table of integers
that differs between checkpoints is no counter, and an integer zero point belongs to its scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from polyak.checkpoints.reading.stored import (
    FLOATS,
    NARROW_FLOATS,
    Checkpoint,
    StoredTensor,
    same_bytes,
)
from polyak.errors import FormatError

INTEGERS = frozenset(("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"))

# What GPTQ, AWQ, bitsandbytes, compressed-tensors and fp8 store beside or instead of weights.
_NAMES = {
    "qweight", "qzeros", "absmax", "quant_map", "nested_absmax", "SCB", "weight_packed",
    "weight_scale", "weight_scale_inv", "weight_zero_point", "scale_weight",
}  # fmt: skip
_ZERO_POINT = re.compile(r"zero_?point|(^|_)(zeros?|zp)$", re.IGNORECASE)


def refuse_quantised(
    inputs: Sequence[Checkpoint], held: Sequence[Mapping[str, StoredTensor]], averaged: set[str]
) -> None:
    """Raise FormatError that names the quantised tensors among those to be averaged.

    inputs: the newest last. held: the tensors of each by every name. Of integers of two or more
    dimensions, and of zero points, the values are read, up to the first difference.
    """
    newest = inputs[-1]
    names = sorted(name for name in averaged if _is_quantised(newest.tensors[name]))
    if names:
        raise FormatError(
            f"{newest.path} is quantised: {', '.join(names)}. Integers and floats of 8 bits or fewer, as a rule with "
            "scales beside them, cannot be averaged; average the weights before they are quantised, or pass exclude= "
            "with their names, and they are the newest's."
        )
    integers = [t for n, t in newest.tensors.items() if t.dtype in INTEGERS and n in averaged]
    tables = [tensor for tensor in integers if len(tensor.shape) >= 2]
    wanted = [t for n, t in newest.tensors.items() if n in averaged] if integers else []
    zero_points = _zero_points(integers, wanted)
    for other, found in zip(inputs[:-1], held, strict=False):
        _refuse_tables(newest, other, _differing(tables, found))
        _refuse_zero_points(newest, other, _differing(zero_points, found))


def _is_quantised(tensor: StoredTensor) -> bool:
    last = tensor.name.rpartition(".")[2]
    return (
        last in _NAMES
        or ".quant_state." in tensor.name
        or tensor.dtype in NARROW_FLOATS
        or (last == "weight" and tensor.dtype in INTEGERS and len(tensor.shape) >= 2)
    )


def _zero_points(
    integers: Iterable[StoredTensor], tensors: Iterable[StoredTensor]
) -> list[StoredTensor]:
    """Integer zero points with a floating scale in the same module."""
    scales = {
        tensor.name.rpartition(".")[0]
        for tensor in tensors
        if tensor.dtype in FLOATS and "scale" in tensor.name.rpartition(".")[2].lower()
    }
    split = [(tensor, tensor.name.rpartition(".")) for tensor in integers]
    return [t for t, (module, _, last) in split if module in scales and _ZERO_POINT.search(last)]


def _differing(tensors: Iterable[StoredTensor], found: Mapping[str, StoredTensor]) -> list[str]:
    """Those whose values are others in `found`; other shapes are reported with all that does not fit."""
    pairs = [(tensor, found[tensor.name]) for tensor in tensors if tensor.name in found]
    return [
        ours.name
        for ours, theirs in pairs
        if ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and not same_bytes(ours, theirs)
    ]


def _refuse_tables(newest: Checkpoint, other: Checkpoint, names: list[str]) -> None:
    if names:
        raise FormatError(
            f"{newest.path} is quantised, or holds other tables of integers that differ from those of "
            f"{other.path}: {', '.join(names)}. Codes and their scales cannot be averaged one by one: "
            "dequantise the weights first, or average them before they are quantised. If these are no "
            "weights (counts, indices), pass exclude= with their names, and they are the newest's."
        )


def _refuse_zero_points(newest: Checkpoint, other: Checkpoint, names: list[str]) -> None:
    if names:
        raise FormatError(
            f"{newest.path} is fake-quantised (quantisation-aware training), and its zero points differ "
            f"from those of {other.path}: {', '.join(names)}. A zero point belongs to its scale, and "
            "the mean of the scales has none. Pass exclude= with the names of both, and they are the "
            "newest's; or average the weights before quantisation begins."
        )
