"""Make the images that ship with polyak from Debian's package dataset-fashion-mnist.

    apt-get download dataset-fashion-mnist
    dpkg -x dataset-fashion-mnist_*.deb /tmp/fashion
    python scripts/make_data.py /tmp/fashion/usr/share/datasets/fashion-mnist

In the official order: the first 8,000 training images (6,000 to train on, 2,000 for validation) and
the first 4,000 test images. Fashion-MNIST: Copyright 2017 Zalando SE, MIT licence.
"""

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

from polyak.reference_run.data import EMBEDDED, embedded_digest

SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


def checked(folder: Path, name: str, header: int) -> np.ndarray:
    content = (folder / name).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        sys.exit(f"{folder / name} has sha256 {found}, expected {SHA256[name]}")
    return np.frombuffer(gzip.decompress(content), np.uint8, offset=header)


def main(folder: Path) -> None:
    arrays = {
        "train_images": checked(folder, "train-images-idx3-ubyte.gz", 16)[: 8000 * 784],
        "train_labels": checked(folder, "train-labels-idx1-ubyte.gz", 8)[:8000],
        "test_images": checked(folder, "t10k-images-idx3-ubyte.gz", 16)[: 4000 * 784],
        "test_labels": checked(folder, "t10k-labels-idx1-ubyte.gz", 8)[:4000],
    }
    for name in ("train_images", "test_images"):
        arrays[name] = arrays[name].reshape(-1, 28, 28)
    np.savez_compressed(EMBEDDED, **arrays)
    print(f"{EMBEDDED}: {EMBEDDED.stat().st_size} bytes, digest {embedded_digest(arrays)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
