"""The training step that a checkpoint belongs to."""

from __future__ import annotations

import re

from polyak.checkpoints.reading.jsons import read_json
from polyak.checkpoints.reading.layout import Checkpoint
from polyak.checkpoints.reading.places import Place
from polyak.errors import FormatError

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
