"""Inputs for `merge.py`: checkpoints of a Llama in bfloat16, as safetensors, torch archives and DCP."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, WORDS = 1536, 6144, 8192
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_attention_heads": 12, "num_key_value_heads": 12,
    "vocab_size": WORDS, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a Llama with this many layers."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "lm_head.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            found[f"{layer}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name, shape in {
            "gate": (INNER, HIDDEN),
            "up": (INNER, HIDDEN),
            "down": (HIDDEN, INNER),
        }.items():
            found[f"{layer}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (HIDDEN,)
    return found


def make_inputs(folder: Path, count: int, gigabytes: float, kind: str) -> int:
    """`step-<n>` as `safetensors`, `pt` or `dcp`; how many layers come closest to the size."""
    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    layers = max(1, round((gigabytes * 1e9 - 4 * WORDS * HIDDEN) / per_layer))
    for step in range(1, count + 1):
        generator = torch.Generator().manual_seed(step)
        state = {
            name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
            for name, shape in shapes(layers).items()
        }
        if kind == "safetensors":
            save_file(state, folder / f"step-{step}.safetensors", {"format": "pt"})
        elif kind == "pt":
            torch.save(state, folder / f"step-{step}.pt")
        else:
            _save_dcp(state, folder / f"step-{step}-dcp")
    return layers


def _save_dcp(state: dict[str, torch.Tensor], folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)


def remove_inputs(folder: Path, kind: str) -> None:
    """Remove what `make_inputs` made, except the safetensors files that all are compared with."""
    for path in folder.glob({"pt": "step-*.pt", "dcp": "step-*-dcp"}.get(kind, "none")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def holes(folder: Path, count: int, gigabytes: float) -> Path:
    """Files of zeros that take no room on the disk."""
    folder.mkdir()
    rows = int(gigabytes * 1e9) // 2 // 4096
    size = rows * 4096 * 2
    entry = {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, size]}
    header = json.dumps({"weight": entry}).encode()
    for step in range(1, count + 1):
        with (folder / f"step-{step}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
    return folder
