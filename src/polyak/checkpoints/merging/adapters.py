r"""LoRA adapters: averaged as adapters where that means something, refused with the reason else.

A LoRA layer adds $B A$ to a weight. The mean of $B_i A_i$ is not the mean of $B_i$ times the mean of
$A_i$; the two agree only where the adapters differ little, which is so along one run, and not
between runs: those begin from independent random $A$.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from polyak.checkpoints.reading.dtypes import FLOATS, TORCH_DTYPES
from polyak.checkpoints.reading.jsons import parse_json
from polyak.checkpoints.reading.layout import Checkpoint, StoredTensor
from polyak.errors import MismatchError

CONFIG = "adapter_config.json"
LEAST_COSINE = 0.5
"""Between A matrices. Independent ones have 1 / sqrt(size) or so, those of one run nearly 1."""

_COSMETIC = {"inference_mode", "revision", "auto_mapping", "peft_version", "task_type"}
_FIRST_VALUES = 1 << 20


def check_adapters(inputs: Sequence[Checkpoint]) -> None:
    """Raise MismatchError where adapters have different configurations or come from different runs."""
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
            f"The adapters are configured differently ({CONFIG}), so their A and B do not mean the same.",
            changed=different,
            advice="Merge each into its base (peft: merge_and_unload) and average the full models.",
        )


def _check_same_run(name: str, other: Checkpoint, newest: Checkpoint) -> None:
    theirs = other.tensors.get(other.ties.get(name, name))
    if theirs is None or theirs.shape != newest.tensors[name].shape or theirs.dtype not in FLOATS:
        return  # told, with all else that does not line up, by `align`
    cosine = _cosine(theirs, newest.tensors[name])
    if cosine < LEAST_COSINE:
        raise MismatchError(
            f"{other.path} and {newest.path} are adapters of separate runs: the cosine between their "
            f"{name} is {cosine:.2f} (at least {LEAST_COSINE} within a run). Averaging A and B separately is not "
            "averaging B A there. Merge each into its base (peft: merge_and_unload) and average those."
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
