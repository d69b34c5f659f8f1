"""The journal of a merge: which chunks are written, so that a killed merge can be resumed.

One record per chunk: a state, and the checksum of what each output was given. 1 means written, 2
means written and synced to the disk. After `kill -9` the operating system still holds what was
written, so both count; after the machine itself went down (another boot id) only 2 does. Checking the
merge against the disk is here too: the inputs' hashes, and the output read once more.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from polyak.checkpoints.merging.outputs import staging_errors
from polyak.checkpoints.merging.plan import ByteRuns, MergePlan
from polyak.checkpoints.reading.stored import ByteFile
from polyak.checkpoints.writing.layouts import OutputFile
from polyak.errors import OutputError
from polyak.files import take_lock

WRITTEN, SYNCED = b"\1", b"\2"
SYNC_SECONDS = 10.0
_HEADER = 64


class Journal:
    """What has been done of `chunks` chunks with `outputs` outputs; held open and locked.

    Raises OutputError where another process holds it.
    """

    def __init__(self, path: Path, chunks: int, outputs: int, *, keep: bool) -> None:
        self.path = path
        self._record = 1 + 4 * outputs
        self._size = _HEADER + chunks * self._record
        with staging_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                take_lock(self._descriptor, path, "this output")
            except OutputError:
                os.close(self._descriptor)
                raise
            self._open(keep=keep)
        self._fresh: list[int] = []
        self._mutex = threading.Lock()
        self._last_sync = time.monotonic()

    def is_done(self, chunk: int) -> bool:
        """Whether the chunk was written before."""
        return self._states[chunk * self._record] != 0

    def mark(self, chunk: int, checksums: Sequence[int]) -> None:
        """Note that a chunk has been written to every output."""
        record = WRITTEN + struct.pack(f"<{len(checksums)}I", *checksums)
        with staging_errors(self.path):
            os.pwrite(self._descriptor, record, _HEADER + chunk * self._record)
        with self._mutex:
            self._fresh.append(chunk)

    def checksums(self, chunk: int) -> tuple[int, ...]:
        """The checksums noted with a chunk that is done."""
        with staging_errors(self.path):
            raw = os.pread(self._descriptor, self._record, _HEADER + chunk * self._record)
        return struct.unpack(f"<{(self._record - 1) // 4}I", raw[1:])

    def sync_if_due(self, files: Sequence[OutputFile]) -> None:
        """Sync every ten seconds, so that a machine that goes down loses no more than that."""
        with self._mutex:
            due = time.monotonic() - self._last_sync > SYNC_SECONDS
            if due:
                self._last_sync = time.monotonic()
        if due:
            self.sync(files)

    def sync(self, files: Sequence[OutputFile]) -> None:
        """Flush the files, then note that what was written before is on the disk."""
        with self._mutex:
            fresh, self._fresh = self._fresh, []
        for file in files:
            file.sync()
        with staging_errors(self.path):
            for chunk in fresh:
                os.pwrite(self._descriptor, SYNCED, _HEADER + chunk * self._record)
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)

    def _open(self, *, keep: bool) -> None:
        content = os.pread(self._descriptor, self._size + 1, 0) if keep else b""
        if len(content) != self._size:
            content = bytes(self._size)
            os.ftruncate(self._descriptor, 0)
            os.ftruncate(self._descriptor, self._size)
        states = bytearray(content[_HEADER:])
        if content[:_HEADER] != _boot_id():
            for at in range(0, len(states), self._record):
                if states[at] == WRITTEN[0]:
                    states[at] = 0
                    os.pwrite(self._descriptor, b"\0", _HEADER + at)
            os.fsync(self._descriptor)
            os.pwrite(self._descriptor, _boot_id(), 0)
        self._states = bytes(states)


def is_complete(path: Path, chunks: range, outputs: int) -> bool:
    """Whether the journal of another part says that all its chunks are on the disk."""
    record = 1 + 4 * outputs
    try:
        content = path.read_bytes()
    except OSError:
        return False
    states = content[_HEADER + chunks.start * record : _HEADER + chunks.stop * record : record]
    return len(states) == len(chunks) and states == SYNCED * len(chunks)


def _boot_id() -> bytes:
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:  # not Linux: nothing that was not synced can be trusted
        text = os.urandom(16).hex().encode()
    return text.strip()[:_HEADER].ljust(_HEADER)


_BLOCK = 1 << 20


class Hashes:
    """SHA-256 of every input file, taken in a separate thread while the merge reads them.

    Both read the same bytes at the same time, so the disk is read once and the page cache twice.
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
        """End early; the result is no longer needed."""
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
    plan: MergePlan,
    outputs: Sequence[Sequence[ByteRuns[OutputFile]]],
    journal: Journal,
    chunks: range,
) -> None:
    """Read these chunks of every output back, from the disk where it can, and compare checksums.

    The files have been synced. Raises OutputError naming the file and the place.
    """
    for file in {id(f): f for one in outputs for runs in one for f in runs.sources}.values():
        if hasattr(os, "posix_fadvise"):  # else what memory holds is compared
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    for index in chunks:
        for one, expected in zip(outputs, journal.checksums(index), strict=True):
            _check_chunk(plan, one, index, expected)


def _check_chunk(
    plan: MergePlan, output: Sequence[ByteRuns[OutputFile]], index: int, expected: int
) -> None:
    chunk = plan[index]
    size = plan.segments[chunk.segment].bytes_out
    found, last = 0, None
    row = output[chunk.segment]
    for file, offset, begin, end in row.runs(chunk.begin * size, chunk.end * size):
        found, last = zlib.crc32(file.read(offset, end - begin), found), (file.path, offset)
    if found != expected:
        path, offset = last or ("the output", 0)
        raise OutputError(
            f"{path} does not hold what was written near byte {offset}: the disk or the memory is "
            "faulty. Nothing was published; check the machine, and merge again."
        )
