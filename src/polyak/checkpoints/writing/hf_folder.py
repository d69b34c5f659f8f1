"""Folders of Transformers, diffusers and PEFT: the names they give to weights, the files beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak.checkpoints.reading.components import COMPOSED, part_folders
from polyak.checkpoints.reading.rank_shards import is_rank_shard
from polyak.checkpoints.reading.storage import Place
from polyak.checkpoints.reading.stored import TORCH_DTYPES, Checkpoint
from polyak.checkpoints.writing.layouts import TensorSpec
from polyak.errors import require

SIDECAR_SUFFIXES = {
    ".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".bpe", ".yaml", ".yml",
}  # fmt: skip
_OF_THE_RUN = {"trainer_state.json", "training_args.json", "scheduler.json", "zero_to_fp32.py"}
_MAX_SIDECAR = 64 * 1024**2


def sidecar_files(newest: Checkpoint, dtype: str | None = None) -> dict[str, bytes]:
    """Configuration, tokenizer and code in a checkpoint's folder: path from there -> contents.

    Weights, optimizer and the state of the run are left out. dtype: what the weights are written as, which
    `config.json` then says, or None where they keep theirs.
    """
    if not newest.components:
        return {}
    place = Place(newest.path)
    folder = place if place.is_folder else place.parent
    folders = {"": folder, **(part_folders(folder) if place.is_folder else {})}
    found = {
        f"{path}/{name}" if path else name: inner.inside(name)
        for path, inner in folders.items()
        for name in inner.names
        if _is_sidecar(name) and not (name in COMPOSED and not place.is_folder)
    }
    read = {path: _contents(file) for path, file in found.items() if not file.is_folder}
    return {
        path: _with_dtype(content, dtype) if dtype and path.endswith("config.json") else content
        for path, content in read.items()
        if content is not None
    }


def files_beside_weights(folder: Path) -> dict[str, bytes]:
    """Configuration, tokenizer and code in a folder, as `from_pretrained` needs them: name -> contents.

    Raises ArgumentError if there is no such folder.
    """
    require(folder.is_dir(), f"{folder}: there is no such folder.")
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_sidecar(path.name)]
    return {path.name: path.read_bytes() for path in files if path.stat().st_size <= _MAX_SIDECAR}


def _is_sidecar(name: str) -> bool:
    suffix = name[name.rfind(".") :] if "." in name else ""
    return (
        suffix in SIDECAR_SUFFIXES
        and name not in _OF_THE_RUN
        and not name.endswith("_results.json")  # all_results.json and others of Transformers
        and ".index." not in name
        and not name.startswith(".")
    )


def _contents(place: Place) -> bytes | None:
    with closing(place.file()) as file:
        return file.read(0, file.size) if file.size <= _MAX_SIDECAR else None


_DTYPE_NAMES = {
    str(TORCH_DTYPES[name]).removeprefix("torch.") for name in ("F64", "F32", "F16", "BF16")
}


def _with_dtype(config: bytes, dtype: str) -> bytes:
    """A configuration that says `dtype` wherever it names the dtype of weights, nested ones too."""
    try:
        parsed = json.loads(config)
        changed = _changed(parsed, str(TORCH_DTYPES[dtype]).removeprefix("torch."))
    except (ValueError, RecursionError):  # carried as it is, as without a dtype
        return config
    return config if changed == parsed else (json.dumps(changed, indent=2) + "\n").encode()


def _changed(value: Any, dtype: str) -> Any:
    if isinstance(value, list):
        return [_changed(item, dtype) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _respelled(item, dtype) if key in ("dtype", "torch_dtype") else _changed(item, dtype)
        for key, item in value.items()
    }


def _respelled(found: Any, dtype: str) -> Any:
    prefix = "torch." if str(found).startswith("torch.") else ""
    return prefix + dtype if str(found).removeprefix("torch.") in _DTYPE_NAMES else found


_KNOWN = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model|adapter_model)"
    r"(?:\.(?P<variant>[\w-]+))?\.(?:safetensors|bin)"
    r"(?P<index>\.index(?:\.(?P<of_index>[\w-]+))?\.json)?"
)
_ANY = re.compile(r"(?P<stem>.+?)\.(?:safetensors|bin)(?P<index>\.index\.json)?")
_RENAMED = re.compile(r"(^|_)pytorch_model(?=$|_)")  # .bin files; diffusers alone keeps the name


@dataclass(frozen=True)
class WeightsName:
    """How the weights of one model are named in a folder, so that its library finds them.

    folder: `""`, or with a slash at the end. stem, variant: `model` and `.fp16` of
    `model.fp16.safetensors`. sharded: whether an index goes with them.
    """

    folder: str
    stem: str
    variant: str
    sharded: bool

    @classmethod
    def like(cls, found: str) -> WeightsName:
        """As safetensors, the name of weights that were read from `found`, a file or an index.

        >>> name = WeightsName.like("unet/diffusion_pytorch_model.fp16.safetensors")
        >>> name.files(1), name.files(2)[0]
        (['unet/diffusion_pytorch_model.fp16.safetensors'], 'unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors')
        """
        folder, slash, name = found.rpartition("/")
        match = _KNOWN.fullmatch(name)
        variant = (match["variant"] or match["of_index"]) if match else None
        match = match or _ANY.fullmatch(name)
        if match is None or is_rank_shard(name):  # DCP too, npz, and torch files of other names
            return cls("", "model", "", sharded=False)
        stem = match["stem"]
        stem = stem if stem.startswith("diffusion_") else _RENAMED.sub(r"\1model", stem)
        return cls(folder + slash, stem, f".{variant}" if variant else "", bool(match["index"]))

    @property
    def may_be_sharded(self) -> bool:
        """Whether its library looks for shards: Transformers and diffusers do, or these were already."""
        transformers = self.stem == "model" and not self.folder
        return self.sharded or transformers or self.stem == "diffusion_pytorch_model"

    def files(self, count: int) -> list[str]:
        """`model.safetensors`, or `model-00001-of-00003.safetensors`, ...."""
        start = f"{self.folder}{self.stem}{self.variant}"
        if count == 1:
            return [f"{start}.safetensors"]
        return [f"{start}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    @property
    def index(self) -> str:
        """`model.safetensors.index.json`; the variant goes before the last suffix."""
        return f"{self.folder}{self.stem}.safetensors.index{self.variant}.json"


def split(tensors: Sequence[TensorSpec], shard_size: int) -> list[list[TensorSpec]]:
    """Tensors in order, a new shard whenever the next one would exceed `shard_size` bytes."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def index_of(shards: Mapping[str, Sequence[TensorSpec]]) -> bytes:
    """The index of which shard holds which tensor; aliases of tied tensors are not listed."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    names = {
        tensor.name: path.rpartition("/")[2] for path, shard in shards.items() for tensor in shard
    }
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
