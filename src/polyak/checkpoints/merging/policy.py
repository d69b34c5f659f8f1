"""Which tensors of several checkpoints line up, and what happens to each: mean, newest, refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from polyak.checkpoints.merging.options import Settings
from polyak.checkpoints.reading.dtypes import COMPLEX_PARTS, FLOATS, NARROW_FLOATS
from polyak.checkpoints.reading.layout import Checkpoint, StoredTensor, bytes_of
from polyak.errors import ArgumentError, FormatError, MismatchError

_STATISTICS = ("running_mean", "running_var")
# What quantisation libraries (GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8) store beside or
# instead of weights: integers and scales that only mean something together.
_QUANTISED = {
    "qweight", "qzeros", "absmax", "quant_map", "nested_absmax", "SCB", "weight_packed",
    "weight_scale", "weight_scale_inv", "weight_zero_point", "scale_weight",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class MergedTensor:
    """One tensor of the output. sources: its stored form in every input, in their order.

    dtype: as written. numbers: the float dtypes it is read and written as (real parts of complex
    values), or None where its bytes are copied. mean: averaged; otherwise the newest's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numbers: tuple[str, str] | None
    mean: bool
    sources: tuple[StoredTensor | None, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes as written."""
        return bytes_of(self.dtype, self.shape)


@dataclass(frozen=True)
class Alignment:
    """The tensors of the output in the newest's order, and ties: alias -> name."""

    tensors: tuple[MergedTensor, ...]
    ties: dict[str, str]

    @property
    def has_statistics(self) -> bool:
        """Whether BatchNorm statistics are among them."""
        names = {tensor.name for tensor in self.tensors}
        return any(_is_statistic(name, names) for name in names)


def align(inputs: Sequence[Checkpoint], settings: Settings) -> Alignment:
    """Line the inputs up with the newest, the last; MismatchError lists all that does not fit.

    Raises FormatError for quantised tensors, which cannot be averaged, and for what a reader had to
    refuse; ArgumentError for a name pattern that fits nothing.
    """
    newest = inputs[-1]
    averaged = _averaged_names(inputs, settings)
    _refuse_unreadable(inputs)
    if len(inputs) > 1:
        _refuse_quantised(newest, averaged)
        _refuse_mismatches(inputs, averaged, settings)
    tensors = [
        _merged(tensor, inputs, settings, averaged=name in averaged)
        for name, tensor in newest.tensors.items()
    ]
    return Alignment(tuple(tensors), dict(newest.ties))


def stored_as(checkpoint: Checkpoint, name: str) -> StoredTensor | None:
    """The tensor that a checkpoint holds under a name or an alias of it."""
    return checkpoint.tensors.get(checkpoint.ties.get(name, name))


def _merged(
    tensor: StoredTensor, inputs: Sequence[Checkpoint], settings: Settings, *, averaged: bool
) -> MergedTensor:
    name = tensor.name
    mean = averaged and len(inputs) > 1 and not _is_statistic(name, inputs[-1].tensors)
    dtype = settings.dtype if settings.dtype and tensor.dtype in FLOATS else tensor.dtype
    numbers = None
    if tensor.dtype in FLOATS and (averaged or dtype != tensor.dtype):
        numbers = (tensor.dtype, dtype)
    elif tensor.dtype in COMPLEX_PARTS and averaged:
        numbers = (COMPLEX_PARTS[tensor.dtype],) * 2
    mean = mean and numbers is not None
    sources = [stored_as(one, name) if mean else None for one in inputs[:-1]]
    return MergedTensor(name, tensor.shape, dtype, numbers, mean, (*sources, tensor))


def _averaged_names(inputs: Sequence[Checkpoint], settings: Settings) -> set[str]:
    """The names that include= and exclude= leave; a tensor counts under its aliases too."""
    newest = inputs[-1]
    if not newest.tensors:
        raise FormatError(f"{newest.path} holds no tensors.")
    known = {name: [name] for name in newest.tensors}
    for alias, name in newest.ties.items():
        known[name].append(alias)
    everything = {name for one in inputs for name in (*one.tensors, *one.ties)}
    for what, patterns in (("include", settings.include), ("exclude", settings.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in everything):
                raise ArgumentError(
                    f"{what} pattern {pattern!r} fits no tensor of {newest.path} or "
                    f"the others; there are {', '.join(sorted(everything)[:8])}, ..."
                )
    return {name for name, names in known.items() if _is_wanted(names, settings)}


def _is_wanted(names: Iterable[str], settings: Settings) -> bool:
    included = not settings.include or _fits(names, settings.include)
    return included and not _fits(names, settings.exclude)


def _fits(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _is_statistic(name: str, names: Iterable[str]) -> bool:
    prefix, _, last = name.rpartition(".")
    counter = f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
    return last in _STATISTICS and counter in names


def _refuse_unreadable(inputs: Sequence[Checkpoint]) -> None:
    refused = [
        f"  {name} in {one.path}: {why}" for one in inputs for name, why in one.refused.items()
    ]
    if refused:
        raise FormatError("Some tensors cannot be read.\n" + "\n".join(sorted(refused)))


def _refuse_quantised(newest: Checkpoint, averaged: set[str]) -> None:
    names = sorted(name for name in averaged if _is_quantised(newest.tensors[name]))
    if names:
        raise FormatError(
            f"{newest.path} is quantised: {', '.join(names)}. Integers or tiny floats with scales "
            "beside them cannot be averaged; average the weights before they are quantised."
        )


def _is_quantised(tensor: StoredTensor) -> bool:
    last = tensor.name.rpartition(".")[2]
    whole = tensor.dtype in ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
    return (
        last in _QUANTISED
        or ".quant_state." in tensor.name
        or tensor.dtype in NARROW_FLOATS
        or (last == "weight" and whole and len(tensor.shape) >= 2)
    )


def _refuse_mismatches(
    inputs: Sequence[Checkpoint], averaged: set[str], settings: Settings
) -> None:
    newest = inputs[-1]
    missing: list[str] = []
    unexpected: list[str] = []
    changed: dict[str, str] = {}
    for other in inputs[:-1]:
        missing += [
            f"{name} (in {other.path})"
            for name in averaged
            if stored_as(other, name) is None and _needs_all(newest.tensors[name])
        ]
        unexpected += [
            f"{name} (in {other.path})"
            for name in other.tensors
            if stored_as(newest, name) is None and _is_wanted([name], settings)
        ]
        for name, how in _differences(newest, other, averaged):
            changed[f"{name} (in {other.path})"] = how
    if missing or unexpected or changed:
        raise MismatchError.of(
            f"The checkpoints do not line up with the newest, {newest.path}.",
            missing=missing,
            unexpected=unexpected,
            changed=changed,
            advice="Nothing was written. Give checkpoints of one model, or leave out what differs "
            "(--exclude takes a tensor from the newest).",
        )


def _needs_all(tensor: StoredTensor) -> bool:
    return tensor.dtype in FLOATS or tensor.dtype in COMPLEX_PARTS


def _differences(
    newest: Checkpoint, other: Checkpoint, averaged: set[str]
) -> Iterator[tuple[str, str]]:
    """What is reshaped, retyped, or tied in one of the two only."""
    for name in sorted(averaged):
        ours, theirs = newest.tensors[name], stored_as(other, name)
        if theirs is not None and (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            yield name, f"{_described(theirs)}; expected {_described(ours)}"
    for alias, name in other.ties.items():
        if {alias, name} <= newest.tensors.keys() and {alias, name} & averaged:
            yield alias, f"tied to {name} here, separate in the newest"
    for alias, name in newest.ties.items():
        if alias in other.tensors and stored_as(other, name) is not other.tensors[alias]:
            yield alias, f"separate here, tied to {name} in the newest"


def _described(tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
