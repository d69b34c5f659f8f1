"""NumPy archives, written by NumPy, and damaged headers."""

import io
import zipfile

import numpy as np
import pytest
from reference.stored import read_all

from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.reading import npz, stored
from polyak.errors import ArgumentError, FormatError


@pytest.mark.parametrize("piece", [0, 3, 8])
def test_every_dtype_order_and_byte_order(tmp_path, piece):
    rng = np.random.default_rng(0)
    arrays = {
        "f4": rng.normal(size=(3, 4)).astype("f4"),
        "f8": rng.normal(size=5),
        "f2": np.float16(1.5),
        "c8": rng.normal(size=3).astype("c8"),
        "bool": np.array([True, False]),
        "u2": np.arange(3, dtype="u2"),
        "fortran": np.asfortranarray(rng.normal(size=(2, 3, 4))),
        "big": np.arange(6, dtype=">f4").reshape(2, 3),
        "big_fortran": np.asfortranarray(np.arange(6, dtype=">i8").reshape(2, 3)),
        "big_complex": (rng.normal(size=3) + 1j).astype(">c16"),
        "empty": np.zeros((0, 3)),
        "layer.weight/x": np.ones(1),
    }
    np.savez(tmp_path / "step-3.npz", **arrays)
    with open_checkpoint(tmp_path / "step-3.npz") as checkpoint:
        assert checkpoint.step == 3
        assert checkpoint.tensors.keys() == arrays.keys()
        for name, stored in checkpoint.tensors.items():
            array = np.asarray(arrays[name])
            little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))
            assert stored.shape == array.shape
            assert read_all(stored, piece) == little.tobytes(), name


def test_compressed_archives_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", w=np.zeros(1000))
    with pytest.raises(FormatError, match=r"is compressed.*np\.savez"):
        open_checkpoint(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "array",
    [np.array([{}], dtype=object), np.zeros(2, dtype="i4,f4"), np.array(["a"]), np.array([b"ab"]),
     np.array(["2020"], "M8[D]")],
)  # fmt: skip
def test_arrays_of_other_than_numbers_are_refused(tmp_path, array):
    np.savez(tmp_path / "x.npz", good=np.ones(1), odd=array)
    with pytest.raises(
        FormatError, match=r"odd: It (has the NumPy dtype|is not an array of plain)"
    ):
        open_checkpoint(tmp_path / "x.npz")
    assert list(open_checkpoint(tmp_path / "x.npz", strict=False).tensors) == ["good"]


def test_a_flat_file_has_no_keys(tmp_path):
    np.savez(tmp_path / "x.npz", w=np.ones(1))
    with pytest.raises(ArgumentError, match="is flat"):
        open_checkpoint(tmp_path / "x.npz", key="model")


def archive(folder, header, data=b"x" * 8, version=b"\x01\x00"):
    raw = header.encode("latin-1")
    width = 2 if version == b"\x01\x00" else 4
    content = b"\x93NUMPY" + version + len(raw).to_bytes(width, "little") + raw + data
    with zipfile.ZipFile(folder / "x.npz", "w") as file:
        file.writestr("w.npy", content)
    return folder / "x.npz"


GOOD = "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }"


def test_versions_of_the_header(tmp_path):
    for version in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        assert open_checkpoint(archive(tmp_path, GOOD, version=version)).tensors["w"].nbytes == 8
    with pytest.raises(FormatError, match="version 1, 2 or 3"):
        open_checkpoint(archive(tmp_path, GOOD, version=b"\x04\x00"))


@pytest.mark.parametrize(
    "header",
    [
        GOOD.replace("(1,)", "(2,)"),
        GOOD.replace("(1,)", "(-1,)"),
        GOOD.replace("(1,)", "(len('x'),)"),  # a call, which evaluating the header would make
        GOOD.replace("(1,)", "(" + "1, " * 65 + ")"),
        GOOD.replace("(1,)", "(100, 100)"),
        GOOD.replace("(1,)", "(2000,)"),
        GOOD.replace("'<f8'", "'|O'"),
        GOOD.replace("'<f8'", "'<f99'"),
        GOOD.replace("False", "Maybe"),
        "",
        "{" * 50,
    ],
)
def test_damaged_headers(tmp_path, header, monkeypatch):
    monkeypatch.setattr(stored, "MAX_SIZE", 1000)
    with pytest.raises(FormatError, match="w: "):
        open_checkpoint(archive(tmp_path, header))


def test_what_is_beyond_the_bounds_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "_MAX_HEADER", 1000)
    with pytest.raises(FormatError, match="a header of 1001 bytes; at most 1000 are read"):
        open_checkpoint(archive(tmp_path, "1" * 1001))
    monkeypatch.setattr(stored, "MAX_SIZE", 1000)
    with pytest.raises(FormatError, match="larger than any tensor can be"):
        open_checkpoint(archive(tmp_path, GOOD.replace("(1,)", "(1001,)")))


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(FormatError, match=r"did not write; it holds readme\.txt"):
        open_checkpoint(tmp_path / "x.zip")
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    (tmp_path / "x.zip").write_bytes(buffer.getvalue())
    with pytest.raises(FormatError, match="holds no arrays"):
        open_checkpoint(tmp_path / "x.zip")
