"""The checkpoint of a leg: one file, replaced as a whole.

A line that says what it is, the SHA-256 of the rest, and the rest as `torch.save` writes it, read back
with `weights_only=True`. torch does not notice a flipped bit in a tensor; the checksum does.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from polyak.errors import FormatError, UsageError
from polyak.files import replacing

_MAGIC = b"polyak run checkpoint 3\n"


def leg_path(folder: Path, seed: int, arm: str) -> Path:
    """Where the leg of an arm is kept in a run folder."""
    return folder / "checkpoints" / f"seed-{seed}-{arm}.polyak"


def branch_path(folder: Path, seed: int, epoch: int) -> Path:
    """Where the SGD arm is kept as it was after `epoch` epochs, for the arms that leave it there."""
    return folder / "checkpoints" / f"seed-{seed}-epoch-{epoch:03d}.polyak"


@dataclass(frozen=True)
class LegCheckpoint:
    """A leg: what it has measured, and the state of its arm; `{}` once it has ended."""

    environment: dict[str, str]
    data: str
    records: list[dict[str, Any]]
    state: dict[str, Any]

    def save(self, path: Path) -> None:
        """Replace the file at `path`, or leave it as it was and raise OutputError."""
        buffer = io.BytesIO()
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, buffer)
        content = buffer.getvalue()
        with replacing(path, overwrite=True) as part:
            part.write_bytes(_MAGIC + hashlib.sha256(content).digest() + content)

    @classmethod
    def read(cls, path: Path) -> LegCheckpoint | None:
        """The checkpoint at `path`, or None if there is none yet.

        Raises FormatError for a file that is damaged or something else.
        """
        if not path.exists():
            return None
        try:
            content = path.read_bytes()
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror}.") from error
        if not content.startswith(_MAGIC):
            raise FormatError(
                f"{path} is not a checkpoint of this version of polyak: it begins with "
                f"{content[:24]!r}. Start again in another folder."
            )
        digest, body = content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
        if hashlib.sha256(body).digest() != digest:
            raise FormatError(
                f"{path} is damaged: the checksum of its {len(content)} bytes does not match. The "
                "metrics and weights in the run's folder are intact; start again in another folder."
            )
        try:
            return cls(**torch.load(io.BytesIO(body), weights_only=True))
        except (RuntimeError, TypeError, pickle.UnpicklingError) as error:
            raise FormatError(f"{path} cannot be read: {error}.") from error

    def check(self, environment: dict[str, str], data: str) -> None:
        """Raise UsageError if a run resumed here would not end in the same bits."""
        changed = [
            f"{name}: {self.environment.get(name)} then, {environment[name]} now"
            for name in environment
            if self.environment.get(name) != environment[name]
        ]
        if changed:
            raise UsageError(
                "Cannot resume here: the result would not be bit-for-bit the same ("
                + "; ".join(changed)
                + "). Resume as the run was started (--threads or OMP_NUM_THREADS sets the threads), or start "
                "again in another folder."
            )
        if self.data != data:
            raise UsageError(
                "The data is not what this run began with. Resume with the same data, or start "
                "again in another folder."
            )
