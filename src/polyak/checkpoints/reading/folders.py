"""Folders: which file of one holds the weights, shards joined by their index, and the training step."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import closing
from typing import Any

from polyak.checkpoints.reading.rank_shards import is_rank_shard
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.checkpoints.reading.untrusted_json import read_json
from polyak.errors import FormatError, PolyakError, check_match

_SINGLE = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "adapter_model.bin",
)
_INDEX = ".index.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


_VARIANT = re.compile(r".*\.(?:safetensors|bin)\.index(?:\.[\w-]+)?\.json")


def is_index(name: str) -> bool:
    """Whether a file of this name is an index of shards, of a variant (`.index.fp16.json`) or without.

    >>> is_index("model.safetensors.index.fp16.json"), is_index("model_index.json")
    (True, False)
    """
    return name.endswith(_INDEX) or bool(_VARIANT.fullmatch(name))


def weights_in(place: Place) -> Place:
    """The file with the weights (or the index of shards, or `.metadata` of DCP) in a folder.

    Raises FormatError, which lists what there is, if none or several could be meant.
    """
    names = place.names
    if ".metadata" in names:
        return place.inside(".metadata")
    candidates = [name + _INDEX for name in _SINGLE if name + _INDEX in names] or [
        name for name in _SINGLE if name in names
    ]
    if candidates:
        return place.inside(candidates[0])
    if "pytorch_model_fsdp_0" in names:  # accelerate and Transformers, FSDP with sharded state
        return weights_in(place.inside("pytorch_model_fsdp_0"))
    return place.inside(_only_one(place))


def _only_one(place: Place) -> str:
    """The only file of weights, whatever its name."""
    indices = [name for name in place.names if is_index(name)]
    weights = [name for name in place.names if name.endswith(".safetensors")]
    if len(indices) == 1:
        return indices[0]
    if weights and all(map(is_rank_shard, weights)):
        return weights[0]
    if any(_SHARD.search(name) for name in weights):
        raise FormatError(
            f"{place.path} holds shards ({weights[0]}, ...) but no index, or more than one. Copy the "
            "missing *.index.json, or name one."
        )
    if len(weights) == 1:
        return weights[0]
    raise FormatError(_advice(place, weights))


def _advice(place: Place, weights: list[str]) -> str:
    names = place.names
    if any(name.startswith(("zero_pp_rank_", "mp_rank_", "global_step")) for name in names):
        return (
            f"{place.path} is a DeepSpeed checkpoint: its weights are spread over optimizer shards. "
            "Run the zero_to_fp32.py in the same folder, and pass its output."
        )
    if weights:
        return f"{place.path} holds several files of weights: {', '.join(weights[:20])}. Name one."
    shown = ", ".join(names[:20]) + (", ..." if names[20:] else "")
    return (
        f"{place.path} holds no weights that polyak can read: expected .metadata (DCP), "
        f"*.safetensors[.index.json] or pytorch_model.bin[.index.json]; found {shown or 'nothing'}."
    )


def shards_of(index: Place) -> dict[str, list[str]]:
    """Shard file -> the names that the index expects in it; all shards are there."""
    weight_map = _json_in(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index.path} has no weight_map: it is not an index of shards.")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise FormatError(
                f"{index.path}: {name!r} should be in {str(shard)[:100]!r}, which is not a file name."
            )
        shards.setdefault(shard, []).append(name)
    check_match(
        dict.fromkeys(index.parent.names),
        dict.fromkeys(shards),
        f"{index.path} names {len(shards)} shards, and some are not there.",
        "The download or the save was interrupted. Fetch them again.",
        allow_unexpected=True,
    )
    return shards


def join_shards(
    path: str, shards: dict[str, list[str]], opened: dict[str, Checkpoint]
) -> Checkpoint:
    """One checkpoint of all shards, checked against the index: nothing missing, nothing twice."""
    stored = Counter(
        name for shard in opened.values() for name in (*shard.tensors, *shard.ties, *shard.refused)
    )
    check_match(
        {
            name: f"in {count} shards" if count > 1 else "in one shard"
            for name, count in stored.items()
        },
        {name: "in one shard" for names in shards.values() for name in names},
        f"The shards of {path} do not hold what their index says.",
        "Shards of different saves may be mixed in this folder. Save or fetch it again.",
    )
    parts = list(opened.values())
    return Checkpoint(
        path=path,
        format=f"{parts[0].format} shards",
        tensors={name: tensor for part in parts for name, tensor in part.tensors.items()},
        files=tuple(file for part in parts for file in part.files),
        ties={alias: name for part in parts for alias, name in part.ties.items()},
        metadata=parts[0].metadata,
        refused={name: why for part in parts for name, why in part.refused.items()},
    )


_STEP = re.compile(
    r"(?<![a-z])(?:(?:global_?)?step|checkpoint|ckpt|iter|iteration|update|snapshot)s?[-_=.]?0*(\d{1,15})(?=$|[-_.=])",
    re.IGNORECASE,
)
_OTHER = re.compile(
    r"(?:^|(?<![a-z])(?:epoch|ep|model|weights|net)[-_=.]?)0*(\d{1,15})(?=$|[-_.=])", re.IGNORECASE
)


def training_step(place: Place, metadata: dict[str, str]) -> int | None:
    """The training step: from what the checkpoint itself says, else from its name or its folder's.

    In this order: `trainer_state.json` of Transformers, `global_step` or `step` in the file
    (Lightning and most loops; `time` in polyak's files whose unit is steps), the name. A file such as
    `checkpoint-500/model.safetensors` has the step of its folder.
    """
    is_part = not place.is_folder and _is_part(place.name)
    folder = place if place.is_folder else place.parent
    steps = [
        _trainer_step(folder) if place.is_folder or is_part else None,
        *(_whole(metadata.get(key, "")) for key in ("global_step", "step")),
        _whole(metadata.get("time", "")) if metadata.get("unit") == "steps" else None,
        step_in_name(place.name),
        step_in_name(folder.name) if is_part else None,
    ]
    return next((step for step in steps if step is not None), None)


def step_in_name(name: str) -> int | None:
    """The step in the name of a file or folder: the last number after step, checkpoint, iter, ...

    Without such a word the only number after epoch, model, weights or net, or at the very beginning,
    counts. Other numbers (`resnet-50.pt`, `llama-3-8B`) are not steps.

    >>> [step_in_name(name) for name in ("checkpoint-500", "epoch=3-step=500.ckpt", "resnet-50.pt")]
    [500, 500, None]
    """
    stem = re.sub(r"\.(safetensors|pt|pth|bin|ckpt|npz|tar|index\.json)$", "", name)
    stem = re.sub(r"-\d{5}-of-\d{5}", "", stem)
    if steps := _STEP.findall(stem):
        return int(steps[-1])
    others = _OTHER.findall(stem)
    return int(others[0]) if len(others) == 1 else None


def _is_part(name: str) -> bool:
    """Whether every checkpoint folder has a file of this name, so that only the folder's name tells."""
    return name == ".metadata" or name.startswith(
        ("model.", "model-0", "pytorch_model", "adapter_model", "diffusion_pytorch_model")
    )


def _trainer_step(folder: Place) -> int | None:
    try:
        names = folder.names
    except PolyakError:  # many web servers cannot list a folder
        return None
    if "trainer_state.json" not in names:
        return None
    step = _json_in(folder.inside("trainer_state.json")).get("global_step")
    if type(step) is not int or step < 0:
        raise FormatError(f"{folder.path}/trainer_state.json: global_step is {str(step)[:50]!r}.")
    return step


def _json_in(place: Place) -> dict[str, Any]:
    with closing(place.file()) as file:
        return read_json(file)


def _whole(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,15})(?:\.0+)?", text)
    return int(match[1]) if match else None
