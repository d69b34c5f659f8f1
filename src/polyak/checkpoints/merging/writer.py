"""Writing at final offsets: what a layout is, the file it writes to, and safetensors.

Every shape and dtype of the output is known before a byte is read, so the header can be written
first and the values by any thread in any order. Read it back with `safetensors`: nothing of ours
is needed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from polyak.checkpoints.merging.policy import MergedTensor
from polyak.errors import FormatError, OutputError

MAX_HEADER = 100_000_000
_ALIGNMENT = 4096  # the values begin on a page, which direct reads and memory maps like


class OutputFile:
    """A file that is written in pieces by any number of threads."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        with writing_errors(path):
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.ftruncate(self.descriptor, size)

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write all of `data` at `offset`; OutputError where the disk is full or gone."""
        view = memoryview(data)
        with writing_errors(self.path):
            while view:
                done = os.pwrite(self.descriptor, view, offset)
                view, offset = view[done:], offset + done

    def read(self, offset: int, length: int) -> bytes:
        """Bytes that were written."""
        with writing_errors(self.path):
            data = os.pread(self.descriptor, length, offset)
        if len(data) < length:
            raise OutputError(f"{self.path} lost bytes after {offset + len(data)}. Start again.")
        return data

    def sync(self) -> None:
        """Flush to the disk."""
        with writing_errors(self.path):
            os.fsync(self.descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


class writing_errors:  # noqa: N801 - reads as what it is: `with writing_errors(path):`
    """Turn an OSError into the OutputError that says what to do."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, OutputError):
            return
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "Make room" if full else "Choose another folder, or mend this one"
        raise OutputError(
            f"Could not write {self._path}: {error.strerror or error}. {advice}; a merge that was "
            "interrupted continues with resume=True (--resume)."
        ) from error


class Layout(Protocol):
    """Where the bytes of each tensor go in one file, and what stands around them."""

    size: int
    offsets: list[int]

    def begin(self, file: OutputFile) -> None:
        """Write what can be written before the values."""

    def finish(self, file: OutputFile, metadata: Mapping[str, str]) -> None:
        """Write what is only known after them; `metadata` as long as at first."""


class SafetensorsLayout:
    """One safetensors file: the header, padded so that the values begin on a page, then the values.

    Raises FormatError where the header would exceed the format's limit of 100 MB.
    """

    def __init__(self, tensors: Sequence[MergedTensor], metadata: Mapping[str, str]) -> None:
        self._tensors = tensors
        header = self._header(metadata)
        self._room = -(-(8 + len(header)) // _ALIGNMENT) * _ALIGNMENT - 8
        if self._room > MAX_HEADER:
            raise FormatError(
                f"The header of {len(tensors)} tensors takes {self._room} bytes; safetensors allows "
                f"{MAX_HEADER}. Write shards (shard_size=), or a torch archive (.pt)."
            )
        self._prologue = self._padded(header)
        self.offsets: list[int] = []
        position = 8 + self._room
        for tensor in tensors:
            self.offsets.append(position)
            position += tensor.nbytes
        self.size = position

    def begin(self, file: OutputFile) -> None:
        """Write the header."""
        file.write(0, self._prologue)

    def finish(self, file: OutputFile, metadata: Mapping[str, str]) -> None:
        """Write the header once more, now with the hashes that room was kept for."""
        file.write(0, self._padded(self._header(metadata)))

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        for tensor in self._tensors:
            end = position + tensor.nbytes
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()

    def _padded(self, header: bytes) -> bytes:
        return self._room.to_bytes(8, "little") + header.ljust(self._room, b" ")
