r"""Adapters (LoRA and its kin): averaged as adapters where that means something, refused otherwise.

A LoRA layer adds $B A$ to a weight. The mean of $B_i A_i$ is not the mean of $B_i$ times the mean of
$A_i$; the two agree only where one of the factors differs little, which is so along one run, and not
between runs: those begin from independent random factors. So does every other product: LoHa's,
LoKr's, AdaLoRA's. Factors are known by their names, or by what they are.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from polyak.checkpoints.reading.stored import FLOATS, TORCH_DTYPES, Checkpoint, StoredTensor
from polyak.checkpoints.reading.untrusted_json import parse_json
from polyak.errors import MismatchError

CONFIG = "adapter_config.json"
LEAST_COSINE = 0.5
"""Between equal factors. Independent ones have 1 / sqrt(size) or so, those of one run nearly 1."""

_COSMETIC = {"inference_mode", "revision", "auto_mapping", "peft_version", "task_type"}
_FIRST_VALUES = 1 << 20
_WORDS = ("lora", "lokr", "loha", "hada_", "vera_", "low_rank", "lowrank", "adapter")
_OF_ANY_RANK = re.compile(r"lora|loha|hada_|vera_", re.IGNORECASE)
# Random at the start of a run, and changed little by it: alone enough to tell two runs apart.
_RANDOM = re.compile(
    r"(^|[._])lora_A([._]|$)|(^|[._])lora_down[._]|(^|[._])lora(_linear_layer)?\.down\."
)
_KRONECKER = re.compile(r"(?<=lokr_)(w[12](_[ab])?|t2)")
_MOST_IN_ONE_SITE = 8


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
    products = [*factors(newest.tensors)]
    for other in inputs[:-1]:
        for product in products:
            _check_same_run(product, other, newest)


def _config(one: Checkpoint) -> dict[str, Any] | None:
    if "://" in one.path:
        return None
    path = Path(one.path)
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file() or not _says_adapter("\n".join(one.tensors)):
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


def _sorted(value: Any) -> Any:
    """Lists of names in one order: PEFT writes sets, whose order changes from save to save."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value


def factors(tensors: Mapping[str, StoredTensor]) -> Iterator[list[StoredTensor]]:
    """The factors of each product that an adapter adds to a weight.

    Two matrices (r x n and m x r, with r much smaller) whose names differ in one part are one, if
    their names say so, or the file holds nothing but such matrices, or the m x n weight is beside them.
    """
    matrices = {n: t for n, t in tensors.items() if len(t.shape) >= 2 and t.dtype in FLOATS}
    if _says_adapter("\n".join(matrices)):  # one look at all names: most models have none
        yield from _named_factors({n: t for n, t in matrices.items() if _says_adapter(n)})
    if all(len(tensor.shape) != 1 for tensor in tensors.values()):
        pairs = [*_pairs(matrices)]
        if {t.name for pair in pairs for t in pair} == matrices.keys():
            yield from pairs
    yield from _beside_their_weight(matrices)


def _says_adapter(text: str) -> bool:
    lowered = text.lower()
    return any(word in lowered for word in _WORDS)


def _named_factors(named: Mapping[str, StoredTensor]) -> Iterator[list[StoredTensor]]:
    kronecker = defaultdict(list)
    for name, tensor in named.items():
        if "lokr_" in name:
            kronecker[_KRONECKER.sub("", name)].append(tensor)
        elif _RANDOM.search(name):
            yield [tensor]
    yield from (group for group in kronecker.values() if len(group) > 1)
    yield from _pairs(named)
    yield from _pairs({n: t for n, t in named.items() if _OF_ANY_RANK.search(n)}, any_rank=True)


def _pairs(
    matrices: Mapping[str, StoredTensor], *, any_rank: bool = False
) -> Iterator[list[StoredTensor]]:
    """Matrices that can be multiplied and whose names differ in one part that is no number."""
    sites = defaultdict(list)
    for name, tensor in matrices.items():
        parts = re.findall(r"[A-Za-z]+|\d+", name)
        for i, part in enumerate(parts):
            if not part.isdigit():  # layers have numbers; the two of a pair have names
                sites[*parts[:i], "", *parts[i + 1 :]].append(tensor)
    for members in sites.values():
        if len(members) <= _MOST_IN_ONE_SITE:
            for down, up in permutations(members, 2):
                if _product_shape(down, up, any_rank=any_rank):
                    yield [down, up]


def _beside_their_weight(matrices: Mapping[str, StoredTensor]) -> Iterator[list[StoredTensor]]:
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in matrices.items():
        modules[name.rpartition(".")[0]][name] = tensor
    for module in modules.values():
        if 3 <= len(module) <= _MOST_IN_ONE_SITE:
            shapes = {tensor.shape for tensor in module.values()}
            yield from (pair for pair in _pairs(module) if _product_shape(*pair) in shapes)


def _product_shape(
    down: StoredTensor, up: StoredTensor, *, any_rank: bool = False
) -> tuple[int, ...] | None:
    """The shape of up @ down; None if there is none, or the rank is not at most half of either side."""
    rank, *inner = down.shape
    outer, columns, *rest = up.shape
    if rank != columns or any(size != 1 for size in rest) or not rank:
        return None
    fits = any_rank or 2 * rank <= min(outer, math.prod(inner))
    return (outer, *inner) if fits else None


def _check_same_run(product: Sequence[StoredTensor], other: Checkpoint, newest: Checkpoint) -> None:
    """A product is not the product of means if two of its factors point elsewhere in the other."""
    cosines: dict[str, float] = {}
    for ours in product:
        theirs = other.tensors.get(other.ties.get(ours.name, ours.name))
        if theirs is None or theirs.shape != ours.shape or theirs.dtype not in FLOATS:
            return  # `align` reports it, with everything else that does not line up
        cosine = _cosine(theirs, ours)
        if cosine < LEAST_COSINE:
            cosines[ours.name] = cosine
        if len(cosines) == min(2, len(product)):
            break
    else:
        return
    found = " and ".join(f"{name} is {cosine:.2f}" for name, cosine in cosines.items())
    raise MismatchError(
        f"{other.path} and {newest.path} are adapters of separate runs: the cosine between their "
        f"{found} (at least {LEAST_COSINE} within a run). Averaging A and B separately is then not "
        "averaging B A. Merge the products: polyak merge-adapters, for LoRA of PEFT; or merge each into its "
        "base (peft: merge_and_unload) and average those."
    )


def _cosine(a: StoredTensor, b: StoredTensor) -> float:
    """Between the first million values; 1 where both of them are all zero, 0 where one is."""
    x, y = _values(a), _values(b)
    norms = float(x.norm()), float(y.norm())
    if not all(norms):
        return float(not any(norms))
    return float(x @ y) / (norms[0] * norms[1])


def _values(tensor: StoredTensor) -> torch.Tensor:
    dtype = TORCH_DTYPES[tensor.dtype]
    raw = bytearray(min(tensor.nbytes, _FIRST_VALUES * dtype.itemsize))
    tensor.read_into(0, memoryview(raw))
    return torch.frombuffer(raw, dtype=dtype).double() if raw else torch.zeros(1).double()
