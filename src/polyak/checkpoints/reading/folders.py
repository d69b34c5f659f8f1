"""Folders: which file of one holds the weights, shards joined by their index, and the training step."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

from polyak.checkpoints.reading.extra_state import tensors_in
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
    "pytorch_model_fsdp.bin",  # accelerate, FSDP with its full state
)
_INDEX = ".index.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
INTERVAL = re.compile(r"interval-(\d{1,15})\.safetensors")
"""The files of a record."""
_VARIANT = re.compile(r".*\.(?:safetensors|bin)\.index(?:\.[\w-]+)?\.json")


def is_record(path: object) -> bool:
    """Whether this is a folder with recorded intervals."""
    try:
        names = [one.name for one in Path(str(path)).iterdir()]
    except OSError:
        return False
    return any(map(INTERVAL.fullmatch, names))


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
    # As Transformers reads it: the single file before the index, safetensors before torch's format.
    candidates = [found for name in _SINGLE for found in (name, name + _INDEX) if found in names]
    if candidates:
        return place.inside(candidates[0])
    if "pytorch_model_fsdp_0" in names:  # accelerate and Transformers, FSDP with sharded state
        return weights_in(place.inside("pytorch_model_fsdp_0"))
    return place.inside(_only_one(place))


def is_model_file(name: str) -> bool:
    """Whether a library looks for the weights of a folder under this very name."""
    return name in (*_SINGLE, ".metadata") or is_index(name)


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
    listed = {name for names in shards.values() for name in names}
    stored = Counter(
        name
        for shard in opened.values()
        for name in (
            *(shard.tensors.keys() - tensors_in(shard.extra)),
            *shard.refused,
            *(listed & (shard.ties.keys() | shard.extra.keys())),
        )
    )
    check_match(
        {
            name: f"in {count} shards" if count > 1 else "in one shard"
            for name, count in stored.items()
        },
        dict.fromkeys(listed, "in one shard"),
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
        order=tuple(name for part in parts for name in part.order),
        versions=parts[0].versions,
        extra={name: value for part in parts for name, value in part.extra.items()},
    )


_SUFFIX = re.compile(r"\.(safetensors|pt|pth|bin|ckpt|npz|tar|index\.json)$")
_SHARD_NUMBER = re.compile(r"[-_.]\d+[-_]of[-_]\d+")
_DATE = re.compile(
    r"(?<!\d)(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
    r"(?:[T_-]?\d\d[-_.:h]?\d\d(?:[-_.:m]?\d\d)?)?(?!\d)"
)
_END = r"(?=$|[-_=]|\.(?!\d))"  # the 3 of `loss_3.21` is no step
_STEP = re.compile(
    r"(?<![a-z])(?:(?:global_?)?step|iter|iteration|update)s?[-_=.]?(\d{1,15}(?:\.\d+)?[km]|\d{1,15})"
    + _END,
    re.IGNORECASE,
)
_CHECKPOINT = re.compile(
    r"(?<![a-z])(?:checkpoint|ckpt|snapshot)s?[-_=.]?(\d{1,15})" + _END, re.IGNORECASE
)
_EPOCH_AND_STEP = re.compile(
    r"(?:^|[-_.])(?:checkpoint|ckpt|epoch)[-_]?(\d{1,9})[-_](\d{1,15})$", re.IGNORECASE
)
_OTHER = re.compile(
    r"(?:^|(?<![a-z])(?:epoch|ep|model|weights|net)[-_=.]?)(\d{1,15})" + _END, re.IGNORECASE
)
_EPOCHS = re.compile(r"(?<![a-z\d])(\d{1,15})(?:epoch|ep)s?" + _END, re.IGNORECASE)
_COUNTERS = ("global_step", "step", "iteration", "num_updates")
_FACTORS = {"k": 1000, "m": 1_000_000}


def training_step(place: Place, metadata: dict[str, str]) -> int | None:
    """The training step: from what the checkpoint itself says, else from its path.

    In this order: `trainer_state.json` of Transformers, a counter in the file (`global_step`, `step`,
    `iteration`, fairseq's `num_updates`; `time` in polyak's files whose unit is steps), `step_in_path`.
    """
    is_part = not place.is_folder and is_part_of_folder(place.name)
    folder = place if place.is_folder else place.parent
    steps = [
        _trainer_step(folder) if place.is_folder or is_part else None,
        *(_whole(metadata.get(key, "")) for key in _COUNTERS),
        _whole(metadata.get("time", "")) if metadata.get("unit") == "steps" else None,
    ]
    known = next((step for step in steps if step is not None), None)
    return step_in_path(place.path) if known is None else known


def step_in_path(path: str) -> int | None:
    """The step in the name, or in that of the folder of one checkpoint that the path leads into.

    A file called `model.safetensors` or a folder such as `unet` or `huggingface` is part of one.

    >>> step_in_path("run/checkpoint-500/unet/diffusion_pytorch_model.safetensors")
    500
    >>> step_in_path("run/checkpoint-500/swa.safetensors") is None
    True
    """
    label = name_with_step(path)
    return None if label is None else step_in_name(label)


def name_with_step(path: str) -> str | None:
    """The part of the path that `step_in_path` takes the step from; None if it finds none."""
    *folders, name = (PurePosixPath(path) if "://" in path else Path(path).absolute()).parts
    if step_in_name(name) is not None:
        return name
    if _SUFFIX.search(name) or name == ".metadata":
        if not is_part_of_folder(name):
            return None
        if folders and step_in_name(folders[-1]) is not None:
            return folders[-1]
        folders = folders[:-1]
    for folder in folders[-1:-3:-1]:
        if (_STEP.search(folder) or _CHECKPOINT.search(folder)) and step_in_name(
            folder
        ) is not None:
            return folder
    return None


def step_in_name(name: str) -> int | None:
    """The step in the name of a file or folder: the last number after step, iter, update, checkpoint, ...

    Without such a word the only number beside epoch, after model, weights or net, or at the very
    beginning counts. Other numbers (`resnet-50.pt`, `llama-3-8B`, dates, scores) are not steps.

    >>> [step_in_name(name) for name in ("checkpoint-500", "epoch=3-step=500.ckpt", "resnet-50.pt")]
    [500, 500, None]
    >>> [step_in_name(name) for name in ("checkpoint_2_8000.pt", "12epoch.pth", "step-10k.pt")]
    [8000, 12, 10000]
    """
    stem = _SHARD_NUMBER.sub("", _SUFFIX.sub("", _SUFFIX.sub("", name)))
    if steps := _STEP.findall(stem):
        return _scaled(steps[-1])
    stem = _DATE.sub("", stem)
    both = _EPOCH_AND_STEP.search(stem)  # fairseq: checkpoint_EPOCH_UPDATES, and no epoch has none
    if both and int(both[1]) <= int(both[2]):
        return int(both[2])
    if steps := _CHECKPOINT.findall(stem):
        return int(steps[-1])
    others = [*_EPOCHS.findall(stem), *_OTHER.findall(stem)]
    return int(others[0]) if len(others) == 1 else None


def _scaled(text: str) -> int | None:
    """`500`, `10k` or `1.5M` as a number."""
    factor = _FACTORS.get(text[-1].lower(), 1)
    return round(float(text.rstrip("kmKM")) * factor)


def is_part_of_folder(name: str) -> bool:
    """Whether every checkpoint folder has a file of this name, so that only the folder's name tells."""
    return name == ".metadata" or name.startswith(
        (
            "model.", "model-0", "pytorch_model", "adapter_model", "diffusion_pytorch_model",
            "pytorch_lora_weights", "consolidated", "lit_model", "model_optim_rng", "mp_rank_", "weights.",
        )
    )  # fmt: skip


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
