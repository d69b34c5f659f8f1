"""Tar archives by their headers: where each member is, every size checked against the file.

Source: POSIX.1-2017, pax interchange format (ustar headers; `x` records for long names and sizes).
"""

from __future__ import annotations

import re

from polyak.checkpoints.reading.stored import ByteFile, Span
from polyak.errors import FormatError

_BLOCK = 512
_MAX_MEMBERS = 10_000
_MAX_RECORDS = 1 << 16
_RECORD = re.compile(rb"\d+ (path|size)=([^\n]*)\n")


def is_tar(start: bytes) -> bool:
    """Whether a file that begins so (512 bytes) is a tar archive."""
    return start[257:262] == b"ustar"


def tar_members(file: ByteFile) -> dict[str, Span]:
    """Name -> where its bytes are, for the regular files in the archive, without a leading `./`.

    Raises FormatError for what is damaged, and for a name that stands there twice.
    """
    members: dict[str, Span] = {}
    position, records = 0, dict[bytes, bytes]()
    for _ in range(_MAX_MEMBERS):
        header = file.read(position, _BLOCK) if position + _BLOCK <= file.size else b""
        if not header.strip(b"\0"):
            return members
        name, size, kind = _parsed(header, file)
        position += _BLOCK
        if kind in b"0\0":
            size = _whole(records.get(b"size"), size)
            name = records.get(b"path", name)
        if position + size > file.size:
            raise _damaged(file, f"a member of {size} bytes ends after the file")
        if kind in b"0\0":
            _add(members, name, Span(file, position, size))
        if kind not in b"g":
            is_extended = kind == b"x" and size <= _MAX_RECORDS
            records = dict(_RECORD.findall(file.read(position, size))) if is_extended else {}
        position += -(-size // _BLOCK) * _BLOCK
    raise _damaged(file, f"more than {_MAX_MEMBERS} members")


def _parsed(header: bytes, file: ByteFile) -> tuple[bytes, int, bytes]:
    """Name, size and type, if the checksum is right."""
    blanked = header[:148] + b" " * 8 + header[156:]
    if _octal(header[148:156]) != sum(blanked):
        raise _damaged(file, "the checksum of a header is wrong")
    size = _octal(header[124:136])
    if size is None:
        raise _damaged(file, "a member without a size")
    return header[:100].rstrip(b"\0"), size, header[156:157]


def _octal(field: bytes) -> int | None:
    """A number as headers hold it: in octal, or in binary if it would be too long."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]{1,12}", digits) else None


def _whole(text: bytes | None, otherwise: int) -> int:
    return int(text) if text is not None and re.fullmatch(rb"\d{1,18}", text) else otherwise


def _add(members: dict[str, Span], raw: bytes, place: Span) -> None:
    name = raw.decode("utf-8", "replace").removeprefix("./")
    if name in members:
        raise _damaged(place.file, f"duplicate member {name[:100]!r}")
    members[name] = place


def _damaged(file: ByteFile, problem: str) -> FormatError:
    return FormatError(f"{file.path} is a tar archive: {problem}. It is damaged. Copy it again.")
