"""Scores that are kept: one small file for each evaluation, named by all that it depends on."""

from __future__ import annotations

import base64
import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from polyak.errors import ArgumentError, OutputError
from polyak.files import replacing, writing_errors

FOLDER = ".scores"


class KeptScores:
    """A folder of scores. An unfinished or damaged file counts as none, and is written again."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ArgumentError(
                f"cache is {folder}, which is a file; expected a folder, new or of an earlier search."
            )
        self._folder = folder

    def get(self, key: str) -> Tensor | None:
        """The score, a 0-d or 1-D float64 tensor; None if it is not known."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(self._path(key).read_bytes())
            values = bytearray(base64.b64decode(said["scores"], validate=True))
            if said["key"] == key and said["sha256"] == _digest(values):
                found = torch.frombuffer(values, dtype=torch.float64)
                return found[0] if said["single"] else found
        return None

    def put(self, key: str, scores: Tensor, about: dict[str, str]) -> None:
        """Keep it. Raises OutputError where the folder cannot be written."""
        values = scores.detach().cpu().double().contiguous()
        raw = values.reshape(-1).numpy().tobytes()
        said = {
            **about,
            "key": key,
            "single": values.ndim == 0,
            "sha256": _digest(raw),
            "scores": base64.b64encode(raw).decode(),
        }
        with writing_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(key), overwrite=True) as part:
            part.write_text(json.dumps(said), encoding="utf-8")

    def try_put(self, key: str, scores: Tensor, about: dict[str, str]) -> str | None:
        """Keep it if the folder can be written; otherwise why not."""
        try:
            self.put(key, scores, about)
        except OutputError as error:
            return str(error)
        return None

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"


def key_of(*parts: str) -> str:
    """A name made of everything that a score depends on."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:24]


def _digest(raw: bytes | bytearray) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
