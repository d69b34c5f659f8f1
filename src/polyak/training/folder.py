"""Writing a run folder: one writer at a time, and nothing that a crash could leave half done."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyak.checkpoints.files import replacing
from polyak.errors import OutputError, UsageError
from polyak.training.recipe import Recipe, load_recipe


@contextmanager
def run_folder(folder: Path, recipe: Recipe, *, resume: bool) -> Iterator[Path]:
    """Hold a run folder for writing: a new one, or with `resume` the one that this recipe began.

    Raises OutputError where it exists already or cannot be written, UsageError where another run
    is writing to it, or where it holds a run of another recipe.
    """
    with _writable(folder):
        is_taken = folder.exists() and any(folder.iterdir())
    if is_taken and not resume:
        raise OutputError(
            f"{folder} is not empty. Add --resume to go on with the run in it, "
            "or choose another --output."
        )
    if resume:
        _check_same_recipe(folder, recipe)
    with _writable(folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = (folder / "checkpoints" / "lock").open("w")
    with lock:
        _lock(lock.fileno(), folder)
        for left in folder.rglob(".*.part"):  # by a writer that was killed
            left.unlink()
        if not (folder / "recipe.toml").exists():
            with replacing(folder / "recipe.toml") as part:
                part.write_text(recipe.to_toml(), encoding="utf-8")
        yield folder


class Journal:
    """`metrics.jsonl`: appended to, synced, and cut back to what a checkpoint knows of."""

    def __init__(self, path: Path, length: int) -> None:
        """Open for appending after the first `length` bytes; what follows them is dropped."""
        self._path = path
        found = path.stat().st_size if path.exists() else 0
        if found < length:
            raise OutputError(
                f"{path} has {found} bytes, but the checkpoint knows of {length}: it was cut. "
                "Start anew with another --output."
            )
        with _writable(path):
            self._file = path.open("ab")
            self._file.truncate(length)
        self.length = length

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write whole lines and sync them."""
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with _writable(self._path):
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.length += len(text.encode())

    def close(self) -> None:
        """Close the file; OutputError where what a full disk refused is still to be written."""
        with _writable(self._path):
            self._file.close()


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    path = folder / "recipe.toml"
    if not path.exists():
        left = [p.name for p in folder.iterdir()] if folder.exists() else []
        # A run that was killed before it wrote its recipe leaves these at most.
        if [name for name in left if name != "checkpoints" and not name.endswith(".part")]:
            raise UsageError(f"{folder} holds no run: it has no recipe.toml. Check --output.")
        return
    if differences := recipe.differences(load_recipe(str(path))):
        raise UsageError(
            f"The recipe is not the one that the run in {folder} began with:\n  "
            + "\n  ".join(differences)
            + "\nGive the same command with --resume, or start anew with another --output."
        )


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"Another run is writing to {folder}. Wait for it, or choose another --output."
        ) from error


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"Cannot write {path}: {error.strerror or error}. What was finished is kept; make room "
            "or get the right to write, then go on with --resume, or choose another --output."
        ) from error
