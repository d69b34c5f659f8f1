"""`write_checkpoint`: tensors in memory as one file, whose suffix says the format."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints.reading.extra_state import tensors_in
from polyak.checkpoints.reading.stored import TORCH_DTYPES
from polyak.checkpoints.writing.extra_state import lifted, warn_of_lost
from polyak.checkpoints.writing.layouts import (
    TORCH_SUFFIXES,
    Around,
    Layout,
    OutputFile,
    TensorSpec,
    layout_for,
)
from polyak.errors import ArgumentError, require
from polyak.files import as_path, file_target, replacing
from polyak.version import __version__

SPELLINGS = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""torch's dtypes as safetensors spells them."""


def write_checkpoint(  # noqa: PLR0913 - keyword-only arguments do not count
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    ties: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    around: Around | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write tensors to `path`, whole or not at all; equal contents give equal bytes.

    `.safetensors` holds each tensor once, widest dtype first, and the metadata in its header. `.pt`,
    `.pth`, `.bin` and `.ckpt` hold the bare state dict in the order given, so that
    `model.load_state_dict(torch.load(path))` works; the metadata is `_metadata["polyak"]` of it.
    Either way `open_checkpoint(path).metadata` has it, with `format` and `polyak` (the version) added.

    Args:
        path: Where to write; replaced if `overwrite`.
        tensors: Name -> tensor, on any device, contiguous or not. The `_metadata` that
            `Module.state_dict()` attaches is kept in torch files.
        ties: Alias -> name of the tensor in `tensors` that it shares.
        metadata: What the file says about itself.
        around: What a torch file holds beside the tensors; by default their own `_metadata`.
        extra: State that is no tensor, by its name in the state dict. Only torch files can hold it; a
            warning says what a safetensors file is without.
        overwrite: Replace a file at `path`.

    Raises:
        ArgumentError: another suffix, or what is not a dense tensor of a dtype that files hold.
        OutputError: `path` exists, or cannot be written.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "model.pt"
    >>> write_checkpoint(file, {"head": torch.ones(2)}, ties={"tail": "head"})
    >>> dict(torch.load(file))
    {'head': tensor([1., 1.]), 'tail': tensor([1., 1.])}

    """
    target = as_path(path)
    check_target(target, overwrite=overwrite)
    ties = dict(ties or {})
    _check(tensors, ties, metadata or {})
    is_torch = target.suffix.lower() in TORCH_SUFFIXES
    if extra:
        warn_of_lost(target, extra, is_torch=is_torch)
        inside: dict[str, Tensor] = {}
        extra = {name: lifted(name, value, inside) for name, value in extra.items()}
        tensors = _changed(tensors, inside, () if is_torch else tensors_in(extra))
    ordered = [*tensors] if is_torch else sorted(tensors, key=lambda n: -tensors[n].element_size())
    specs = [TensorSpec(n, SPELLINGS[tensors[n].dtype], tuple(tensors[n].shape)) for n in ordered]
    described = file_metadata(metadata or {}, {} if is_torch else ties)
    around = around or Around(versions=getattr(tensors, "_metadata", None) or {})
    around = replace(around, extra=extra or around.extra)
    layout = layout_for(target, specs, dict(sorted(ties.items())), described, around)
    if layout is None:
        raise _wrong_suffix(target, (".safetensors", *TORCH_SUFFIXES))
    values = (bytes_on_host(tensors[name]) for name in ordered)
    with replacing(target, overwrite=overwrite) as part:
        _write(part, layout, values, described)


def file_metadata(metadata: Mapping[str, str], ties: Mapping[str, str]) -> dict[str, str]:
    """What the header of a safetensors file says: `metadata`, the version, and the ties."""
    described = {"format": "pt", "polyak": __version__, **metadata}
    if ties:
        described["ties"] = json.dumps(ties, sort_keys=True)
    return dict(sorted(described.items()))


def check_target(
    path: Path, *, overwrite: bool, suffixes: Sequence[str] = (".safetensors", *TORCH_SUFFIXES)
) -> None:
    """Raise what `write_checkpoint` would for this path, before any work is done."""
    if path.suffix.lower() not in suffixes:
        raise _wrong_suffix(path, suffixes)
    file_target(path, overwrite=overwrite)


def _changed(
    tensors: Mapping[str, Tensor], added: Mapping[str, Tensor], removed: Iterable[str]
) -> Mapping[str, Tensor]:
    """The same state dict with the tensors within extra state, or without them."""
    changed = OrderedDict({**tensors, **added})
    for name in removed:
        changed.pop(name, None)
    changed._metadata = getattr(tensors, "_metadata", None)  # type: ignore[attr-defined]
    return changed


def _wrong_suffix(path: Path, suffixes: Sequence[str]) -> ArgumentError:
    first, *torch_files = suffixes
    rest = f" or a torch file ({', '.join(torch_files)})" if torch_files else ""
    return ArgumentError(
        f"The output {path} has the suffix {path.suffix!r}; expected {first}{rest}."
    )


def _check(
    tensors: Mapping[str, Any], ties: Mapping[str, str], metadata: Mapping[str, str]
) -> None:
    check_names(tensors, ties, metadata)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise ArgumentError(f"{name} is not a dense tensor with values; it cannot be written.")
        require(
            tensor.dtype in SPELLINGS, f"{name} has the dtype {tensor.dtype}, which no file holds."
        )


def check_names(
    tensors: Mapping[str, Any], ties: Mapping[str, str], metadata: Mapping[str, str]
) -> None:
    """Raise ArgumentError for names and metadata that are not text, and for ties to nothing."""
    for text in (*tensors, *metadata, *metadata.values()):
        require(isinstance(text, str), f"Names and metadata must be text; found {text!r}.")
    for alias, name in ties.items():
        require(
            alias not in tensors and name in tensors,
            f"ties maps {alias!r} to {name!r}; expected a name that is not in tensors to one that is.",
        )


def _write(
    part: Path, layout: Layout, values: Iterator[memoryview], metadata: Mapping[str, str]
) -> None:
    with closing(OutputFile(part, layout.size)) as file:
        layout.begin(file)
        for offset, data in zip(layout.offsets, values, strict=True):
            file.write(offset, data)
        layout.finish(file, metadata)


def bytes_on_host(tensor: Tensor) -> memoryview:
    """The values row-major, on the host."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
    return plain.view(torch.uint8).numpy().data
