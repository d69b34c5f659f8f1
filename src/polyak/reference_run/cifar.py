"""CIFAR-10 and CIFAR-100 in their binary layout: records of labels and 3,072 pixel bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyak.errors import FormatError

_PIXELS = 3 * 32 * 32
_CIFAR10 = ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"])
_CIFAR100 = (["train.bin"], ["test.bin"])
CIFAR_FILES = {name for names in (*_CIFAR10, *_CIFAR100) for name in names}
"""Of CIFAR-10 and CIFAR-100, binary version."""


def read_cifar(folder: Path) -> tuple[NDArray[np.uint8], ...]:
    """Training images `(n, 3, 32, 32)` and labels `(n,)`, then those of the test set.

    Of CIFAR-100 the fine labels. Raises FormatError for a file that is missing, cut short or damaged.
    """
    if any((folder / name).exists() for names in _CIFAR10 for name in names):
        (train, test), n_labels, n_classes = _CIFAR10, 1, 10
    else:
        (train, test), n_labels, n_classes = _CIFAR100, 2, 100
    if missing := [name for name in (*train, *test) if not (folder / name).exists()]:
        raise FormatError(
            f"{folder} has no {', '.join(missing)}; expected {', '.join((*train, *test))}, CIFAR-{n_classes}'s binary "
            "version. Fetch it again."
        )
    return *_read(folder, train, n_labels, n_classes), *_read(folder, test, n_labels, n_classes)


def _read(
    folder: Path, names: list[str], n_labels: int, n_classes: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    records = np.concatenate([_records(folder / name, n_labels + _PIXELS) for name in names])
    labels = records[:, n_labels - 1]
    if labels.max() >= n_classes:
        first = int((labels >= n_classes).argmax())
        raise FormatError(
            f"{folder}: label {labels[first]} at index {first} of {', '.join(names)}; expected 0 to "
            f"{n_classes - 1}."
        )
    return records[:, n_labels:].reshape(-1, 3, 32, 32), labels


def _records(path: Path, size: int) -> NDArray[np.uint8]:
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not len(content) or len(content) % size:
        raise FormatError(
            f"{path} has {len(content):,} bytes; expected whole records of {size:,}. It is cut short or "
            "damaged; fetch it again."
        )
    return content.reshape(-1, size)
