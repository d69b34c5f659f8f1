"""The training step that a checkpoint belongs to.

Folders: which file of it holds the weights, and shards with an index as one checkpoint.
"""

from __future__ import annotations

import re
from collections import Counter

from polyak.checkpoints.reading.safetensors_reader import RANK_SHARD
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import ByteFile, Checkpoint
from polyak.checkpoints.reading.untrusted_json import read_json
from polyak.errors import FormatError, MismatchError

_STEP = re.compile(
    r"(?<![a-z])(?:(?:global_?)?step|checkpoint|ckpt|iter|iteration|update|snapshot)s?[-_=.]?0*(\d{1,15})(?=$|[-_.=])",
    re.IGNORECASE,
)
_OTHER = re.compile(
    r"(?:^|(?<![a-z])(?:epoch|ep|model|weights|net)[-_=.]?)0*(\d{1,15})(?=$|[-_.=])", re.IGNORECASE
)


def natural_step(place: Place, checkpoint: Checkpoint) -> int | None:
    """The step from what the checkpoint says itself, else from its name, else from its folder's.

    In this order: `trainer_state.json` of Transformers, `global_step` or `step` in the file
    (Lightning and most loops; `time` in files of polyak whose unit is steps), the name. A file such
    as `checkpoint-500/model.safetensors` has the step of its folder.
    """
    folder = place if place.is_folder() else place.parent
    steps = [
        _trainer_step(folder) if folder is place or _is_part(place) else None,
        *(_whole(checkpoint.metadata.get(key, "")) for key in ("global_step", "step")),
        _whole(checkpoint.metadata.get("time", "")) if _in_steps(checkpoint) else None,
        step_in_name(place.name),
        step_in_name(folder.name) if _is_part(place) else None,
    ]
    return next((step for step in steps if step is not None), None)


def _is_part(place: Place) -> bool:
    """Whether the name is one that every checkpoint folder has, so that the folder's counts."""
    return place.name == ".metadata" or place.name.startswith(
        ("model.", "model-0", "pytorch_model", "adapter_model", "diffusion_pytorch_model")
    )


def _in_steps(checkpoint: Checkpoint) -> bool:
    return checkpoint.metadata.get("unit") == "steps"


def step_in_name(name: str) -> int | None:
    """The step in the name of a file or folder: the last number after step, checkpoint, iter, ...

    Without such a word the only number after epoch, model, weights or net, or at the very beginning,
    counts. Other numbers (`resnet-50.pt`, `llama-3-8B`) are no steps.

    >>> [step_in_name(name) for name in ("checkpoint-500", "epoch=3-step=500.ckpt", "resnet-50.pt")]
    [500, 500, None]
    """
    stem = re.sub(r"\.(safetensors|pt|pth|bin|ckpt|npz|tar|index\.json)$", "", name)
    stem = re.sub(r"-\d{5}-of-\d{5}", "", stem)
    if steps := _STEP.findall(stem):
        return int(steps[-1])
    others = _OTHER.findall(stem)
    return int(others[0]) if len(others) == 1 else None


def _trainer_step(place: Place) -> int | None:
    if "trainer_state.json" not in place.names():
        return None
    step = read_json(place.inside("trainer_state.json").file()).get("global_step")
    if type(step) is not int or step < 0:
        raise FormatError(f"{place.path}/trainer_state.json: global_step is {str(step)[:50]!r}.")
    return step


def _whole(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,15})(?:\.0+)?", text)
    return int(match[1]) if match else None


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


def weights_in(place: Place) -> Place:
    """The file (or the index, or the DCP folder) with the weights; FormatError lists what there is."""
    names = place.names()
    if ".metadata" in names:
        return place.inside(".metadata")
    candidates = [name + _INDEX for name in _SINGLE if name + _INDEX in names] or [
        name for name in _SINGLE if name in names
    ]
    if candidates:
        return place.inside(candidates[0])
    if "pytorch_model_fsdp_0" in names:  # accelerate and Transformers, FSDP with sharded state
        return weights_in(place.inside("pytorch_model_fsdp_0"))
    return place.inside(_only_one(place, names))


def _only_one(place: Place, names: list[str]) -> str:
    """The only file of weights, whatever its name."""
    indices = [
        name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))
    ]
    weights = [name for name in names if name.endswith(".safetensors")]
    if len(indices) == 1:
        return indices[0]
    if any(name.startswith("shard-") for name in weights):
        raise FormatError(RANK_SHARD.format(path=place.path))
    if any(_SHARD.search(name) for name in weights):
        raise FormatError(
            f"{place.path} holds shards ({weights[0]}, ...) but no index, or more than one. Copy the "
            "missing *.index.json, or name one."
        )
    if len(weights) == 1:
        return weights[0]
    raise FormatError(_advice(place, names, weights))


def _advice(place: Place, names: list[str], weights: list[str]) -> str:
    if any(name.startswith(("zero_pp_rank_", "mp_rank_", "global_step")) for name in names):
        return (
            f"{place.path} is a DeepSpeed checkpoint: its weights are scattered over optimizer shards. "
            "Run the zero_to_fp32.py that lies beside it, and give its output."
        )
    if weights:
        return f"{place.path} holds several files of weights: {', '.join(weights[:20])}. Name one."
    shown = ", ".join(names[:20]) + (", ..." if names[20:] else "")
    return (
        f"{place.path} holds no weights that polyak knows: expected .metadata (DCP), "
        f"*.safetensors[.index.json] or pytorch_model.bin[.index.json]; found {shown or 'nothing'}."
    )


def shards_of(index: Place, folder: Place) -> dict[str, list[str]]:
    """Shard file -> the names that the index expects in it."""
    weight_map = read_json(index.file()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index.path} has no weight_map: it is not an index of shards.")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise FormatError(f"{index.path}: {name!r} lies in {str(shard)[:100]!r}, no file name.")
        shards.setdefault(shard, []).append(name)
    present = set(folder.names())
    missing = [shard for shard in shards if shard not in present]
    if missing:
        raise MismatchError.of(
            f"{index.path} names {len(shards)} shards, and some are not there.",
            missing=missing,
            advice="The download or the save was interrupted. Fetch them again.",
        )
    return shards


def join_shards(
    path: str, shards: dict[str, list[str]], opened: dict[str, Checkpoint]
) -> Checkpoint:
    """One checkpoint of all shards, held against the index: nothing missing, nothing twice."""
    expected = {name for names in shards.values() for name in names}
    stored = Counter(
        name for shard in opened.values() for name in (*shard.tensors, *shard.ties, *shard.refused)
    )
    twice = {name: f"in {count} shards" for name, count in stored.items() if count > 1}
    if twice or stored.keys() != expected:
        raise MismatchError.of(
            f"The shards of {path} do not hold what their index says.",
            missing=expected - stored.keys(),
            unexpected=stored.keys() - expected,
            changed=twice,
            advice="Shards of different saves may be mixed in this folder. Save or fetch it again.",
        )
    parts = list(opened.values())
    files: list[ByteFile] = [file for part in parts for file in part.files]
    return Checkpoint(
        path=path,
        format=f"{parts[0].format} shards",
        tensors={name: tensor for part in parts for name, tensor in part.tensors.items()},
        files=tuple(files),
        ties={alias: name for part in parts for alias, name in part.ties.items()},
        metadata=parts[0].metadata,
        refused={name: why for part in parts for name, why in part.refused.items()},
    )
