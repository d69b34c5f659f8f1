"""The text of a run, as windows of bytes to train on, to validate on, and to test on.

The parts are contiguous: the first nine tenths are trained on, the next twentieth validates, the last one
tests. A training window begins at any byte; those of the other parts are side by side, and of a long text
evenly spread over its part.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from polyak.errors import ArgumentError, FormatError, require
from polyak.reference_run.data import Data, Split

EMBEDDED_TEXT = Path(__file__).parent / "texts" / "moby-dick.txt.xz"
EMBEDDED_TEXT_SHA256 = "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"
VOCABULARY = 256
"""The values of a byte."""
_PARTS = (0.9, 0.95)  # where validation begins and where it ends
_VALIDATION_BYTES, _TEST_BYTES = 1 << 14, 1 << 15  # measured at most


@dataclass(frozen=True)
class TextData(Data):
    """Windows of a text, and the text as uint8 `(n,)`."""

    text: Tensor
    context: int

    @property
    def n_classes(self) -> int:
        """The values of a byte."""
        return VOCABULARY

    def digest(self) -> str:
        """SHA-256 of the text and of how it is cut."""
        total = hashlib.sha256(f"context {self.context}".encode())
        total.update(self.text.numpy().data)
        return total.hexdigest()


def load_text(path: str, context: int) -> TextData:
    """The text in a file, or the one that ships, in windows of `context` bytes.

    Raises ArgumentError if there is no such file or its text is too short, FormatError if it cannot be read.
    """
    content = read_text(path) if path else embedded_text()
    return _windows(content, context, path or "the text")


@functools.lru_cache(maxsize=1)  # a run and its report use the same data
def _windows(content: bytes, context: int, name: str) -> TextData:
    return windows_of(content, context, name)


def embedded_text() -> bytes:
    r"""The text that ships: the chapters of Moby-Dick (Melville 1851; public domain), 1.2 MB.

    >>> embedded_text()[:41]
    b'CHAPTER 1. Loomings.\n\nCall me Ishmael. So'
    """
    try:
        content = lzma.decompress(EMBEDDED_TEXT.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise FormatError(f"{EMBEDDED_TEXT} cannot be read ({error}). Reinstall polyak.") from error
    if hashlib.sha256(content).hexdigest() != EMBEDDED_TEXT_SHA256:
        raise FormatError(f"{EMBEDDED_TEXT} is not the file that polyak shipped. Reinstall polyak.")
    return content


def read_text(path: str) -> bytes:
    """The bytes of a file, whatever they are: the network learns bytes."""
    file = Path(path)
    if not file.exists():
        raise ArgumentError(
            f"data is {path!r}, and there is no such file; expected the path of a text."
        )
    if not file.is_file():
        raise ArgumentError(
            f"data is {path!r}, which is not a file; expected the path of one text."
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from error


def windows_of(content: bytes, context: int, name: str) -> TextData:
    """A text cut into its three parts, each into windows of `context` bytes and the byte after them.

    >>> data = windows_of(bytes(range(200)), 8, "it")
    >>> len(data.train), len(data.validation), data.validation.inputs[0, 0], data.validation.labels[0, 0]
    (172, 1, tensor(180, dtype=torch.uint8), tensor(181, dtype=torch.uint8))
    """
    text = torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))
    begin, end = (round(share * len(text)) for share in _PARTS)
    parts = {"train": text[:begin], "validation": text[begin:end], "test": text[end:]}
    fewest = 20 * (context + 1)
    require(
        len(text) >= fewest,
        f"{name} has {len(text):,} bytes, of which the parts to validate and to test on are a twentieth each; "
        f"expected {fewest:,} or more for windows of {context} bytes (context). Take a longer text.",
    )
    return TextData(
        train=_split(parts["train"].unfold(0, context + 1, 1)),
        validation=_spread(parts["validation"], context, _VALIDATION_BYTES),
        test=_spread(parts["test"], context, _TEST_BYTES),
        text=text,
        context=context,
    )


def _spread(part: Tensor, context: int, n_bytes: int) -> Split:
    """Windows side by side; of those of a longer part as many as have `n_bytes`, evenly spread."""
    windows = part.unfold(0, context + 1, context)
    n = max(1, min(len(windows), n_bytes // context))
    return _split(windows[torch.arange(n) * len(windows) // n])


def _split(windows: Tensor) -> Split:
    return Split(windows[:, :-1], windows[:, 1:])
