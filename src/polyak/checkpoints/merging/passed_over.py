"""What is called like a checkpoint and is none: it is left out with a reason, never without a word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from polyak.checkpoints.reading.components import components_in, has_weight_files
from polyak.checkpoints.reading.folders import is_index, is_record, step_in_name
from polyak.checkpoints.reading.storage import Place
from polyak.errors import FormatError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".pth.tar", ".pt.tar")
"""How the names of files of weights end."""

_NOT_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "random_states")
_SHARD = re.compile(r"[-_.]\d+[-_]of[-_]\d+\.")
_OF_OTHERS = (
    ".h5",
    ".hdf5",
    ".keras",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".pkl",
    ".pickle",
    ".tar",
    ".nemo",
)
_UNFINISHED = re.compile("|".join(rf"{re.escape(one)}[.~_]" for one in SUFFIXES))  # `step-4.pt.tmp`


def has_step(path: Path) -> bool:
    """Whether it is a folder with a step in its name."""
    return path.is_dir() and step_in_name(path.name) is not None


def is_weights_file(path: Path) -> bool:
    """Whether it is a file of weights by its name, and one of its own: no shard, no state of an optimizer."""
    name = path.name
    if not path.is_file() or _is_of_no_interest(name) or _SHARD.search(name):
        return False
    return name.endswith(SUFFIXES) or (path.suffix == ".tar" and _is_zip(path))


def is_state(path: str) -> bool:
    """Whether a file is the state of an optimizer, a scheduler or a random generator, by its name."""
    return Path(path).name.startswith(_NOT_WEIGHTS)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model, or a pipeline of several; opening it may still fail."""
    if folder.name.startswith("."):
        return False
    place = Place(folder)
    return has_weight_files(place) or _refusal(place) is None


def is_numbered_checkpoint(path: Path) -> bool:
    """Whether it is a folder with a step in its name and weights in it."""
    return has_step(path) and has_weights(path)


def models_in(folder: Path) -> set[str]:
    """The names of the folders in a folder that hold weights: `unet` of `checkpoint-500/unet`."""
    return {one.name for one in folder.iterdir() if one.is_dir() and has_weights(one)}


def is_run(folder: Path) -> bool:
    """Whether a folder holds checkpoints with numbers, as files or folders."""
    if folder.name.startswith("."):
        return False
    numbered = [folder / name for name in Place(folder).names if step_in_name(name) is not None]
    return any(
        is_weights_file(one) or is_numbered_checkpoint(one) or (has_step(one) and models_in(one))
        for one in numbered
    )


def why_beside(path: Path) -> str | None:
    """Why a file or folder of weights is none of the checkpoints beside it; None for anything else."""
    try:
        if is_record(path):
            return "it is the record of a run"
        if path.is_dir() and is_run(path):
            return "it holds checkpoints of its own. Name it if they are meant"
        is_weights = has_weights(path) if path.is_dir() else is_weights_file(path)
    except (FormatError, PermissionError):  # what cannot be listed, such as lost+found
        return None
    if is_weights or is_index(path.name) or path.name == ".metadata":
        return "no step is in its name, and it stands beside checkpoints"
    return None


def passed_over(entries: Iterable[Path]) -> dict[str, str]:
    """Path -> why it is no checkpoint, of what has the name of one in a folder."""
    entries = [*entries]
    reasons = {str(one): why_none(one) or _why_no_file(one) for one in entries}
    if not any(is_index(one.name) for one in entries):
        shards = [one for one in entries if one.name.endswith(SUFFIXES) and _SHARD.search(one.name)]
        reasons |= dict.fromkeys(map(str, shards), "it is a shard, and there is no index of shards")
    return {path: why for path, why in reasons.items() if why}


def why_none(path: Path) -> str | None:
    """Why a folder or a link with the name of a checkpoint is none; None for one, and for other names."""
    numbered = step_in_name(path.name) is not None
    if path.is_dir():
        return _lacks_weights(path) if numbered and not is_run(path) else None
    if path.is_file() or _is_of_no_interest(path.name):
        return None
    if numbered or path.name.endswith(SUFFIXES):
        return "it is neither a file nor a folder" if path.exists() else "it is a link to nothing"
    return None


def nothing_in(where: str, passed: Mapping[str, str]) -> FormatError:
    """The error where all that has the name of a checkpoint is none, if anything has."""
    if not passed:
        return _refusal(Place(where)) or FormatError(f"There is no checkpoint in {where}.")
    listed = "; ".join(f"{path}: {why}" for path, why in [*passed.items()][:3])
    more = f"; and {len(passed) - 3} more" if len(passed) > 3 else ""
    return FormatError(f"There is no checkpoint in {where} that polyak can read. {listed}{more}.")


def _why_no_file(path: Path) -> str | None:
    name = path.name
    if step_in_name(name) is None or _is_of_no_interest(name) or not path.is_file():
        return None
    if name.endswith(SUFFIXES):
        return None
    if _UNFINISHED.search(name):
        return "by its name it was not written to the end"
    if not path.suffix or name.endswith(_OF_OTHERS):
        return "its suffix is none of weights that polyak reads. Name the file if it is meant"
    return None


def _lacks_weights(folder: Path) -> str | None:
    if has_weights(folder):
        return None
    why = str(_refusal(Place(folder))).removeprefix(f"{folder} ").removesuffix(".")
    return f"it {why}"


def _refusal(folder: Place) -> FormatError | None:
    """Why a folder is no model; None for one."""
    try:
        components_in(folder)
    except FormatError as error:
        return error
    return None


def _is_of_no_interest(name: str) -> bool:
    return name.startswith((".", *_NOT_WEIGHTS))


def _is_zip(path: Path) -> bool:
    """Whether it is what `torch.save` writes, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
