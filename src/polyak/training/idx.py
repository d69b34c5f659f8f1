"""The IDX files of MNIST and its kin: a big-endian header, then bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polyak.errors import FormatError

_UNSIGNED_BYTES = 0x08


def read_images(folder: Path, name: str) -> NDArray[np.uint8]:
    """Images `(n, height, width)` of `folder/name`, or of `name.gz`. Raises FormatError."""
    path, values = _read(folder, name, n_dimensions=3)
    if values.shape[1] != values.shape[2]:
        raise FormatError(f"{path}: images are {values.shape[1:]} pixels; expected squares.")
    return values


def read_labels(folder: Path, name: str, n_images: int, n_classes: int) -> NDArray[np.uint8]:
    """Labels `(n_images,)` of `folder/name`, each below `n_classes`. Raises FormatError."""
    path, labels = _read(folder, name, n_dimensions=1)
    if len(labels) != n_images:
        raise FormatError(f"{path} holds {len(labels)} labels, but there are {n_images} images.")
    if labels.max() >= n_classes:
        first = int((labels >= n_classes).argmax())
        raise FormatError(
            f"{path}: label {labels[first]} at index {first}; expected 0 to {n_classes - 1}."
        )
    return labels


def _read(folder: Path, name: str, *, n_dimensions: int) -> tuple[Path, NDArray[np.uint8]]:
    path = _existing(folder, name)
    content = _content(path)
    header = 4 + 4 * n_dimensions
    if len(content) < header or content[:4] != bytes([0, 0, _UNSIGNED_BYTES, n_dimensions]):
        raise FormatError(
            f"{path} is not an IDX file of bytes with {n_dimensions} dimensions: it begins with "
            f"{content[:4].hex(' ')}."
        )
    shape = struct.unpack(f">{n_dimensions}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) != expected or not math.prod(shape):
        raise FormatError(
            f"{path}: its header says {shape}, {expected} bytes in all, but it has {len(content)}. "
            "It is cut short or damaged; fetch it again."
        )
    return path, np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _existing(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FormatError(
        f"{folder} has neither {name} nor {name}.gz. Expected the four files of an MNIST-like set; "
        "Debian's dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist."
    )


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FormatError(f"{path} is cut short or damaged ({error}); fetch it again.") from error
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from error
