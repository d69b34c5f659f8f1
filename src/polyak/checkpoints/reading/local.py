"""Local files, read by `preadv`: no copy in between, no shared position, any number of threads."""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass

from polyak.checkpoints.reading.layout import ByteFile
from polyak.errors import ArgumentError, FormatError


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a file from another, and from itself after a change."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """The identity in a `stat` result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


class LocalFile(ByteFile):
    """A regular file on this machine, with the identity that it had when it was opened.

    Raises ArgumentError where there is no such file, FormatError where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.closed = False
        self.identity: Identity | None = None
        _POOL.take(self)
        _POOL.give_back(self)

    def open_descriptor(self) -> int:
        """A new descriptor, checked to be a regular file, and the same as at first."""
        try:
            # Non-blocking: opening a pipe that nobody writes to would wait for ever.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise ArgumentError(f"There is no file {self.path}. Check the path.") from None
        except (OSError, ValueError) as error:
            raise FormatError(f"Could not open {self.path}: {_reason(error)}.") from error
        status = os.fstat(descriptor)
        found = Identity.of(status)
        if not stat.S_ISREG(status.st_mode) or found != (self.identity or found):
            os.close(descriptor)
            if self.identity is None:
                raise FormatError(f"{self.path} is not a regular file.")
            raise _changed(self.path)
        self.identity, self.size = found, found.size
        return descriptor

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; loops, since one call reads at most 0x7ffff000 bytes and may read fewer."""
        descriptor = _POOL.take(self)
        try:
            done, wanted = 0, len(buffer)
            while done < wanted:
                got = os.preadv(descriptor, [buffer[done:] if done else buffer], offset + done)
                if not got:
                    raise FormatError(
                        f"{self.path} ends at byte {offset + done}, and {wanted - done} bytes more "
                        f"were expected: it is cut short, or was changed while it was read."
                    )
                done += got
        except OSError as error:
            raise FormatError(f"Could not read {self.path}: {_reason(error)}.") from error
        finally:
            _POOL.give_back(self)

    def check_unchanged(self) -> None:
        """Raise FormatError if size, time or inode at the path differ from those at opening."""
        try:
            found = Identity.of(os.stat(self.path))  # noqa: PTH116 - the path is a string here
        except OSError as error:
            raise _changed(self.path) from error
        if found != self.identity:
            raise _changed(self.path)

    def close(self) -> None:
        """Close the descriptor, and refuse to open another."""
        self.closed = True
        _POOL.drop(self)


def _changed(path: str) -> FormatError:
    return FormatError(
        f"{path} was changed or replaced while it was being read. Nothing read from it can be "
        "trusted; wait until it is written, and start again."
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@dataclass(slots=True)
class _Open:
    descriptor: int
    users: int = 0


class DescriptorPool:
    """Open descriptors, at most `limit` of them idle; one in use is never closed.

    A checkpoint of a thousand shards, or a thousand checkpoints, must not run into the limit of
    open files: the descriptor used longest ago is closed, and opened again when it is needed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[LocalFile, _Open] = OrderedDict()

    def take(self, file: LocalFile) -> int:
        """A descriptor of `file`, in use until `give_back`."""
        with self._lock:
            entry = self._open.get(file)
            if entry is None:
                if file.closed:
                    raise FormatError(f"{file.path} was closed. Open the checkpoint again.")
                self._make_room()
                entry = self._open[file] = _Open(file.open_descriptor())
            else:
                self._open.move_to_end(file)
            entry.users += 1
            return entry.descriptor

    def give_back(self, file: LocalFile) -> None:
        """End one use; closes the descriptor if the file was closed meanwhile."""
        with self._lock:
            entry = self._open[file]
            entry.users -= 1
            if file.closed and not entry.users:
                os.close(self._open.pop(file).descriptor)

    def drop(self, file: LocalFile) -> None:
        """Close the descriptor of `file` if nobody uses it (else the last user does)."""
        with self._lock:
            entry = self._open.get(file)
            if entry is not None and not entry.users:
                os.close(self._open.pop(file).descriptor)

    def _make_room(self) -> None:
        while len(self._open) >= self.limit:
            idle = next((file for file, entry in self._open.items() if not entry.users), None)
            if idle is None:
                return
            os.close(self._open.pop(idle).descriptor)


def _limit() -> int:
    """Half of what this process may open, leaving the rest to everybody else."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(512, soft // 2)) if soft > 0 else 512


_POOL = DescriptorPool(_limit())
