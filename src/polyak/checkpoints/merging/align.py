"""Which tensors of several checkpoints line up, and what happens to each: mean, newest, refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.quantised import refuse_quantised
from polyak.checkpoints.reading.extra_state import is_extra, tensors_in
from polyak.checkpoints.reading.stored import (
    COMPLEX_PARTS,
    FLOATS,
    Checkpoint,
    StoredTensor,
    same_bytes,
)
from polyak.checkpoints.writing.layouts import TensorSpec
from polyak.errors import ArgumentError, FormatError, MismatchError
from polyak.tensors.spectral import is_spectral_vector

_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")


@dataclass(frozen=True, eq=False)
class MergedTensor(TensorSpec):
    """One tensor of the output. sources: its stored form in every input, in their order.

    dtype: as written. numbers: the float dtypes it is read and written as (real parts of complex
    values), or None where its bytes are copied. mean: averaged; otherwise the newest's.
    """

    numbers: tuple[str, str] | None
    mean: bool
    sources: tuple[StoredTensor | None, ...]


@dataclass(frozen=True)
class Alignment:
    """The tensors of the output in the newest's order, and ties: alias -> name.

    averages: whether the output differs from a copy of the newest. has_statistics: whether BatchNorm's
    are among them.
    """

    tensors: tuple[MergedTensor, ...]
    ties: dict[str, str]
    averages: bool
    has_statistics: bool


def align(inputs: Sequence[Checkpoint], options: MergeOptions, *, averages: bool) -> Alignment:
    """Line the inputs up with the newest, the last; MismatchError lists all that does not fit.

    averages: False if the one input is only written in another form. Raises FormatError for quantised
    tensors, which cannot be averaged, and for what a reader had to refuse; ArgumentError for a name
    pattern that fits nothing.
    """
    newest = inputs[-1]
    averaged = _averaged_names(inputs, options)
    _refuse_unreadable(inputs)
    held = [by_every_name(one) for one in inputs]
    if averages:
        refuse_quantised(inputs, held, averaged)
        _refuse_mismatches(inputs, held, averaged, options)
    statistics = _statistics(held)
    last = held[-1]
    vectors = {name for name in last if is_spectral_vector(name, last, last[name].shape)}
    means = averaged - statistics - vectors if averages else set()
    tensors = [
        _merged(tensor, held, options, averaged=name in averaged, mean=name in means)
        for name, tensor in newest.tensors.items()
    ]
    return Alignment(tuple(tensors), dict(newest.ties), averages, bool(statistics))


def by_every_name(checkpoint: Checkpoint) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint by every name that they have, aliases included."""
    if not checkpoint.ties:
        return checkpoint.tensors
    aliases = {alias: checkpoint.tensors[name] for alias, name in checkpoint.ties.items()}
    return {**checkpoint.tensors, **aliases}


def _merged(
    tensor: StoredTensor,
    held: Sequence[Mapping[str, StoredTensor]],
    options: MergeOptions,
    *,
    averaged: bool,
    mean: bool,
) -> MergedTensor:
    """held: the tensors of each input by name, the newest's last."""
    name, written = tensor.name, options.written_dtype
    dtype = written if written and tensor.dtype in FLOATS else tensor.dtype
    numbers = None
    if tensor.dtype in FLOATS and (averaged or dtype != tensor.dtype):
        numbers = (tensor.dtype, dtype)
    elif tensor.dtype in COMPLEX_PARTS and averaged:
        numbers = (COMPLEX_PARTS[tensor.dtype],) * 2
    mean = mean and numbers is not None
    sources = [one.get(name) if mean else None for one in held[:-1]]
    return MergedTensor(name, dtype, tensor.shape, numbers, mean, (*sources, tensor))


def _averaged_names(inputs: Sequence[Checkpoint], options: MergeOptions) -> set[str]:
    """The names that `include` and `exclude` leave; a tensor counts under its aliases too."""
    newest = inputs[-1]
    if not newest.tensors:
        raise FormatError(f"{newest.path} holds no tensors.")
    known = {name: [name] for name in newest.tensors}
    for alias, name in newest.ties.items():
        known[name].append(alias)
    everything = {name for one in inputs for name in (*one.tensors, *one.ties)}
    for what, patterns in (("include", options.include), ("exclude", options.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in everything):
                raise ArgumentError(
                    f"The {what} pattern {pattern!r} fits no tensor of {newest.path} or of the "
                    f"others; there are {', '.join(sorted(everything)[:8])}, ..."
                )
    kept = tensors_in(newest.extra)
    return {
        name
        for name, names in known.items()
        if name not in kept and not is_extra(name) and _is_wanted(names, options)
    }


def _is_wanted(names: Iterable[str], options: MergeOptions) -> bool:
    included = not options.include or _fits(names, options.include)
    return included and not _fits(names, options.exclude)


def _fits(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _statistics(held: Sequence[Mapping[str, StoredTensor]]) -> set[str]:
    """The names of BatchNorm's statistics: those with a counter beside them, or that differ.

    Without a counter (before torch 0.4.1, converted from elsewhere) they may be the constants of a frozen
    layer, which are equal in all of several inputs.
    """
    newest = held[-1]
    found = set()
    for name, tensor in newest.items():
        module, dot, last = name.rpartition(".")
        if last not in _STATISTICS or tensor.dtype not in FLOATS:
            continue
        counted = f"{module}{dot}num_batches_tracked" in newest
        others = [one[name] for one in held[:-1] if name in one]
        if counted or not others or not all(same_bytes(tensor, other) for other in others):
            found.add(name)
    return found


def _refuse_unreadable(inputs: Sequence[Checkpoint]) -> None:
    refused = [
        f"  {name} in {one.path}: {why}" for one in inputs for name, why in one.refused.items()
    ]
    if refused:
        raise FormatError("Some tensors cannot be read.\n" + "\n".join(sorted(refused)))


_CONVERT = " A checkpoint that differs in its dtype can be converted first: average it alone and pass dtype=float32."


def _refuse_mismatches(
    inputs: Sequence[Checkpoint],
    held: Sequence[Mapping[str, StoredTensor]],
    averaged: set[str],
    options: MergeOptions,
) -> None:
    newest, wanted = inputs[-1], held[-1]
    missing: list[str] = []
    unexpected: list[str] = []
    changed: dict[str, str] = {}
    retyped = False
    for other, found in zip(inputs[:-1], held, strict=False):
        where = f"(in {other.path})"
        missing += [
            f"{name} {where}"
            for name in averaged - found.keys()
            if newest.tensors[name].dtype in (*FLOATS, *COMPLEX_PARTS)
        ]
        unexpected += [
            f"{name} {where}"
            for name in other.tensors.keys() - wanted.keys() - tensors_in(other.extra)
            if not is_extra(name) and _is_wanted([name], options)
        ]
        for name, how in _differences(newest, other, found, averaged):
            changed[f"{name} {where}"] = how
            retyped |= name in found and found[name].dtype != newest.tensors[name].dtype
    if missing or unexpected or changed:
        raise MismatchError.of(
            f"The checkpoints do not line up with the newest, {newest.path}.",
            missing=missing,
            unexpected=unexpected,
            changed=changed,
            advice="Nothing was written. Give checkpoints of one model, or leave out what differs: "
            f"pass exclude= with name patterns, whose tensors are then the newest's.{_CONVERT if retyped else ''}",
        )


def _differences(
    newest: Checkpoint,
    other: Checkpoint,
    found: Mapping[str, StoredTensor],
    averaged: set[str],
) -> Iterator[tuple[str, str]]:
    """What is reshaped, retyped, or tied in one of the two only. found: the other's tensors by name."""
    for name in averaged & found.keys():
        ours, theirs = newest.tensors[name], found[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            yield name, f"{_described(theirs)}; expected {_described(ours)}"
    for alias, name in other.ties.items():
        if {alias, name} <= newest.tensors.keys() and {alias, name} & averaged:
            yield alias, f"tied to {name} here, separate in the newest"
    for alias, name in newest.ties.items():
        if alias in other.tensors and found.get(name) is not other.tensors[alias]:
            yield alias, f"separate here, tied to {name} in the newest"


def _described(tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
