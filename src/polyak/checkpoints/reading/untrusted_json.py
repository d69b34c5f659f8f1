"""JSON from files that are not trusted: everything wrong with it is a FormatError."""

from __future__ import annotations

import json
from typing import Any

from polyak.checkpoints.reading.stored import MAX_TENSORS, ByteFile
from polyak.errors import FormatError

MAX_JSON_BYTES = 100_000_000
"""The limit of the safetensors format for its header; index files are far smaller."""

_MAX_CONTAINERS = 3 * MAX_TENSORS + 10  # what a header of that many tensors holds
_MAX_ITEMS = 10 * MAX_TENSORS


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """The object in `data`; FormatError for anything but one JSON object with unique keys.

    >>> parse_json(b'{"a": [1, 2]}', "example")
    {'a': [1, 2]}
    """
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS or data.count(b",") > _MAX_ITEMS:
        raise FormatError(f"{what} holds more than a million tensors, or is not a list of tensors.")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(
            f"{what} is not valid JSON: {reason[:300]}. It is damaged or cut short: copy or "
            "write it again."
        ) from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is JSON, but not an object: found a {type(value).__name__}.")
    return value


def read_json(file: ByteFile) -> dict[str, Any]:
    """The object in a whole file of at most 100 MB."""
    if file.size > MAX_JSON_BYTES:
        raise FormatError(f"{file.path} has {file.size} bytes; at most {MAX_JSON_BYTES} are read.")
    return parse_json(file.read(0, file.size), file.path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    "".join(found).encode()  # half a surrogate pair cannot be printed or written: a ValueError here
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice!r}")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
