"""Zip archives by their central directory: uncompressed entries only, every length and offset checked.

Torch archives and `.npz` files store their entries uncompressed, so that a tensor is a span of the
file. Compressed or encrypted entries, entries that overlap or reach outside the file, and directories
that disagree with the entries are refused.
Source: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from polyak.checkpoints.reading.stored import MAX_TENSORS, ByteFile, Span
from polyak.errors import FormatError

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_MAX_DIRECTORY = 256 << 20
_MAX_COMMENT = 65535
_WINDOW_BYTES = 1 << 16


class Entry(NamedTuple):
    """One stored file. header: offset of its local header. limit: where it must end, at the latest."""

    header: int
    name: str
    size: int
    limit: int
    trouble: str


class ZipArchive:
    """The entries of a zip archive by name.

    Raises FormatError if the archive is cut short or inconsistent, or holds one name twice. A compressed
    or encrypted entry is refused only when it is asked for.
    """

    def __init__(self, file: ByteFile) -> None:
        self.file = file
        self.entries: dict[str, Entry] = {}
        self._window, self._window_start = b"", 0
        start, size, count = self._directory()
        if size > _MAX_DIRECTORY or count * _CENTRAL.size > size or count > 2 * MAX_TENSORS:
            raise self._error(f"a directory of {size} bytes for {count} entries")
        found = sorted(self._parse(file.read(start, size), count, start))
        limits = [entry.header for entry in found[1:]] + [start]
        for entry, limit in zip(found, limits, strict=False):
            if entry.header + _LOCAL.size + entry.size > limit:
                raise self._error(f"{entry.name!r} overlaps what follows it")
            if entry.name in self.entries:
                raise self._error(f"duplicate entry {entry.name!r}")
            self.entries[entry.name] = entry._replace(limit=limit)

    def span(self, name: str) -> Span:
        """Where the bytes of an entry are; its local header must agree with the directory."""
        entry = self.entries.get(name)
        if entry is None:
            raise self._error(f"it has no entry {name!r}")
        if entry.trouble:
            raise FormatError(f"{self.file.path}: {name!r} {entry.trouble}.")
        expected = name.encode()
        raw = self._header(entry, _LOCAL.size + len(expected))
        mark, _, _, method, *_, name_length, extra_length = _LOCAL.unpack_from(raw)
        written = raw[_LOCAL.size :]
        if mark != b"PK\x03\x04" or method or name_length != len(expected) or written != expected:
            raise self._error(f"the entry {name!r} is not where the directory says")
        start = entry.header + _LOCAL.size + name_length + extra_length
        if start + entry.size > entry.limit:
            raise self._error(f"{name!r} runs into what follows it")
        return span_of(self.file, start, entry.size)

    def _header(self, entry: Entry, length: int) -> bytes:
        """The local header of an entry; those of many small entries are read at once."""
        skip = entry.header - self._window_start
        if not 0 <= skip <= len(self._window) - length:
            small = entry.limit - entry.header <= _WINDOW_BYTES
            wanted = min(_WINDOW_BYTES, self.file.size - entry.header) if small else length
            self._window_start, skip = entry.header, 0
            self._window = self.file.read(entry.header, max(wanted, length))
        return self._window[skip : skip + length]

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a small entry, at most `limit` of them."""
        span = self.span(name)
        if span.length > limit:
            raise self._error(f"{name!r} has {span.length} bytes; at most {limit} are read")
        return span.file.read(span.offset, span.length)

    def _error(self, problem: str) -> FormatError:
        return FormatError(
            f"{self.file.path}: {problem}. The archive is damaged, or not from torch or NumPy."
        )

    def _directory(self) -> tuple[int, int, int]:
        """Offset, bytes and entries of the central directory."""
        for tail_length in (1024, _MAX_COMMENT + _END.size):
            tail_start = max(0, self.file.size - tail_length)
            tail = self.file.read(tail_start, self.file.size - tail_start)
            at = tail.rfind(b"PK\x05\x06")
            if 0 <= at <= len(tail) - _END.size:
                break
        else:
            raise FormatError(
                f"{self.file.path} is cut short: a zip archive (as torch.save writes) ends with its "
                "directory, and there is none. Copy the file again."
            )
        end = _END.unpack_from(tail, at)
        count, size, start = end[4], end[5], end[6]
        position = tail_start + at
        if 0xFFFF in end[1:5] or 0xFFFFFFFF in (size, start):
            start, size, count, position = self._directory64(position)
        if start + size > position:
            raise self._error("its directory is not before its end")
        return start, size, count

    def _directory64(self, end: int) -> tuple[int, int, int, int]:
        where = end - _END64_LOCATOR.size
        if where < 0:
            raise self._error("the zip64 directory is missing")
        mark, _, position, _ = _END64_LOCATOR.unpack(self.file.read(where, _END64_LOCATOR.size))
        if mark != b"PK\x06\x07" or position + _END64.size > where:
            raise self._error("the zip64 directory is missing")
        fields = _END64.unpack(self.file.read(position, _END64.size))
        if fields[0] != b"PK\x06\x06":
            raise self._error("the zip64 directory is not where it should be")
        return fields[9], fields[8], fields[7], position

    def _parse(self, directory: bytes, count: int, start: int) -> Iterator[Entry]:
        at = 0
        for _ in range(count):
            if at + _CENTRAL.size > len(directory):
                raise self._error("its directory is cut short")
            fields = _CENTRAL.unpack_from(directory, at)
            lengths = fields[10:13]
            after = at + _CENTRAL.size
            at = after + sum(lengths)
            if fields[0] != b"PK\x01\x02" or at > len(directory):
                raise self._error("its directory is damaged")
            name = directory[after : after + lengths[0]]
            extra = directory[after + lengths[0] : after + lengths[0] + lengths[1]]
            yield self._entry(name, extra, fields, start)

    def _entry(self, raw_name: bytes, extra: bytes, fields: tuple[int, ...], start: int) -> Entry:
        try:
            name = raw_name.decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(
                f"an entry with a name that is not UTF-8: {raw_name[:100]!r}"
            ) from None
        flags, method, packed, size, header = fields[3], fields[4], fields[8], fields[9], fields[16]
        if 0xFFFFFFFF in (size, packed, header):
            size, packed, header = self._zip64(extra, size, packed, header)
        trouble = ""
        if flags & 1:
            trouble = "is encrypted. Unpack the archive, and pack it again without encryption"
        elif method:
            trouble = (
                "is compressed, and would have to be read whole. Write the file with torch.save, or with "
                "np.savez instead of np.savez_compressed"
            )
        elif size != packed:
            trouble = (
                f"has {size} bytes according to one field, {packed} according to another. The archive "
                "is damaged. Copy it again"
            )
        if header + _LOCAL.size + packed > start:
            raise self._error(f"{name!r} reaches outside the file or into its directory")
        return Entry(header, name, packed, start, trouble)

    def _zip64(self, extra: bytes, *sizes: int) -> list[int]:
        """Sizes and offset; those that did not fit 32 bits come from the zip64 field, in this order."""
        wide = list(sizes)
        missing = [place for place, value in enumerate(wide) if value == 0xFFFFFFFF]
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            if kind == 1 and length >= 8 * len(missing) and at + 4 + length <= len(extra):
                for place, value in zip(
                    missing, struct.unpack_from(f"<{len(missing)}Q", extra, at + 4), strict=True
                ):
                    wide[place] = value
                return wide
            at += 4 + length
        raise self._error("an entry too large for its fields, without a zip64 field")


class PartFile(ByteFile):
    """A part of a file, read as a file: an item that DCP appended to a `.distcp` file."""

    def __init__(self, whole: ByteFile, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > whole.size:
            raise FormatError(
                f"{whole.path} is cut short: an item of the checkpoint should be at bytes {offset} to "
                f"{offset + size}, and the file ends at byte {whole.size}."
            )
        self.whole, self.offset, self.size = whole, offset, size
        self.path = f"{whole.path} (item at byte {offset})"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from the part."""
        self.whole.read_into(self.offset + offset, buffer)

    def check_unchanged(self) -> None:
        """As the whole."""
        self.whole.check_unchanged()

    def close(self) -> None:
        """The whole closes itself."""


def span_of(file: ByteFile, offset: int, length: int) -> Span:
    """A span; of the whole file if `file` is a part of one."""
    if isinstance(file, PartFile):
        return span_of(file.whole, file.offset + offset, length)
    return Span(file, offset, length)
