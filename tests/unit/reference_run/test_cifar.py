"""CIFAR-10 and CIFAR-100 in their binary layout, made up here; damaged files are refused."""

import numpy as np
import pytest

from polyak.errors import FormatError
from polyak.reference_run.data import load_data
from polyak.reference_run.recipe import Recipe


def write(path, n, n_labels, n_classes):
    chance = np.random.default_rng(n)
    labels = np.stack(
        [np.arange(n) % (20 if i + 1 < n_labels else n_classes) for i in range(n_labels)], 1
    )
    pixels = chance.integers(0, 256, (n, 3072))
    np.concatenate([labels, pixels], axis=1).astype(np.uint8).tofile(path)
    return pixels, labels[:, -1]


@pytest.fixture
def ten(tmp_path):
    for i in range(1, 6):
        write(tmp_path / f"data_batch_{i}.bin", 20 + i, 1, 10)
    write(tmp_path / "test_batch.bin", 30, 1, 10)
    return tmp_path


def test_cifar_10(ten):
    data = load_data(Recipe(data_folder=str(ten)))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [104, 11, 30]
    assert (data.n_channels, data.image_size, data.n_classes) == (3, 32, 10)
    assert data.train.images.mean().abs() < 1e-4
    assert float(data.train.images.std()) == pytest.approx(1, abs=1e-3)
    assert data.train.labels[:22].tolist() == [*range(10), *range(10), 0, 0]


def test_cifar_100_has_its_fine_labels_and_planes_of_colour(tmp_path):
    pixels, labels = write(tmp_path / "train.bin", 400, 2, 100)
    write(tmp_path / "test.bin", 200, 2, 100)
    data = load_data(Recipe(data_folder=str(tmp_path)))
    assert data.train.labels.tolist() == labels[:360].tolist()
    red = pixels[0, :1024].reshape(32, 32)
    image = data.train.images[0, 0].numpy()
    assert np.corrcoef(red.ravel(), image.ravel())[0, 1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_files_that_are_missing_cut_short_or_wrong(ten, name):
    recipe, path = Recipe(data_folder=str(ten)), ten / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=r"expected whole records of 3,073\. It is cut short"):
        load_data(recipe)
    path.write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(FormatError, match=r"label 10 at index .*expected 0 to 9"):
        load_data(recipe)
    path.unlink()
    with pytest.raises(FormatError, match=f"has no {name}; expected data_batch_1.bin, "):
        load_data(recipe)
