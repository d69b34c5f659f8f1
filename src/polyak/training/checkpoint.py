"""What `--resume` goes on from: one file, replaced as a whole at the end of each epoch.

A line that says what it is, the SHA-256 of the rest, and the rest: plain values and tensors as
`torch.save` writes them, read back with `weights_only=True`. torch does not notice a flipped bit in
a tensor; the checksum does.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from polyak.checkpoints.files import replacing
from polyak.errors import FormatError, UsageError

_MAGIC = b"polyak run checkpoint 1\n"


@dataclass(frozen=True)
class RunCheckpoint:
    """A run after `done` epochs of all its arms.

    `metrics_bytes` is the length of `metrics.jsonl` then, `arm` the state of the arm in progress
    (None between arms), `branch` the state at which the averaging arms leave SGD.
    """

    environment: dict[str, str]
    data: str
    done: int
    metrics_bytes: int
    arm: dict[str, Any] | None
    branch: dict[str, Any] | None

    def save(self, path: Path) -> None:
        """Replace the file at `path`, or leave it as it was and raise OutputError."""
        buffer = io.BytesIO()
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, buffer)
        content = buffer.getvalue()
        with replacing(path, overwrite=True) as part:
            part.write_bytes(_MAGIC + hashlib.sha256(content).digest() + content)

    def check(self, environment: dict[str, str], data: str) -> None:
        """Refuse, with UsageError, to go on where the result would not be the same bits."""
        changed = [
            f"{name}: {self.environment.get(name)} then, {environment[name]} now"
            for name in environment
            if self.environment.get(name) != environment[name]
        ]
        if changed:
            raise UsageError(
                "This run cannot be resumed here, its bits would differ: "
                + "; ".join(changed)
                + ". Resume it as it was started (OMP_NUM_THREADS sets the threads), "
                "or start anew with another --output."
            )
        if self.data != data:
            raise UsageError(
                "The data is not what this run began with. Give it the same data, "
                "or start anew with another --output."
            )


def read_checkpoint(path: Path) -> RunCheckpoint | None:
    """The checkpoint at `path`, or None where there is none yet.

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
            f"{content[:24]!r}. Start anew with another --output."
        )
    digest, body = content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
    if hashlib.sha256(body).digest() != digest:
        raise FormatError(
            f"{path} is damaged: its checksum does not fit its {len(content)} bytes. The metrics "
            "and weights in the run's folder are whole; start anew with another --output."
        )
    try:
        return RunCheckpoint(**torch.load(io.BytesIO(body), weights_only=True))
    except (RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise FormatError(f"{path} cannot be read: {error}.") from error
