r"""LoRA adapters of separate runs, merged as what they add to the weights.

An adapter adds $s\, B A$ to a weight, with $s$ of its configuration. The weighted sum of these products is
itself a product, $[c_1 s_1 B_1, c_2 s_2 B_2, ...]\, [A_1; A_2; ...]$, of the sum of the ranks. Its singular value
decomposition, of two small factors and never of the m x n matrix, gives the best one of any smaller rank.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints.merging.adapters import CONFIG
from polyak.checkpoints.merging.align import by_every_name
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.stored import (
    FLOATS,
    TORCH_DTYPES,
    Checkpoint,
    StoredTensor,
    itemsize,
)
from polyak.checkpoints.reading.untrusted_json import parse_json
from polyak.checkpoints.writing.layouts import OutputFile, SafetensorsLayout, TensorSpec
from polyak.checkpoints.writing.save import bytes_on_host, file_metadata
from polyak.errors import ArgumentError, FormatError, MismatchError, NonFiniteError, require
from polyak.files import as_path, refuse_existing, replacing, replacing_folder
from polyak.maths.arguments import at_least_one, number

PathLike = str | os.PathLike[str]
_A = re.compile(r"^(?P<module>.*)\.lora_(?P<kind>embedding_)?A(?P<end>(\.weight)?)$")
_B = re.compile(r"\.lora_(embedding_)?B((?:\.weight)?)$")
_MAGNITUDE = "lora_magnitude_vector"
_FILE = "adapter_model.safetensors"
_STARTS_FROM_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
# What may differ between adapters: it is merged, or says nothing about what is added to a weight.
_MERGED = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "lora_dropout",
    "init_lora_weights", "inference_mode", "revision", "auto_mapping", "fan_in_fan_out", "peft_version", "task_type", "eva_config",
}  # fmt: skip


@dataclass(frozen=True)
class MergedAdapters:
    """What `merge_adapters` wrote.

    rank: of every module. relative_error: the norm of what was cut off, over that of the exact sum, of
    all modules together. worst: the module that lost most, and how much. modules: how many there are.
    """

    output: Path
    rank: int
    relative_error: float
    worst: tuple[str, float]
    modules: int


@dataclass(frozen=True)
class _Adapter:
    """One input: what it holds, its configuration, and its weight in the sum."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    share: float

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Its tensors by every name that they have: two layers may share one."""
        return by_every_name(self.checkpoint)

    def tensor(self, name: str) -> Tensor | None:
        found = self.tensors.get(name)
        values = None if found is None else found.load().double()
        if values is not None and not bool(values.isfinite().all()):
            raise NonFiniteError(
                f"{name} of {self.checkpoint.path} is not finite. Leave this adapter out."
            )
        return values

    def scale(self, module: str, rank: int) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        alpha = self.of_module(module, "lora_alpha", "alpha_pattern")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def of_module(self, module: str, field: str, pattern: str) -> float:
        """What the configuration gives for a module: the first pattern that fits its name, or the field."""
        patterns = self.config.get(pattern) or {}
        key = next((one for one in patterns if re.match(rf"(.*\.)?({one})$", module)), None)
        return float(self.config.get(field, 8) if key is None else patterns[key])


def merge_adapters(
    inputs: Iterable[PathLike],
    output: PathLike,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base: PathLike | None = None,
    overwrite: bool = False,
) -> MergedAdapters:
    r"""Merge LoRA adapters, of separate runs too: the result adds $\sum_i c_i\, s_i B_i A_i$ to each weight.

    The factors are balanced ($A = \sqrt{S}\, V^\top$, $B = U \sqrt{S}$ of the SVD), the scale is 1. A module that an
    adapter does not have counts as zero there. What is no factor (`modules_to_save`, biases) is averaged with
    the same weights. Everything is computed in float64, one module at a time.

    With DoRA a weight $W$ becomes $W' = m\, (W + s B A) / |W + s B A|$, row by row. The result is the sum
    $\sum_i c_i W'_i$ exactly, whose rows have norms $m$ and directions that are again $W$ plus a product; the
    norms need the weights of the `base`.

    Args:
        inputs: Folders that PEFT wrote (`adapter_config.json` beside the weights), of LoRA, rsLoRA or DoRA, with
            any ranks and alphas.
        output: A folder that `PeftModel.from_pretrained` loads.
        weights: $c_i$, one per input; $1/N$ by default. They need not sum to 1.
        rank: Of the result, in every module; by default what is exact, the largest sum of ranks.
        base: The model that the adapters belong to; needed with DoRA alone.
        overwrite: Replace `output`.

    Raises:
        ArgumentError: no input, weights that do not fit, a rank below 1, DoRA without `base`.
        FormatError: an input that is no LoRA adapter of PEFT, or whose start changed the base (PiSSA, OLoRA).
        MismatchError: adapters that do not belong to one model, are of different kinds, or are not whole.
        NonFiniteError: a NaN or an infinity in an adapter.
        OutputError: `output` exists, or cannot be written.

    Source: Hu et al. 2021, arXiv 2106.09685 (LoRA); Kalajdzievski 2023, arXiv 2312.03732 (rsLoRA);
    Liu et al. 2024, arXiv 2402.09353 (DoRA); Eckart and Young 1936.

    """
    target = as_path(output)
    require(
        not isinstance(inputs, str | os.PathLike),
        "inputs is one path; expected a list of adapters.",
    )
    paths = [as_path(path) for path in inputs]
    require(bool(paths), "There is nothing to merge: no adapter was given.")
    shares = _weights(weights, len(paths))
    if rank is not None:
        at_least_one("rank", rank)
    refuse_existing(target, overwrite=overwrite)
    with ExitStack() as stack:
        adapters = [_opened(*one, stack) for one in zip(paths, shares, strict=True)]
        _refuse_unlike(adapters)
        model = None if base is None else stack.enter_context(open_checkpoint(base))
        return _merge(adapters, target, rank, model, overwrite=overwrite)


def _merge(
    adapters: Sequence[_Adapter],
    target: Path,
    rank: int | None,
    base: Checkpoint | None,
    *,
    overwrite: bool,
) -> MergedAdapters:
    modules = _modules(adapters)
    ranks = [_exact_rank(adapters, a) for a in modules]
    width = max(ranks) if rank is None else rank
    names = {name: None for one in adapters for name in one.tensors}
    specs = [TensorSpec(*_described(adapters, name, modules, width)) for name in names]
    metadata = file_metadata({}, {})
    specs.sort(key=lambda spec: -itemsize(spec.dtype))
    layout = SafetensorsLayout(specs, metadata, {})
    offsets = dict(zip((spec.name for spec in specs), layout.offsets, strict=True))
    dtypes = {spec.name: TORCH_DTYPES[spec.dtype] for spec in specs}
    lost: dict[str, tuple[float, float]] = {}
    with replacing_folder(target, overwrite=overwrite) as folder:
        with closing(OutputFile(folder / _FILE, layout.size)) as file:
            layout.begin(file)
            for name, value in _results(adapters, modules, names, width, base, lost):
                file.write(offsets[name], bytes_on_host(value.to(dtypes[name])))
            layout.finish(file, metadata)
        text = json.dumps(_config(adapters, width), indent=2)
        with replacing(folder / CONFIG) as part:
            part.write_text(text + "\n", encoding="utf-8")
    cut = math.fsum(tail for tail, _ in lost.values())
    whole = math.fsum(total for _, total in lost.values())
    each = {name: math.sqrt(tail / total) if total else 0.0 for name, (tail, total) in lost.items()}
    worst = max(each.items(), key=lambda item: item[1])
    return MergedAdapters(target, width, math.sqrt(cut / whole) if whole else 0.0, worst, len(lost))


def _results(
    adapters: Sequence[_Adapter],
    modules: Mapping[str, tuple[str, str]],
    names: Iterable[str],
    width: int,
    base: Checkpoint | None,
    lost: dict[str, tuple[float, float]],
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result, factors first; what is cut off each module goes into `lost`."""
    done: set[str] = set()
    for a_name, (b_name, module) in modules.items():
        pieces = [*_products(adapters, a_name, b_name, module)]
        magnitude = f"{module}.{_MAGNITUDE}"
        if magnitude in names:
            pieces, merged = _directions(adapters, pieces, module, magnitude, base)
            yield magnitude, merged
        shape = next(a.shape[1:] for _, a, _ in pieces)
        down = torch.cat([a.flatten(1) for _, a, _ in pieces])
        up = torch.cat([b.flatten(1) for _, _, b in pieces], 1)
        a, b, lost[module] = _factored(down, up, width)
        yield a_name, a.reshape(width, *shape)
        yield b_name, b.reshape(len(b), width, *[1] * (len(pieces[0][2].shape) - 2))
        done |= {a_name, b_name, magnitude}
    for name in names:
        if name.endswith("lora_B.bias"):  # it is multiplied by the scale too, which becomes 1
            module = name.removesuffix(".lora_B.bias")
            yield name, _mean_of_biases(adapters, name, module)
        elif name not in done:
            yield name, _whole(adapters, name)


def _whole(adapters: Sequence[_Adapter], name: str) -> Tensor:
    """The mean of what is no factor; the base's, of which PEFT saves a copy beside embeddings, as it is."""
    values = [one.tensor(name) for one in adapters]
    held = [value for value in values if value is not None]
    if name.endswith(".base_layer.weight") and all(held[0].equal(one) for one in held):
        return held[0]
    total = math.fsum(one.share for one in adapters)
    if len(held) < len(values) or abs(total - 1) > 1e-6:
        raise MismatchError(
            f"{name} is a whole tensor and no difference to one, so its weights must sum to 1 (found "
            f"{total:.6g}) and every adapter must have it."
        )
    return _sum(adapters, held)


def _factored(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The best A and B of this rank for up @ down, and the squared norms of the rest and of the whole."""
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    a = down.new_zeros(rank, down.shape[1])
    b = up.new_zeros(len(up), rank)
    a[:kept] = root[:, None] * (v[:kept] @ right.Q.T)
    b[:, :kept] = (left.Q @ u[:, :kept]) * root
    return a, b, (float(s[kept:].square().sum()), float(s.square().sum()))


def _products(
    adapters: Sequence[_Adapter], a_name: str, b_name: str, module: str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(adapter, A, c s B) of those that have the module."""
    for index, one in enumerate(adapters):
        a, b = one.tensor(a_name), one.tensor(b_name)
        if a is not None and b is not None and one.share:
            yield index, a, b * (one.share * one.scale(_plain(module), len(a)))


def _directions(
    adapters: Sequence[_Adapter],
    pieces: Sequence[tuple[int, Tensor, Tensor]],
    module: str,
    name: str,
    base: Checkpoint | None,
) -> tuple[list[tuple[int, Tensor, Tensor]], Tensor]:
    r"""DoRA: the products whose sum gives the direction of the merged rows, and the rows' norms.

    With $g_i = m_i / |W + D_i|$ per row the merged weight is $\sum_i c_i g_i (W + D_i)$, which is the row
    factor $G = \sum_i c_i g_i$ times $W + \sum_i (c_i g_i / G) D_i$.
    """
    weight = _base_weight(base, module, name)
    if weight.shape != (len(pieces[0][2]), pieces[0][1].shape[1]) or adapters[0].config.get(
        "fan_in_fan_out"
    ):
        weight = weight.T  # Conv1D of GPT-2
    deltas = {i: (b @ a) / adapters[i].share for i, a, b in pieces}
    rows = torch.empty(len(adapters), len(weight), dtype=torch.float64)
    for index, one in enumerate(adapters):
        magnitude = one.tensor(name)
        norms = (weight + deltas.get(index, 0)).norm(dim=1)
        rows[index] = one.share * (1.0 if magnitude is None else magnitude.flatten() / norms)
    whole = rows.sum(0)
    require(
        bool((whole.abs() > 0).all()),
        f"The weights cancel out in {module}; DoRA has no direction there.",
    )
    scaled = [(i, a, b * (rows[i] / whole / adapters[i].share)[:, None]) for i, a, b in pieces]
    merged = whole[:, None] * (weight + sum(b @ a for _, a, b in scaled))
    return scaled, merged.norm(dim=1) * whole.sign()


def _base_weight(base: Checkpoint | None, module: str, name: str) -> Tensor:
    if base is None:
        raise ArgumentError(
            f"{name} is of DoRA, whose merged norms depend on the weights of the model. Pass base=PATH."
        )
    known = f"{_plain(module)}.weight"
    found = base.tensors.get(base.ties.get(known, known))
    if found is None or len(found.shape) != 2 or found.dtype not in FLOATS:
        raise MismatchError(
            f"{base.path} has no matrix {known}, to which the adapter's {module} belongs. Pass the model that "
            "the adapters were trained on; DoRA of convolutions and embeddings is not merged."
        )
    return found.load().double()


def _mean_of_biases(adapters: Sequence[_Adapter], name: str, module: str) -> Tensor:
    total = None
    for one in adapters:
        a, value = one.tensors.get(f"{module}.lora_A.weight"), one.tensor(name)
        if a is not None and value is not None:
            value = value * (one.share * one.scale(_plain(module), a.shape[0]))
            total = value if total is None else total + value
    return torch.zeros(()) if total is None else total


def _sum(adapters: Sequence[_Adapter], values: Sequence[Tensor]) -> Tensor:
    terms = [one.share * value for one, value in zip(adapters, values, strict=True)]
    return torch.stack(terms).sum(0)


def _modules(adapters: Sequence[_Adapter]) -> dict[str, tuple[str, str]]:
    """A's name -> (B's name, module) of all adapters; MismatchError where the two do not multiply."""
    found = {}
    for one in adapters:
        for name in one.tensors:
            if match := _A.match(name):
                b_name = f"{match['module']}.lora_{match['kind'] or ''}B{match['end']}"
                found[name] = (b_name, match["module"])
                _check_pair(one, name, b_name, match["module"])
            elif _B.search(name) and _B.sub(r".lora_\1A\2", name) not in one.tensors:
                raise MismatchError(
                    f"{name} of {one.checkpoint.path} has no lora_A beside it: the file is not whole. Save "
                    "the adapter again."
                )
    if not found:
        raise FormatError(f"{adapters[0].checkpoint.path} holds no lora_A: it is no LoRA adapter.")
    return found


def _check_pair(one: _Adapter, a_name: str, b_name: str, module: str) -> None:
    a, b = one.tensors[a_name], one.tensors.get(b_name)
    pointwise = b is not None and all(size == 1 for size in b.shape[2:])
    if b is None or len(b.shape) < 2 or not pointwise or a.shape[0] != b.shape[1]:
        found = "nothing" if b is None else f"the shape {b.shape}"
        raise MismatchError(
            f"{a_name} of {one.checkpoint.path} has the shape {a.shape}, and {b_name} has {found}: they are no "
            "product. LoRA of grouped convolutions is not merged."
        )
    rank = one.of_module(_plain(module), "r", "rank_pattern")
    if a.shape[0] != rank:
        raise MismatchError(
            f"{a_name} of {one.checkpoint.path} has {a.shape[0]} rows; expected {rank:g}, the rank that "
            f"{CONFIG} gives. LoRA of the experts in one parameter (target_parameters) is not merged."
        )


def _exact_rank(adapters: Sequence[_Adapter], a_name: str) -> int:
    found = [one.tensors.get(a_name) for one in adapters]
    return sum(tensor.shape[0] for tensor in found if tensor is not None)


def _described(
    adapters: Sequence[_Adapter], name: str, modules: Mapping[str, tuple[str, str]], width: int
) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and shape in the result; MismatchError where those of the inputs differ."""
    found = [one.tensors[name] for one in adapters if name in one.tensors]
    at = 0 if name in modules else 1 if name in {b for b, _ in modules.values()} else None
    shapes = {tuple(width if i == at else n for i, n in enumerate(one.shape)) for one in found}
    if len(shapes) > 1:
        raise MismatchError(
            f"{name} has different shapes in the adapters ({sorted(shapes)}, whatever the rank): they are of "
            "different models."
        )
    if found[-1].dtype not in FLOATS:
        raise FormatError(
            f"{name} holds {found[-1].dtype}, which is no floating dtype: it is not merged."
        )
    return name, found[-1].dtype, shapes.pop()


def _opened(path: Path, share: float, stack: ExitStack) -> _Adapter:
    file = path / CONFIG
    if not file.is_file():
        raise FormatError(
            f"{path} has no {CONFIG}; expected a folder of an adapter that PEFT wrote."
        )
    config = parse_json(file.read_bytes(), str(file))
    start = config.get("init_lora_weights", True)
    if config.get("peft_type") != "LORA":
        raise FormatError(
            f"{file} is of {config.get('peft_type')}; only LORA adapters are merged as products."
        )
    if start not in _STARTS_FROM_BASE:
        raise FormatError(
            f"{path} began with init_lora_weights={start!r}, which changes the weights of the base. Let PEFT "
            "convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    _check_numbers(config, file)
    checkpoint = stack.enter_context(open_checkpoint(path))
    if not checkpoint.tensors:
        raise FormatError(f"{path} holds no tensors. Save the adapter again.")
    return _Adapter(checkpoint, config, share)


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """FormatError unless ranks and alphas are numbers, and patterns give them for regular expressions."""
    for field, pattern, least in (("r", "rank_pattern", 1), ("lora_alpha", "alpha_pattern", None)):
        patterns = config.get(pattern) or {}
        given = [config.get(field, 8), *(patterns.values() if isinstance(patterns, dict) else "?")]
        if any(
            isinstance(one, bool) or not isinstance(one, int | float) or (least and one < least)
            for one in given
        ):
            raise FormatError(
                f"{file}: {field} is {config.get(field)!r} and {pattern} is {patterns!r}; expected a number, "
                "and such numbers by module (ranks from 1 on). Save the adapter again."
            )
        for key in patterns:
            try:
                re.compile(key)
            except re.error as error:
                raise FormatError(
                    f"{file}: {pattern} has the key {key!r}, which is no regular expression ({error})."
                ) from None


def _refuse_unlike(adapters: Sequence[_Adapter]) -> None:
    """MismatchError where what configurations say of the model or of the kind of adapter differs."""
    first = adapters[0]
    for one in adapters[1:]:
        different = {
            key: f"{first.config.get(key)} in {first.checkpoint.path}, {one.config.get(key)} in {one.checkpoint.path}"
            for key in (first.config.keys() | one.config.keys()) - _MERGED
            if (first.config.get(key) or None) != (one.config.get(key) or None)
        }
        if different:
            raise MismatchError.of(
                "The adapters are not of one model and one kind.",
                changed=different,
                advice="Merge each into its base (peft: merge_and_unload) and average the full models.",
            )


def _config(adapters: Sequence[_Adapter], width: int) -> dict[str, Any]:
    """The last input's, with the merged rank and a scale of 1, and the modules of all."""
    targets = [one.config.get("target_modules") for one in adapters]
    if all(isinstance(one, list) for one in targets):
        target: Any = sorted({name for one in targets for name in one or ()})
    elif all(one == targets[0] for one in targets):
        target = targets[0]
    else:
        raise MismatchError(
            f"The adapters have different target_modules, not all of them lists: {targets}. Merge each into "
            "its base (peft: merge_and_unload) and average the full models."
        )
    return {
        **adapters[-1].config,
        "r": width,
        "lora_alpha": width,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "target_modules": target,
    }


def _weights(weights: Sequence[float] | None, inputs: int) -> list[float]:
    if weights is None:
        return [1 / inputs] * inputs
    found = [number("weights", weight) for weight in weights]
    require(
        len(found) == inputs, f"{len(found)} weights for {inputs} adapters; one each is needed."
    )
    require(
        all(map(math.isfinite, found)) and any(found),
        f"weights are {found}; expected finite numbers, not all zero.",
    )
    return found


def _plain(module: str) -> str:
    """The module's name in the model that PEFT wraps."""
    return module.removeprefix("base_model.model.")
