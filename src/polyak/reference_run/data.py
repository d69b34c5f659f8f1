"""The data of a run: images that ship, IDX files, CIFAR's files, or custom ones; their order and augmentation.

Permutations and augmentations are pure functions of (seed, epoch, index). The draws for an epoch come
from a counter-based generator keyed by (seed, epoch, purpose), of which image `index` takes the
index-th: no state carries over from one epoch to the next, so a resumed run sees what an
uninterrupted one does, and so do the arms of one seed.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from polyak.errors import ArgumentError, FormatError, require, some
from polyak.objects import call_object
from polyak.reference_run.cifar import CIFAR_FILES, read_cifar
from polyak.reference_run.recipe import Recipe

EMBEDDED = Path(__file__).parent / "images" / "fashion.npz"
EMBEDDED_SHA256 = "a8bb457daf23e0144f6a14ace76caac7a210c97ae8b87b8f9388ea9d475181de"
N_CLASSES = 10
IDX_FILES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip
_FULL_SETS = (
    "the four IDX files of an MNIST-like set (train-images-idx3-ubyte, ..., or .gz), or CIFAR's binary files "
    "(data_batch_1.bin to data_batch_5.bin and test_batch.bin, or train.bin and test.bin)"
)
_MAX_CLASSES = 100_000
MEAN, STD = 0.2860, 0.3530
"""Of the pixels of Fashion-MNIST's training images, scaled to [0, 1]."""
_UNSIGNED_BYTES = 0x08
_PERMUTATION, _FLIPS, _SHIFTS = 0, 1, 2


@dataclass(frozen=True)
class Split:
    """Inputs and labels: images `(n, channels, height, width)`, float32, and their classes `(n,)`, int64.

    Of a text windows `(n, context)`, and the bytes that follow each of theirs, `(n, context)`, uint8.
    """

    inputs: Tensor
    labels: Tensor

    @property
    def images(self) -> Tensor:
        """The inputs, where they are images."""
        return self.inputs

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[Tensor]:
        """The inputs in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.inputs[start : start + size]


@dataclass(frozen=True)
class Data:
    """Images to train on, to validate on, and to test on."""

    train: Split
    validation: Split
    test: Split

    @property
    def n_channels(self) -> int:
        """The number of channels of an image."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width of an image in pixels."""
        return self.train.images.shape[2]

    @property
    def n_classes(self) -> int:
        """One more than the largest label."""
        return 1 + max(int(getattr(self, f.name).labels.max()) for f in fields(self))

    def digest(self) -> str:
        """SHA-256 of all images and labels, which tells whether two runs use the same data."""
        total = hashlib.sha256()
        for f in fields(self):
            split = getattr(self, f.name)
            for tensor in (split.images, split.labels):
                total.update(str(tuple(tensor.shape)).encode())
                total.update(tensor.numpy().data)
        return total.hexdigest()


def load_data(recipe: Recipe) -> Data:
    """The data of a recipe, on the CPU; the same data is loaded once per process.

    Raises ArgumentError if `data` names nothing that fits, FormatError for files that are missing,
    cut short or damaged, or hold labels out of range.
    """
    if recipe.task == "words":
        from polyak.reference_run.text import load_text  # which makes windows of this module's kind

        return load_text(recipe.data, recipe.context)
    require(
        bool(recipe.data or recipe.data_folder) or not recipe.own_data,
        f"The recipe {recipe.name} is for images that polyak does not ship, and neither data_folder nor data is given. "
        "Pass data_folder=FOLDER with CIFAR's binary files or four IDX files. The recipes default and wrn train on the "
        "images that ship.",
    )
    return _loaded(recipe.data, recipe.data_folder)


@functools.lru_cache(maxsize=1)  # a run and its report use the same data
def _loaded(function: str, folder: str) -> Data:
    if function:
        return custom_data(function)
    if folder:
        return _full_set(Path(folder))
    return embedded_data()


def _full_set(folder: Path) -> Data:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(
            f"data_folder is '{folder}', and there is no such folder; expected one with {_FULL_SETS}. "
            "Debian's dataset-fashion-mnist puts the first into /usr/share/datasets/fashion-mnist."
        ) from None
    except OSError as error:
        raise FormatError(f"{folder} cannot be read: {error.strerror or error}.") from error
    if any(name in CIFAR_FILES for name in names):
        return cifar_data(folder)
    if any(name.removesuffix(".gz") in IDX_FILES for name in names):
        return idx_data(folder)
    raise FormatError(
        f"{folder} holds no images that polyak reads: found {some(names) or 'nothing'}; expected {_FULL_SETS}."
    )


def _unseen_labels(data: Data) -> str:
    """A sentence about labels of the other images that no training image has; empty without any."""
    for name in ("validation", "test"):
        labels = getattr(data, name).labels
        unseen = labels[~torch.isin(labels, data.train.labels)].unique().tolist()
        if unseen:
            shown = ", ".join(map(str, unseen[:10])) + (", ..." if len(unseen) > 10 else "")
            return (
                f"the {name} images have the labels {shown}, which no training image has, so no model "
                "can learn them. Split the data so that every class is in train."
            )
    return ""


def embedded_data() -> Data:
    """The images that ship: 6,000 to train on, 2,000 to validate on, 4,000 to test on.

    The first of Fashion-MNIST in the official order (Xiao et al. 2017, arXiv 1708.07747; MIT).

    >>> data = embedded_data()
    >>> len(data.train), len(data.validation), len(data.test), tuple(data.train.images.shape[1:])
    (6000, 2000, 4000, (1, 28, 28))
    """
    try:
        with np.load(EMBEDDED) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{EMBEDDED} cannot be read ({error}). Reinstall polyak.") from error
    if embedded_digest(arrays) != EMBEDDED_SHA256:
        raise FormatError(f"{EMBEDDED} is not the file that polyak shipped. Reinstall polyak.")
    images, labels = arrays["train_images"], arrays["train_labels"]
    return Data(
        train=_split(images[:6000], labels[:6000]),
        validation=_split(images[6000:], labels[6000:]),
        test=_split(arrays["test_images"], arrays["test_labels"]),
    )


def embedded_digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over the arrays in the order of their names, whatever the compression was."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].shape} {arrays[name].dtype}".encode())
        total.update(np.ascontiguousarray(arrays[name]).data)
    return total.hexdigest()


def _split(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Split:
    scaled = torch.from_numpy(images.astype(np.float32)).unsqueeze(1).div_(255)
    return Split(scaled.sub_(MEAN).div_(STD), torch.from_numpy(labels.astype(np.int64)))


def idx_data(folder: Path) -> Data:
    """The four IDX files of an MNIST-like set, gzipped or not; the last twelfth validates."""
    names = IDX_FILES
    images = read_images(folder, names[0])
    labels = read_labels(folder, names[1], len(images), N_CLASSES)
    test_images = read_images(folder, names[2])
    test_labels = read_labels(folder, names[3], len(test_images), N_CLASSES)
    if images.shape[1:] != test_images.shape[1:]:
        raise FormatError(
            f"{folder}: training images are {images.shape[1:]} pixels, test images "
            f"{test_images.shape[1:]}; expected the same."
        )
    cut = len(images) - len(images) // 12
    data = Data(
        train=_split(images[:cut], labels[:cut]),
        validation=_split(images[cut:], labels[cut:]),
        test=_split(test_images, test_labels),
    )
    if problem := _unseen_labels(data):
        raise FormatError(f"{folder}: {problem}")
    return data


def cifar_data(folder: Path) -> Data:
    """CIFAR-10 or CIFAR-100 in its binary layout; the last tenth of the training images validates.

    Pixels are scaled by the mean and the standard deviation of each channel of the training images.
    """
    images, labels, test_images, test_labels = read_cifar(folder)
    cut = len(images) - len(images) // 10
    pixels = images[:cut].astype(np.float32) / 255
    mean, std = (f(pixels, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))

    def scaled(part: NDArray[np.uint8], of: NDArray[np.uint8]) -> Split:
        values = (part.astype(np.float32) / 255 - mean) / np.maximum(std, 1e-6)
        return Split(torch.from_numpy(values), torch.from_numpy(of.astype(np.int64)))

    data = Data(
        train=scaled(images[:cut], labels[:cut]),
        validation=scaled(images[cut:], labels[cut:]),
        test=scaled(test_images, test_labels),
    )
    if problem := _unseen_labels(data):
        raise FormatError(f"{folder}: {problem}")
    return data


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


def custom_data(function: str) -> Data:
    """What `package.module:function` returns: `{"train": (images, labels), "validation": .., "test": ..}`.

    Images are float32 `(n, channels, size, size)`, labels int64 `(n,)` from 0 on.
    """
    if ":" not in function and Path(function).exists():
        raise ArgumentError(
            f"data is {function!r}, a path; expected package.module:function that returns images. For a text: "
            f"polyak train words --data {function}."
        )
    given = call_object(function)
    names = [f.name for f in fields(Data)]
    if isinstance(given, Data):
        given = {name: (getattr(given, name).images, getattr(given, name).labels) for name in names}
    if not isinstance(given, Mapping) or set(given) != set(names):
        found = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise ArgumentError(
            f"{function} returned {found}; expected a mapping with train, validation and test, each "
            "a pair (images, labels)."
        )
    data = Data(**{name: _custom_split(function, name, given[name]) for name in names})
    shapes = {name: tuple(getattr(data, name).images.shape[1:]) for name in names}
    if len(set(shapes.values())) > 1:
        raise ArgumentError(f"{function}: images are {shapes}; expected one shape.")
    if problem := _unseen_labels(data):
        raise ArgumentError(f"{function}: {problem}")
    return data


def _custom_split(function: str, name: str, pair: Any) -> Split:
    try:
        images, labels = (torch.as_tensor(part).detach().cpu() for part in pair)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{function}: {name} is not a pair (images, labels) of tensors or arrays ({error})."
        ) from error
    if {images.layout, labels.layout} != {torch.strided}:
        raise ArgumentError(f"{function}: {name} is sparse; expected dense tensors.")
    problem = _problem(images, labels)
    if problem:
        raise ArgumentError(f"{function}: {name} {problem}")
    return Split(images.contiguous(), labels.to(torch.int64).contiguous())


def _are_squares(images: Tensor) -> bool:
    _, channels, height, width = images.shape
    return channels > 0 and height == width > 0


def _problem(images: Tensor, labels: Tensor) -> str:
    if images.ndim != 4 or images.dtype != torch.float32 or not _are_squares(images):
        return (
            f"images are {images.dtype} {tuple(images.shape)}; expected float32 "
            "(n, channels, size, size)."
        )
    if labels.is_floating_point() or labels.shape != images.shape[:1] or not len(labels):
        return (
            f"labels are {labels.dtype} {tuple(labels.shape)}; expected {len(images)} integers, "
            "at least one."
        )
    if int(labels.min()) < 0:
        return f"labels begin at {int(labels.min())}; expected classes counted from 0."
    if int(labels.max()) >= _MAX_CLASSES:
        return f"labels reach {int(labels.max())}; expected classes counted from 0, below {_MAX_CLASSES}."
    if not bool(torch.isfinite(images).all()):
        return "images hold NaN or infinity; expected finite numbers."
    return ""


def permutation(seed: int, epoch: int, n: int, size: int = 0) -> Tensor:
    """The order of `n` examples in an epoch, int64 `(n,)`; with `size`, as many of them, all different.

    >>> sorted(permutation(0, 5, 4).tolist())
    [0, 1, 2, 3]
    """
    generator = _generator(seed, epoch, _PERMUTATION)
    if size:  # without numbers for all: a long text has a window at every byte
        return torch.from_numpy(generator.choice(n, size, replace=False))
    return torch.from_numpy(generator.permutation(n))


@dataclass(frozen=True)
class Augmentation:
    """Random flips and shifts for one epoch; those of an image depend only on its index.

    `flipped` is bool `(n,)`, `shifts` int64 `(n, 2)`, rows and columns in pixels; each is None if
    there are none. Shifted images are filled with the value of their top left corner, the background.
    """

    flipped: Tensor | None
    shifts: Tensor | None

    @classmethod
    def draw(cls, seed: int, epoch: int, n: int, *, flips: bool, shift: int) -> Augmentation:
        """Flips with probability 1/2; shifts uniform over -shift to shift in each direction."""
        flipped = shifts = None
        if flips:
            flipped = torch.from_numpy(_generator(seed, epoch, _FLIPS).random(n) < 0.5)
        if shift:
            drawn = _generator(seed, epoch, _SHIFTS).integers(-shift, shift + 1, size=(n, 2))
            shifts = torch.from_numpy(drawn)
        return cls(flipped, shifts)

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """The images `(b, c, h, w)`, which have these `indices` in the data, augmented."""
        if self.flipped is not None:
            flipped = self.flipped[indices].to(images.device)
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        if self.shifts is not None:
            images = shifted(images, self.shifts[indices].to(images.device))
        return images


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Each image `(b, c, h, w)` moved down and right by its row of `shifts`, int64 `(b, 2)`.

    >>> shifted(torch.tensor([[[[0.0, 0.0], [7.0, 8.0]]]]), torch.tensor([[-1, 1]]))
    tensor([[[[0., 7.],
              [0., 0.]]]])
    """
    n, _, height, width = images.shape
    margin = int(shifts.abs().max())
    background = images[:, :, :1, :1]
    padded = pad(images - background, (margin,) * 4)
    rows = torch.arange(height, device=images.device) + margin - shifts[:, :1]
    columns = torch.arange(width, device=images.device) + margin - shifts[:, 1:]
    picked = padded[
        torch.arange(n, device=images.device)[:, None, None],
        :,
        rows[:, :, None],
        columns[:, None, :],
    ]  # (b, h, w, c): advanced indices come first
    return picked.permute(0, 3, 1, 2) + background


def _generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    key = np.random.SeedSequence([seed, epoch, purpose])
    return np.random.Generator(np.random.Philox(key))
