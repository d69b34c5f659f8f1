"""Where checkpoints are stored: a path on this machine, or an address that fsspec understands.

A `Place` is a file or folder; what it learns about it (whether it exists, its size, the names in it) it
asks once. Local files are read by `preadv`: no copy, no shared position, any number of threads. Remote
files are read by ranges.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from polyak.checkpoints.reading.stored import ByteFile
from polyak.errors import ArgumentError, FormatError


class Place:
    """A file or a folder, local or remote: `Place("run/checkpoint-500")`, `Place("s3://bucket/x")`."""

    def __init__(self, path: str | os.PathLike[str], parent: Place | None = None) -> None:
        self.path = os.fspath(path)
        self.remote = "://" in self.path
        self._parent = parent

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path.rstrip("/")).name if self.remote else Path(self.path).name

    @cached_property
    def parent(self) -> Place:
        """The folder that it is in."""
        if self._parent is not None:
            return self._parent
        if self.remote:
            return Place(self.path.rstrip("/").rpartition("/")[0])
        return Place(Path(self.path).absolute().parent)

    @cached_property
    def is_folder(self) -> bool:
        """Whether it is a folder; ArgumentError if nothing is there."""
        if self.remote:
            return self._info.get("type") == "directory"
        try:
            return stat.S_ISDIR(Path(self.path).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            raise ArgumentError(
                f"There is no file or folder {self.path}. Check the path."
            ) from None
        except (OSError, ValueError) as error:
            raise FormatError(f"Could not look at {self.path}: {_reason(error)}.") from error

    @cached_property
    def names(self) -> list[str]:
        """The names in the folder, sorted."""
        if self.remote:
            store, inner = self._address
            found: Iterable[str] = _asked(self.path, lambda: store.ls(inner, detail=False))
            return sorted(PurePosixPath(name.rstrip("/")).name for name in found)
        try:
            return sorted(os.listdir(self.path))  # noqa: PTH208 - the names, without a Path for each
        except OSError as error:
            raise FormatError(f"Could not list {self.path}: {_reason(error)}.") from error

    def inside(self, name: str) -> Place:
        """The file or folder called `name` in this folder."""
        path = f"{self.path.rstrip('/')}/{name}" if self.remote else Path(self.path) / name
        return Place(path, parent=self)

    def path_of(self, inner: Place) -> str:
        """The path of a file in this folder, from here: `unet/config.json`."""
        if self.remote:
            return inner.path.removeprefix(self.path.rstrip("/")).lstrip("/")
        return Path(inner.path).relative_to(self.path).as_posix()

    def file(self) -> ByteFile:
        """The file, opened."""
        if self.remote:
            return RemoteFile(self.path, *self._address, self._info)
        return LocalFile(self.path)

    @cached_property
    def _address(self) -> tuple[Any, str]:
        """The store and the path within it."""
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        try:
            store, inner = url_to_fs(self.path)
        except (ImportError, ValueError) as error:
            raise ArgumentError(f"{self.path} cannot be opened: {error}") from error
        return store, inner

    @cached_property
    def _info(self) -> dict[str, Any]:
        """What the store knows about it."""
        store, inner = self._address
        info: dict[str, Any] = _asked(self.path, lambda: store.info(inner))
        return info


@dataclass(frozen=True, slots=True)
class Identity:
    """Identifies a file and detects that it changed."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """The identity in a `stat` result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


class LocalFile(ByteFile):
    """A regular file on this machine; every descriptor is checked to be of the file first opened.

    Raises ArgumentError if there is no such file, FormatError if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.closed = False
        self.identity: Identity | None = None
        _POOL.take(self)
        _POOL.give_back(self)

    def open_descriptor(self) -> int:
        """A new descriptor, checked to be of a regular file, and of the same one as the first time."""
        try:
            # Non-blocking: opening a pipe that nobody writes to would wait forever.
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
                        f"{self.path} ends at byte {offset + done}, and {wanted - done} more bytes "
                        f"were expected: it is cut short, or was changed while it was read."
                    )
                done += got
        except OSError as error:
            raise FormatError(f"Could not read {self.path}: {_reason(error)}.") from error
        finally:
            _POOL.give_back(self)

    def check_unchanged(self) -> None:
        """Raise FormatError if the file's size, time or inode is not that at opening."""
        try:
            found = Identity.of(os.stat(self.path))  # noqa: PTH116 - the path is a string here
        except OSError as error:
            raise _changed(self.path) from error
        if found != self.identity:
            raise _changed(self.path)

    def close(self) -> None:
        """Close the descriptor; the file cannot be read any more."""
        self.closed = True
        _POOL.drop(self)


def _changed(path: str) -> FormatError:
    return FormatError(
        f"{path} was changed or replaced while it was being read, so nothing read from it can be "
        "trusted. Wait until it is written, then start again."
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@dataclass(slots=True)
class _Open:
    descriptor: int
    users: int = 0


class DescriptorPool:
    """Open descriptors, at most `limit` of them idle; one in use is never closed.

    A thousand open checkpoints, or one of a thousand shards, must not reach the limit of open files:
    the descriptor used longest ago is closed, and opened again when it is needed.
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
    """Half of what this process may open: the rest is for everybody else."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(512, soft // 2)) if soft > 0 else 512


_POOL = DescriptorPool(_limit())


BLOCK_BYTES = 4 << 20
"""What one request to a remote store fetches: small requests cost as long as large ones."""

_KEPT_BLOCKS = 2


class RemoteFile(ByteFile):
    """A remote file, read by ranges through fsspec; blocks of 4 MiB are fetched and two are kept.

    store, inner: the file system of fsspec and the path within it. info: what it knows about the file.
    Raises FormatError if the file cannot be read.
    """

    def __init__(self, path: str, store: Any, inner: str, info: dict[str, Any]) -> None:
        self.path, self._store, self._inner = path, store, inner
        if info.get("type") != "file" or not isinstance(info.get("size"), int):
            raise FormatError(f"{path} is not a file whose size is known.")
        self.size = info["size"]
        self._identity = _identity(info)
        self._blocks: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`: large pieces by a request of their own, small ones from the blocks."""
        if offset + len(buffer) > self.size:
            raise FormatError(f"{self.path} ends at byte {self.size}: it is cut short.")
        if len(buffer) >= BLOCK_BYTES:
            buffer[:] = self._fetch(offset, offset + len(buffer))
            return
        done = 0
        while done < len(buffer):
            number, skip = divmod(offset + done, BLOCK_BYTES)
            piece = self._block(number)[skip : skip + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def check_unchanged(self) -> None:
        """Raise FormatError if the store no longer describes the file as it did at opening."""
        self._store.invalidate_cache()
        info = _asked(self.path, lambda: self._store.info(self._inner))
        if _identity(info) != self._identity:
            raise FormatError(
                f"{self.path} was changed while it was being read. Wait until it is written, then start again."
            )

    def close(self) -> None:
        """Drop the blocks."""
        self._blocks.clear()

    def _block(self, number: int) -> bytes:
        with self._lock:
            if number not in self._blocks:
                start = number * BLOCK_BYTES
                block = self._fetch(start, min(start + BLOCK_BYTES, self.size))
                while len(self._blocks) >= _KEPT_BLOCKS:
                    self._blocks.pop(next(iter(self._blocks)))
                self._blocks[number] = block
            return self._blocks[number]

    def _fetch(self, start: int, end: int) -> bytes:
        data: bytes = _asked(
            self.path, lambda: self._store.cat_file(self._inner, start=start, end=end)
        )
        if len(data) != end - start:
            raise FormatError(
                f"{self.path}: bytes {start} to {end} were requested, and {len(data)} bytes came. "
                "It was changed while it was being read, or its server does not support ranges."
            )
        return data


def _asked(path: str, question: Callable[[], Any]) -> Any:
    """The answer of a store; errors of any library as a PolyakError."""
    try:
        return question()
    except FileNotFoundError:
        raise ArgumentError(f"There is nothing at {path}. Check the address.") from None
    except Exception as error:
        raise FormatError(f"Could not read {path}: {type(error).__name__}: {error}.") from error


def _identity(info: dict[str, Any]) -> tuple[str, ...]:
    """Identifies a remote file and detects that it changed: whatever the store knows of these."""
    known = ("size", "ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "created")
    return tuple(str(info.get(key)) for key in known)
