"""Safetensors files: eight bytes of header length, a JSON header, the values.

Checked at opening: the header's size (at most 100 MB) and syntax, the fields of every entry, its size
against dtype and shape, and that the tensors fill the rest of the file with no hole or overlap.
Source: https://huggingface.co/docs/safetensors (format), the rules of its `tensor.rs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from polyak.checkpoints.reading.stored import (
    MAX_DIMENSIONS,
    ByteFile,
    Checkpoint,
    SpanTensor,
    StoredTensor,
    are_sizes,
)
from polyak.checkpoints.reading.untrusted_json import MAX_JSON_BYTES, parse_json
from polyak.errors import FormatError

SHARDING = "DCP_SHARDING_INFO"
"""The metadata entry with the offsets of chunks, in files of `HuggingFaceStorageWriter`."""

_WHITE_SPACE = b" \n\r\t"
"""What JSON allows before the object; so does safetensors 0.8, although its description does not."""

_FIELDS = {"dtype", "shape", "data_offsets"}


def is_safetensors(start: bytes) -> bool:
    """Whether a file that begins so is of this format: a plausible length, and then an object of JSON."""
    return start[5:8] == b"\0\0\0" and start[8:].lstrip(_WHITE_SPACE)[:1] == b"{"


def read_safetensors(file: ByteFile, *, of_rank: bool = False) -> Checkpoint:
    """Open one safetensors file; FormatError if it is not one, or is damaged.

    of_rank: read a file that holds one rank's parts of tensors, which is refused otherwise.
    """
    header, data_start = _header(file)
    metadata = _metadata(file, header.pop("__metadata__", None))
    tensors: dict[str, SpanTensor] = {}
    extents = []
    for name, entry in header.items():
        begin, end = _extent(file, name, entry)
        try:
            tensor = SpanTensor(name, entry["dtype"], entry["shape"], file, data_start + begin)
        except FormatError as error:
            raise FormatError(f"{_where(file, name)}: {error}") from None
        if tensor.nbytes != end - begin:
            raise FormatError(
                f"{_where(file, name)}: {entry['dtype']} of shape {_short(entry['shape'])} takes "
                f"{tensor.nbytes} bytes, but data_offsets say {end - begin}. The header is damaged."
            )
        tensors[name] = tensor
        extents.append((begin, end, name))
    _check_cover(file, extents, file.size - data_start)
    if not of_rank and SHARDING in metadata:
        _refuse_rank_shard(file, metadata, tensors)
    return Checkpoint(
        path=file.path,
        format="safetensors",
        tensors=dict(tensors),
        files=(file,),
        ties=ties_in(metadata, tensors),
        metadata=metadata,
    )


def offsets_in(
    metadata: dict[str, str], tensors: Mapping[str, StoredTensor], path: str
) -> dict[str, tuple[int, ...]]:
    """Where in the whole tensors those of one rank's file begin."""
    written = parse_json(metadata.get(SHARDING, "{}").encode(), f"{path}: the entry {SHARDING}")
    found = {}
    for name, tensor in tensors.items():
        entry = written.get(name)
        offsets: Any = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not are_sizes(offsets, list) or len(offsets) != len(tensor.shape):
            raise FormatError(
                f"{path} does not say where its part of {name!r} begins ({SHARDING}: {_short(entry)})."
            )
        found[name] = tuple(offsets)
    return found


def _refuse_rank_shard(
    file: ByteFile, metadata: dict[str, str], tensors: Mapping[str, StoredTensor]
) -> None:
    """A file of parts: by its name, or because a part does not begin where its tensor does."""
    named = PurePath(file.path).name.startswith("shard-")
    if named or any(map(any, offsets_in(metadata, tensors, file.path).values())):
        raise FormatError(
            f"{file.path} holds the parts of tensors that one rank saved (HuggingFaceStorageWriter). "
            "Name its folder, which holds the parts of all ranks."
        )


def ties_in(metadata: dict[str, str], tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Alias -> stored name, as polyak (metadata entry `ties`) and safetensors' `save_model` write them."""
    ties = {alias: name for alias, name in metadata.items() if name in tensors}
    if "polyak" in metadata and "ties" in metadata:
        written = parse_json(metadata["ties"].encode(), "The metadata entry 'ties'")
        for alias, name in written.items():
            if not isinstance(name, str) or name not in tensors or alias in tensors:
                raise FormatError(
                    f"The metadata ties {alias!r} to {name!r}, but only names that are not stored "
                    "can be tied, to names that are. The file is damaged."
                )
        ties |= written
    return {alias: name for alias, name in ties.items() if alias not in tensors}


def _header(file: ByteFile) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_JSON_BYTES:
        raise FormatError(
            f"{file.path}: a header of {length} bytes; safetensors allows {MAX_JSON_BYTES}. "
            "Either this is not a safetensors file, or its first bytes are damaged."
        )
    raw = file.read(8, length)
    if not raw.lstrip(_WHITE_SPACE).startswith(b"{"):
        raise FormatError(
            f"{file.path} is not a safetensors file: its header does not begin with '{{'."
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
    """Where the bytes of one tensor begin and end, its entry checked to be of the right kinds."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise FormatError(
            f"{_where(file, name)}: expected dtype, shape and data_offsets, found {_short(entry)}."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and are_sizes(shape, list) and are_sizes(offsets, list)):
        raise FormatError(
            f"{_where(file, name)}: expected a text and two lists of sizes (integers from 0 to below "
            f"2**62, at most {MAX_DIMENSIONS} of them), found {_short(entry)}."
        )
    if len(offsets) != 2:
        raise FormatError(
            f"{_where(file, name)}: data_offsets must be two numbers, found {_short(offsets)}."
        )
    return offsets[0], offsets[1]


def _check_cover(file: ByteFile, extents: list[tuple[int, int, str]], length: int) -> None:
    """The tensors must fill the data exactly: no hole, no overlap, nothing after the end."""
    position = 0
    for begin, end, name in sorted(extents):
        if begin != position:
            kind = "a hole before" if begin > position else "an overlap at"
            raise FormatError(
                f"{file.path}: {kind} tensor {name!r} (it begins at byte {begin}, expected {position})."
            )
        position = end
    if position > length:
        raise FormatError(
            f"{file.path} is cut short: the header describes {position} bytes of tensors, and it holds "
            f"{length}. Copy it again."
        )
    if position < length:
        raise FormatError(
            f"{file.path} has {length - position} unexpected bytes after the last tensor."
        )


def _where(file: ByteFile, name: str) -> str:
    return f"{file.path}, tensor {name!r}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."
