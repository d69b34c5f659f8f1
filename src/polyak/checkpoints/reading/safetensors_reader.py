"""Safetensors files: eight bytes of header length, a JSON header, the values.

Checked before a byte is trusted: the header's size (at most 100 MB) and syntax, every entry's fields,
sizes against dtype and shape, and that the tensors fill the rest of the file with no hole or overlap.
Source: https://huggingface.co/docs/safetensors (format), the rules of its `tensor.rs`.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from polyak.checkpoints.reading.stored import (
    ByteFile,
    Checkpoint,
    Span,
    SpanTensor,
    StoredTensor,
    bytes_of,
)
from polyak.checkpoints.reading.untrusted_json import MAX_JSON_BYTES, parse_json
from polyak.errors import FormatError

RANK_SHARD = (
    "{path} holds what single ranks saved (HuggingFaceStorageWriter, save_distributed=True), and does "
    "not say how many ranks there were. Save with enable_consolidation=True, or join the files with "
    "torch.distributed.checkpoint._consolidate_hf_safetensors.consolidate_safetensors_files."
)
"""Parts of tensors whose full shape is written nowhere: a missing rank would go unnoticed."""

_FIELDS = {"dtype", "shape", "data_offsets"}


def read_safetensors(file: ByteFile) -> Checkpoint:
    """Open one safetensors file; FormatError where it is not one."""
    header, data_start = _header(file)
    metadata = _metadata(file, header.pop("__metadata__", None))
    if "DCP_SHARDING_INFO" in metadata and PurePath(file.path).name.startswith("shard-"):
        raise FormatError(RANK_SHARD.format(path=file.path))
    extents = {name: _extent(file, name, entry) for name, entry in header.items()}
    _check_cover(file, extents, file.size - data_start)
    tensors: dict[str, StoredTensor] = {}
    for name, (begin, end) in extents.items():
        entry, span = header[name], Span(file, data_start + begin, end - begin)
        tensors[name] = SpanTensor(name, entry["dtype"], entry["shape"], (span,))
    return Checkpoint(
        path=file.path,
        format="safetensors",
        tensors=tensors,
        files=(file,),
        ties=ties_in(metadata, tensors),
        metadata=metadata,
    )


def ties_in(metadata: dict[str, str], tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """Alias -> stored name, as polyak (key `ties`) and safetensors' `save_model` write them."""
    ties = {alias: name for alias, name in metadata.items() if name in tensors}
    if "polyak" in metadata and "ties" in metadata:
        written = parse_json(metadata["ties"].encode(), "The metadata entry 'ties'")
        for alias, name in written.items():
            if not isinstance(name, str) or name not in tensors or alias in tensors:
                raise FormatError(
                    f"The metadata ties {alias!r} to {name!r}, but only names that are not stored "
                    "can be tied to names that are. The file is damaged."
                )
        ties |= written
    return {alias: name for alias, name in ties.items() if alias not in tensors}


def _header(file: ByteFile) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_JSON_BYTES:
        raise FormatError(
            f"{file.path}: a header of {length} bytes; safetensors allows {MAX_JSON_BYTES}. "
            "Either this is no safetensors file, or its first bytes are damaged."
        )
    raw = file.read(8, length)
    if not raw.startswith(b"{"):
        raise FormatError(
            f"{file.path} is no safetensors file: its header does not begin with '{{'."
        )
    return parse_json(raw, f"The header of {file.path}"), 8 + length


def _metadata(file: ByteFile, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if isinstance(metadata, dict) and all(_is_text(value) for value in metadata.values()):
        return metadata
    raise FormatError(f"{file.path}: __metadata__ must map strings to strings.")


def _is_text(value: Any) -> bool:
    """Whether it is a string that can be written (half a surrogate pair cannot)."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value


def _extent(file: ByteFile, name: str, entry: Any) -> tuple[int, int]:
    """Where the bytes of one tensor begin and end, checked against its dtype and shape."""
    where = f"{file.path}, tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise FormatError(
            f"{where}: expected dtype, shape and data_offsets, found {_short(entry)}."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets)):
        raise FormatError(
            f"{where}: dtype, shape or data_offsets of the wrong kind: {_short(entry)}."
        )
    if len(offsets) != 2:
        raise FormatError(f"{where}: data_offsets must be two numbers, found {_short(offsets)}.")
    try:
        expected = bytes_of(dtype, tuple(shape))
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    begin, end = offsets
    if end - begin != expected:
        raise FormatError(
            f"{where}: {dtype} of shape {_short(shape)} takes {expected} bytes, but data_offsets say "
            f"{end - begin}. The header is damaged."
        )
    return begin, end


def _check_cover(file: ByteFile, extents: dict[str, tuple[int, int]], length: int) -> None:
    """The tensors must fill the data exactly: no hole, no overlap, nothing after the end."""
    position = 0
    for name, (begin, end) in sorted(extents.items(), key=lambda item: item[1]):
        if begin != position:
            kind = "a hole before" if begin > position else "an overlap at"
            raise FormatError(
                f"{file.path}: {kind} tensor {name!r} (byte {begin}, not {position})."
            )
        position = end
    if position != length:
        raise FormatError(
            f"{file.path}: the header describes {position} bytes of tensors, the file holds {length}: "
            + ("it is cut short. Copy it again." if position > length else "it has a foreign tail.")
        )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."
