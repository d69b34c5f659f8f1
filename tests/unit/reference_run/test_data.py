"""The images that ship, IDX folders, custom data; and what is wrong with them."""

import gzip
import struct

import numpy as np
import pytest
import torch

from polyak.errors import ArgumentError, FormatError
from polyak.reference_run import data as module
from polyak.reference_run.data import Data, custom_data, embedded_data, idx_data, load_data
from polyak.reference_run.recipe import Recipe


def idx(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 24), ("t10k", 6)):
        images, labels = rng.integers(0, 256, (n, 12, 12)), rng.integers(0, 10, n)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_the_images_that_ship():
    data = embedded_data()
    assert data.train.images.dtype == torch.float32
    assert data.train.labels.dtype == torch.int64
    assert (data.n_channels, data.image_size, data.n_classes) == (1, 28, 10)
    # Fashion-MNIST's first labels, in the official order.
    assert data.train.labels[:6].tolist() == [9, 0, 0, 3, 0, 2]
    assert data.test.labels[:6].tolist() == [9, 2, 1, 1, 6, 1]
    assert abs(float(data.train.images.mean())) < 0.02
    assert abs(float(data.train.images.std()) - 1) < 0.02


def test_a_changed_or_missing_file_is_refused(tmp_path, monkeypatch):
    with np.load(module.EMBEDDED) as stored:
        arrays = dict(stored)
    arrays["train_labels"][0] = 1
    np.savez(tmp_path / "changed.npz", **arrays)
    monkeypatch.setattr(module, "EMBEDDED", tmp_path / "changed.npz")
    with pytest.raises(FormatError, match="is not the file that polyak shipped"):
        embedded_data()
    (tmp_path / "changed.npz").write_bytes(b"PK nonsense")
    with pytest.raises(FormatError, match="cannot be read"):
        embedded_data()


def test_an_idx_folder_is_read_gzipped_or_not(folder):
    data = idx_data(folder)
    assert (len(data.train), len(data.validation), len(data.test)) == (22, 2, 6)
    assert data.image_size == 12
    assert load_data(Recipe(data_folder=str(folder))).digest() == data.digest()


def test_a_missing_file(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FormatError, match="has neither t10k-labels-idx1-ubyte nor"):
        idx_data(folder)


def test_truncated_files(folder):
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FormatError, match=r"says \(24,\), 32 bytes in all, but it has 29"):
        idx_data(folder)
    images = folder / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(FormatError, match="cut short or damaged"):
        idx_data(folder)


def test_files_of_another_kind(folder):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"GIF89a" * 10))
    with pytest.raises(
        FormatError, match=r"not an IDX file of bytes with 3 dimensions.*47 49 46 38"
    ):
        idx_data(folder)


def test_labels_out_of_range(folder):
    labels = np.zeros(24)
    labels[7] = 11
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(FormatError, match="label 11 at index 7; expected 0 to 9"):
        idx_data(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(23)))
    with pytest.raises(FormatError, match="holds 23 labels, but there are 24 images"):
        idx_data(folder)


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Writes a module with a function `give` and returns its spelling."""
    monkeypatch.chdir(tmp_path)

    def write(name, body):
        (tmp_path / f"{name}.py").write_text(f"import torch\ndef give():\n    return {body}\n")
        return f"{name}:give"

    return write


PAIR = "(torch.zeros(4, 3, 10, 10), torch.tensor([0, 1, 2, 2]))"


def test_custom_data(custom):
    data = custom_data(custom("good", f"dict(train={PAIR}, validation={PAIR}, test={PAIR})"))
    assert isinstance(data, Data)
    assert (data.n_channels, data.n_classes, data.image_size) == (3, 3, 10)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a1", f"dict(train={PAIR})", "expected a mapping with train, validation and test"),
        ("a2", "3", "returned int"),
        ("a3", f"dict(train=5, validation={PAIR}, test={PAIR})", "not a pair"),
        (
            "a4",
            f"dict(train=(torch.zeros(4, 10, 10), torch.zeros(4)), validation={PAIR}, test={PAIR})",
            r"expected float32 \(n, channels, size, size\)",
        ),
        (
            "a5",
            f"dict(train=(torch.zeros(4, 3, 10, 10), torch.zeros(3).long()), validation={PAIR}, test={PAIR})",
            "expected 4 integers",
        ),
        (
            "a6",
            f"dict(train=(torch.zeros(2, 3, 10, 10), torch.tensor([0, -1])), validation={PAIR}, test={PAIR})",
            "begin at -1",
        ),
        (
            "a7",
            f"dict(train=(torch.zeros(2, 3, 10, 10) / 0, torch.tensor([0, 1])), validation={PAIR}, test={PAIR})",
            "NaN or infinity",
        ),
        (
            "a8",
            f"dict(train=(torch.zeros(2, 1, 10, 10), torch.tensor([0, 1])), validation={PAIR}, test={PAIR})",
            "expected one shape",
        ),
        (
            "a9",
            f"dict(train={PAIR}, validation={PAIR}, test=({PAIR}[0], {PAIR}[1] + 7))",
            "the test images have the labels .*, which no training image has",
        ),
        (
            "b1",
            f"dict(train={PAIR}, validation=({PAIR}[0], {PAIR}[1] + 7), test={PAIR})",
            "the validation images have the labels",
        ),
        (
            "b2",
            f"dict(train=({PAIR}[0], {PAIR}[1] + 10**9), validation={PAIR}, test={PAIR})",
            "labels reach 1000000",
        ),
        (
            "b3",
            f"dict(train=(torch.zeros(2, 0, 10, 10), torch.tensor([0, 1])), validation={PAIR}, test={PAIR})",
            r"images are torch.float32 \(2, 0, 10, 10\)",
        ),
        (
            "b4",
            f"dict(train=({PAIR}[0].to_sparse(), {PAIR}[1]), validation={PAIR}, test={PAIR})",
            "train is sparse; expected dense tensors",
        ),
    ],
)
def test_custom_data_that_does_not_fit(custom, name, body, message):
    with pytest.raises(ArgumentError, match=message):
        custom_data(custom(name, body))


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("nothing", "expected package.module:function"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("math:nothing", "has nothing at nothing"),
        ("math:pi", "has a float at pi"),
    ],
)
def test_names_of_nothing(spelling, message):
    with pytest.raises(ArgumentError, match=message):
        custom_data(spelling)


def test_the_same_data_is_loaded_once(custom):
    function = custom(
        "counted", f"print('loading') or dict(train={PAIR}, validation={PAIR}, test={PAIR})"
    )
    first, again = (load_data(Recipe(data=function, epochs=n)) for n in (40, 50))
    assert first is again
