r"""Which tensors of several checkpoints line up, and what happens to each: mean, newest, refused.

LoRA adapters are averaged as adapters where that means something, and refused otherwise. A LoRA layer
adds $B A$ to a weight. The mean of $B_i A_i$ is not the mean of $B_i$ times the mean of $A_i$; the two
agree only where the adapters differ little, which is so along one run, and not between runs: those
begin from independent random $A$.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.reading.extra_state import is_extra, tensors_in
from polyak.checkpoints.reading.stored import (
    COMPLEX_PARTS,
    FLOATS,
    NARROW_FLOATS,
    TORCH_DTYPES,
    Checkpoint,
    StoredTensor,
)
from polyak.checkpoints.reading.untrusted_json import parse_json
from polyak.checkpoints.writing.layouts import TensorSpec
from polyak.errors import ArgumentError, FormatError, MismatchError

_STATISTICS = ("running_mean", "running_var")
# What quantisation libraries (GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8) store beside or
# instead of weights: integers and scales that only mean something together.
_QUANTISED = {
    "qweight", "qzeros", "absmax", "quant_map", "nested_absmax", "SCB", "weight_packed",
    "weight_scale", "weight_scale_inv", "weight_zero_point", "scale_weight",
}  # fmt: skip


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

    averages: whether the output differs from a copy of the newest.
    """

    tensors: tuple[MergedTensor, ...]
    ties: dict[str, str]
    averages: bool

    @property
    def has_statistics(self) -> bool:
        """Whether BatchNorm statistics are among them."""
        names = {tensor.name for tensor in self.tensors}
        return any(_is_statistic(name, names) for name in names)


def align(inputs: Sequence[Checkpoint], options: MergeOptions, *, averages: bool) -> Alignment:
    """Line the inputs up with the newest, the last; MismatchError lists all that does not fit.

    averages: False if the one input is only written in another form. Raises FormatError for quantised
    tensors, which cannot be averaged, and for what a reader had to refuse; ArgumentError for a name
    pattern that fits nothing.
    """
    newest = inputs[-1]
    averaged = _averaged_names(inputs, options)
    _refuse_unreadable(inputs)
    held = [_held(one) for one in inputs]
    if averages:
        _refuse_quantised(newest, averaged)
        _refuse_mismatches(inputs, held, averaged, options)
    means = {name for name in averaged if averages and not _is_statistic(name, newest.tensors)}
    tensors = [
        _merged(tensor, held, options, averaged=name in averaged, mean=name in means)
        for name, tensor in newest.tensors.items()
    ]
    return Alignment(tuple(tensors), dict(newest.ties), averages)


def _held(checkpoint: Checkpoint) -> Mapping[str, StoredTensor]:
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


def _is_statistic(name: str, names: Container[str]) -> bool:
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
    inputs: Sequence[Checkpoint],
    held: Sequence[Mapping[str, StoredTensor]],
    averaged: set[str],
    options: MergeOptions,
) -> None:
    newest, wanted = inputs[-1], held[-1]
    missing: list[str] = []
    unexpected: list[str] = []
    changed: dict[str, str] = {}
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
    if missing or unexpected or changed:
        raise MismatchError.of(
            f"The checkpoints do not line up with the newest, {newest.path}.",
            missing=missing,
            unexpected=unexpected,
            changed=changed,
            advice="Nothing was written. Give checkpoints of one model, or leave out what differs: "
            "pass exclude= with name patterns, whose tensors are then the newest's.",
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


CONFIG = "adapter_config.json"
LEAST_COSINE = 0.5
"""Between A matrices. Independent ones have 1 / sqrt(size) or so, those of one run nearly 1."""

_COSMETIC = {"inference_mode", "revision", "auto_mapping", "peft_version", "task_type"}
_FIRST_VALUES = 1 << 20


def check_adapters(inputs: Sequence[Checkpoint]) -> None:
    """Raise MismatchError if adapters are configured differently or come from different runs."""
    if len(inputs) < 2:
        return
    configs = [_config(one) for one in inputs]
    present = [config for config in configs if config is not None]
    if present and len(present) < len(configs):
        without = [one.path for one, c in zip(inputs, configs, strict=True) if c is None]
        raise MismatchError(
            f"Adapters and full models cannot be averaged together; {', '.join(without)} has no "
            f"{CONFIG}. Merge the adapter into its base first."
        )
    for one, config in zip(inputs, present, strict=False):
        _compare(one, config, inputs[-1], present[-1])
    newest = inputs[-1]
    for name in [
        name for name in newest.tensors if ".lora_A." in name or ".lora_embedding_A" in name
    ]:
        for other in inputs[:-1]:
            _check_same_run(name, other, newest)


def _config(one: Checkpoint) -> dict[str, Any] | None:
    if "://" in one.path:
        return None
    path = Path(one.path)
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file() or not any(".lora_" in name for name in one.tensors):
        return None
    return parse_json(file.read_bytes(), str(file))


def _compare(
    one: Checkpoint, config: dict[str, Any], newest: Checkpoint, other: dict[str, Any]
) -> None:
    different = {
        key: f"{_sorted(config.get(key))} in {one.path}, {_sorted(other.get(key))} in {newest.path}"
        for key in (config.keys() | other.keys()) - _COSMETIC
        if _sorted(config.get(key)) != _sorted(other.get(key))
    }
    if different:
        raise MismatchError.of(
            f"The adapters are configured differently ({CONFIG}), so their A and B mean different things.",
            changed=different,
            advice="Merge each into its base (peft: merge_and_unload) and average the full models.",
        )


def _check_same_run(name: str, other: Checkpoint, newest: Checkpoint) -> None:
    theirs = other.tensors.get(other.ties.get(name, name))
    if theirs is None or theirs.shape != newest.tensors[name].shape or theirs.dtype not in FLOATS:
        return  # `align` reports it, with everything else that does not line up
    cosine = _cosine(theirs, newest.tensors[name])
    if cosine < LEAST_COSINE:
        raise MismatchError(
            f"{other.path} and {newest.path} are adapters of separate runs: the cosine between their "
            f"{name} is {cosine:.2f} (at least {LEAST_COSINE} within a run). Averaging A and B separately is "
            "then not averaging B A. Merge each into its base (peft: merge_and_unload) and average those."
        )


def _cosine(a: StoredTensor, b: StoredTensor) -> float:
    """Between the first million values; 1 where one of them is all zero."""
    x, y = _values(a), _values(b)
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms else 1.0


def _values(tensor: StoredTensor) -> torch.Tensor:
    dtype = TORCH_DTYPES[tensor.dtype]
    raw = bytearray(min(tensor.nbytes, _FIRST_VALUES * dtype.itemsize))
    tensor.read_into(0, memoryview(raw))
    return torch.frombuffer(raw, dtype=dtype).double() if raw else torch.zeros(1).double()


def _sorted(value: Any) -> Any:
    """Lists of names in one order: PEFT writes sets, whose order changes from save to save."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value
