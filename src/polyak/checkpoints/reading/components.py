"""Folders of several models: pipelines of diffusers, modules of sentence-transformers, named adapters.

Together they are one checkpoint: the tensors of `unet/` are named `unet/conv_in.weight`, so that each
model lines up with itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import closing
from pathlib import PurePosixPath
from typing import Any

from polyak.checkpoints.reading.extra_state import renamed
from polyak.checkpoints.reading.folders import step_in_name, weights_in
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import Checkpoint, StoredTensor
from polyak.checkpoints.reading.untrusted_json import MAX_JSON_BYTES, parse_json

COMPOSED = {"model_index.json", "modules.json", "router_config.json"}
"""Files that name the sub-folders which a folder is made of."""

_TEMPLATES = "additional_chat_templates"  # of a tokenizer, beside its files
_ADAPTER = "adapter_config.json"
_DEPTH = 3
# The second and later models of accelerate's `save_state`, whose folders hold random states.
_FURTHER_MODEL = re.compile(r"(?:pytorch_)?(model_[1-9]\d*)\.(?:safetensors|bin)")
_RANDOM_STATES = "random_states_0.pkl"


def components_in(folder: Place) -> dict[str, Place]:
    """The weights of each model in a folder: prefix of its tensors' names -> file or index.

    The prefix is `""` in a folder of one model. Raises FormatError as `weights_in` does.
    """
    found = {
        f"{path}/": weights_in(inner)
        for path, inner in part_folders(folder).items()
        if has_weight_files(inner)
    }
    if _RANDOM_STATES in folder.names:
        for name in folder.names:
            if match := _FURTHER_MODEL.fullmatch(name):
                found[f"{match[1]}/"] = folder.inside(name)
    if has_weight_files(folder) or not found:
        found = {"": weights_in(folder), **found}
    return found


def part_folders(folder: Place) -> dict[str, Place]:
    """The sub-folders that belong to the checkpoint in a folder: path from there -> sub-folder.

    A diffusers pipeline and a sentence-transformers model list theirs, and all that is in those belongs
    too. PEFT keeps every adapter but the first in a sub-folder of its name.
    """
    found: dict[str, Place] = {}
    for name in _named_parts(folder):
        inner = folder.inside(name)
        if name in folder.names and inner.is_folder:
            found |= {name: inner, **_inside(inner, f"{name}/", _DEPTH)}
    return found


def join_components(path: str, parts: dict[str, Checkpoint]) -> Checkpoint:
    """One checkpoint of several models, whose tensors are named with their prefixes."""
    tensors: dict[str, StoredTensor] = {}
    for prefix, part in parts.items():
        for name, tensor in part.tensors.items():
            tensor.name = prefix + name
            tensors[tensor.name] = tensor
    each = parts.items()
    return Checkpoint(
        path=path,
        format="components",
        tensors=tensors,
        files=tuple(file for part in parts.values() for file in part.files),
        ties={pre + alias: pre + name for pre, part in each for alias, name in part.ties.items()},
        metadata=next(iter(parts.values())).metadata,
        refused={pre + name: why for pre, part in each for name, why in part.refused.items()},
        extra={
            pre + name: renamed(value, pre)
            for pre, part in each
            for name, value in part.extra.items()
        },
    )


def _named_parts(folder: Place) -> Iterable[str]:
    names = folder.names
    if "model_index.json" in names:
        yield from _json(folder.inside("model_index.json"))
    if "modules.json" in names:
        for module in _json(folder.inside("modules.json")):
            path = module.get("path") if isinstance(module, dict) else None
            if isinstance(path, str) and path:
                yield PurePosixPath(path).parts[0]
    if "router_config.json" in names:
        router = _json(folder.inside("router_config.json"))
        types = router.get("types") if isinstance(router, dict) else None
        yield from types if isinstance(types, dict) else ()
    if _ADAPTER in names:
        yield from (name for name in names if _is_adapter(folder, name))
    yield _TEMPLATES


def _is_adapter(folder: Place, name: str) -> bool:
    if "." in name or step_in_name(name) is not None:  # a file, or a checkpoint of the run
        return False
    inner = folder.inside(name)
    return inner.is_folder and _ADAPTER in inner.names


def _inside(folder: Place, prefix: str, depth: int) -> dict[str, Place]:
    """All folders in a folder, to a depth at which no model is any more."""
    found: dict[str, Place] = {}
    for name in folder.names if depth else ():
        inner = folder.inside(name)
        if not PurePosixPath(name).suffix and not name.startswith(".") and inner.is_folder:
            found |= {prefix + name: inner, **_inside(inner, f"{prefix}{name}/", depth - 1)}
    return found


def has_weight_files(folder: Place) -> bool:
    """Whether there is any file that `weights_in` could mean; it may still refuse to choose."""
    return any(
        name.endswith((".safetensors", ".safetensors.index.json"))
        or name in (".metadata", "pytorch_model_fsdp_0")
        or name.startswith(("pytorch_model", "diffusion_pytorch_model", "adapter_model"))
        for name in folder.names
    )


def _json(place: Place) -> Any:
    with closing(place.file()) as file:
        data = file.read(0, min(file.size, MAX_JSON_BYTES + 1))
    return parse_json(b'{"all": ' + data + b"}", place.path)["all"]  # a list, in modules.json
