"""Checking a merge against the disk: hashes of the inputs, and the output read once more."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Sequence

from polyak.checkpoints.merging.plan import Plan, Strip
from polyak.checkpoints.merging.resume import Journal
from polyak.checkpoints.merging.writer import OutputFile
from polyak.checkpoints.reading.layout import ByteFile
from polyak.errors import OutputError

_BLOCK = 1 << 20


class Hashes:
    """SHA-256 of every input file, taken in a thread of its own while the merge reads them.

    The same bytes pass at the same time, so the disk gives them once and memory the second time.
    """

    def __init__(self, files: Sequence[ByteFile]) -> None:
        self._files = files
        self._found: dict[str, str] = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._stop = threading.Event()
        self._thread.start()

    def result(self) -> dict[str, str]:
        """Path -> hash; waits for it, and raises what went wrong while reading."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def stop(self) -> None:
        """End early; the result is not wanted any more."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            for file in self._files:
                self._found[file.path] = self._hash(file)
        except BaseException as error:  # handed to the caller's thread by `result`
            self._error = error

    def _hash(self, file: ByteFile) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
        for start in range(0, file.size, _BLOCK):
            if self._stop.is_set():
                break
            piece = buffer[: min(_BLOCK, file.size - start)]
            file.read_into(start, piece)
            digest.update(piece)
        return digest.hexdigest()


def check_written(
    plan: Plan, outputs: Sequence[Sequence[Strip[OutputFile]]], journal: Journal, chunks: range
) -> None:
    """Read these chunks of every output back, from the disk where it can, and compare checksums.

    The files have been synced. Raises OutputError naming the file and the place.
    """
    for file in {
        id(f): f for strips in outputs for strip in strips for f in strip.sources
    }.values():
        if hasattr(os, "posix_fadvise"):  # else what memory holds is compared
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    for index in chunks:
        for strips, expected in zip(outputs, journal.checksums(index), strict=True):
            _check_chunk(plan, strips, index, expected)


def _check_chunk(
    plan: Plan, strips: Sequence[Strip[OutputFile]], index: int, expected: int
) -> None:
    chunk = plan[index]
    size = plan.segments[chunk.segment].bytes_out
    found, last = 0, None
    for file, offset, begin, end in strips[chunk.segment].pieces(
        chunk.begin * size, chunk.end * size
    ):
        found, last = zlib.crc32(file.read(offset, end - begin), found), (file.path, offset)
    if found != expected:
        path, offset = last or ("the output", 0)
        raise OutputError(
            f"{path} does not hold what was written near byte {offset}: the disk or the memory is "
            "faulty. Nothing was published; check the machine, and merge again."
        )
