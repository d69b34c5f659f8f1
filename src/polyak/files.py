"""Files are written beside their place, synced, then moved: a crash leaves the old file or none."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from polyak.errors import ArgumentError, OutputError


def as_path(path: object) -> Path:
    """A path given as text or Path; ArgumentError for anything else, and for an empty text."""
    if path == "":
        raise ArgumentError("A path is empty; expected a name. Is a variable of the shell not set?")
    if isinstance(path, str | os.PathLike):
        return Path(path)
    raise ArgumentError(f"Expected a path; found {path!r}.")


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `path` exists and overwriting was not asked for."""
    if os.path.exists(path) and not overwrite:  # noqa: PTH110 - Path.exists raises for long names
        raise OutputError(
            f"{path} exists. Choose another name, or pass overwrite=True to replace it."
        )


def file_target(path: object, *, overwrite: bool) -> Path:
    """The path of a file to be written, for a check before hours of work.

    Raises OutputError for a folder or a name that ends in a slash, a folder that is missing, and where a file
    exists and overwriting was not asked for.
    """
    target = as_path(path)
    if names_folder(path) or os.path.isdir(target):  # noqa: PTH112 - as in refuse_existing
        raise OutputError(
            f"{path} is a folder; expected the name of a file, like {target / 'name'}."
        )
    refuse_existing(target, overwrite=overwrite)
    check_place(target)
    return target


def check_place(target: Path) -> None:
    """Raise OutputError unless the folder in which `target` is to be written is there, on this machine."""
    parent = target.parent
    with writing_errors(target):
        if parent.is_dir():
            return
        if target.parts[0].endswith(":"):  # Path makes one slash of the two in s3://
            raise OutputError(
                f"{target} is an address; outputs are written to folders of this machine. Write to one, and copy "
                "the output from there."
            )
        if parent.exists():
            raise OutputError(
                f"{parent} is a file, so {target.name} cannot be written in it. Choose another folder."
            )
    raise OutputError(
        f"There is no folder {parent} for {target.name}. Make the folder {parent} first."
    )


def names_folder(path: object) -> bool:
    """Whether a path is written as that of a folder, by its last slash, which `Path` forgets."""
    return isinstance(path, str | os.PathLike) and os.fspath(path).endswith(("/", os.sep))


@contextmanager
def writing_errors(path: str | os.PathLike[str], retry: str = "try again") -> Iterator[None]:
    """Turn an OSError of the block into one OutputError that names `path` and what to do.

    retry: the last words of the message, for callers that can continue what they began.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own error
        reason = getattr(error, "strerror", None) or error
        failed = OutputError(
            f"Could not write {path}: {reason}. {_advice(error, path)}, and {retry}."
        )
        failed.errno = getattr(error, "errno", None)
        raise failed from None  # the message says all that the other one does


def _advice(error: Exception, path: str | os.PathLike[str]) -> str:
    """What to do about it: the beginning of a sentence."""
    folder = Path(path).parent
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error):
        return "Make room"
    if number == errno.ENOENT and not folder.is_dir():
        return f"Make the folder {folder} first"
    if number == errno.ENOTDIR:
        return "Choose another folder: a part of this path is a file"
    if number == errno.EROFS:
        return "Choose a folder on another file system"
    return _ADVICE.get(number or 0, "Choose another folder, or fix its permissions")


_ADVICE = {
    errno.EISDIR: "Choose another name: this is a folder",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EIO: "Check the disk",
}


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to; sync it and move it into place if the block succeeds.

    Raises OutputError if `path` exists and `overwrite` is False, or if the disk is full or not
    writable; the half-written file is removed, and what was at `path` stays.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "answer.txt"
    >>> with replacing(target) as part:
    ...     _ = part.write_text("42")
    >>> target.read_text()
    '42'
    """
    target = Path(path)
    refuse_existing(target, overwrite=overwrite)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with writing_errors(target, "try again; nothing was changed"):
        try:
            part.touch()
            mode = part.stat().st_mode
            yield part
            part.chmod(mode)  # safetensors leaves its files to their owner alone
            sync(part)
            part.replace(target)
            sync(target.parent)
        finally:
            with suppress(OSError):  # where it could not be made it cannot be removed either
                part.unlink()


@contextmanager
def replacing_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """As `replacing`, with a folder to fill; what is written into it is synced by whoever wrote it.

    A folder cannot replace another in one step: between two renames the old one is a hidden folder beside
    `path`. A block that fails leaves the old one where it was.
    """
    target = Path(path)
    refuse_existing(target, overwrite=overwrite)
    part, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    with writing_errors(target, "try again; nothing was changed"):
        try:
            part.mkdir()
            yield part
            sync(part)
            if target.exists():
                target.replace(old)
            part.replace(target)
            sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def take_lock(descriptor: int, path: object, output: object, *, shared: bool = False) -> None:
    """Lock an open file or folder until it is closed, or the process ends.

    Raises OutputError if another process writes `output`, whose lock `path` is. shared: only ask whether.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"Another process is writing {output} (it holds the lock {path}). Wait for it, or choose another "
            "name."
        ) from None


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
