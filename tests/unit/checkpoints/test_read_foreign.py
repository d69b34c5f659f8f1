"""Files that are not read: each is named as what it is, with what to do."""

import io
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.reading import safetensors_reader
from polyak.errors import FormatError


def zipped(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def tarred(*names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


CONTENTS = {
    b"": "is empty",
    b"abc": "cut short",
    b"<html>": "web page",
    b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
    b"\x89HDF\r\n\x1a\n": r"HDF5 file \(Keras\): load the model in Keras.*np\.savez",
    b"\x80\x04.": "bare pickle",
    b"PK\x03\x04" + b"\0" * 100: "cut short",
    b"hello, this is a long text": r"is text \(it begins with 'hello, this",
    "Gewichte für später\n".encode() * 40: "is text",
    b'{"model_type": "bert"}': "is text",
    b"GGUF\x03\0\0\0": "GGUF file .*quantised.*average the checkpoints that it was made from",
    b"\x08\x08\x12\x07pytorch\x1a\x032.1": "ONNX",
    b"\x08\x0a:\x90\x01\n\x0c": "ONNX",
    b"\x1c\0\0\0TFL3\0\0\0\0": "TensorFlow Lite",
    b"\x1f\x8b\x08\0": r"gzip \(a \.tar\.gz, or a \.nemo file\): unpack it",
    b"(\xb5/\xfd\x04": "zstd",
    b"BZh91AY": "bzip2",
    b"\x93NUMPY\x01\0v\0{'descr'": r"a single array \(np\.save\): .*np\.savez",
    bytes(range(255, 0, -1)): "of no format that polyak knows",
    zipped("config.json", "metadata.json", "model.weights.h5"): "a model of Keras: load the model",
    zipped("run/model.safetensors", "run/config.json"): r"it holds run/model\.safetensors\. Unpack it",
    zipped("readme.txt"): r"torch\.save or np\.savez did not write; it holds readme\.txt",
    zipped("m/serialized_exported_program.json", "m/version"): "torch.export",
    tarred("./model_config.yaml", "./model_weights.ckpt"): r"\(a \.nemo file\); it holds model_w.*Unpack",
    tarred("photos/1.jpg"): r"tar archive that torch\.save or np\.savez did not write",
}  # fmt: skip


@pytest.mark.parametrize(
    "content", CONTENTS, ids=map(str, range(len(CONTENTS)))
)  # zips hold the time
def test_by_its_bytes(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=CONTENTS[content]):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore")
def test_torchs_other_archives(tmp_path):
    model = torch.nn.Linear(2, 2)
    torch.jit.script(model).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(model, (torch.ones(1, 2),)), tmp_path / "model.pt2")
    with torch.package.PackageExporter(tmp_path / "package.pt") as package:
        package.extern("**")
        package.save_pickle("model", "model.pkl", model)
    for name, reason in (
        ("script.pt", r"TorchScript.*torch\.jit\.load\(path, map_location='cpu'\)\.state_dict\(\)"),
        ("model.pt2", r"program of torch\.export.*torch\.export\.load\(path\)\.state_dict"),
        ("package.pt", r"a torch\.package.*PackageImporter"),
    ):
        with pytest.raises(FormatError, match=reason):
            open_checkpoint(tmp_path / name)


def test_the_advice_gives_files_that_are_read(tmp_path):
    model = torch.nn.Linear(2, 2)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (torch.ones(1, 2),)), path)
    torch.save(torch.export.load(path).state_dict, tmp_path / "weights.pt")
    found = open_checkpoint(tmp_path / "weights.pt").tensors
    assert torch.equal(found["weight"].load(), model.weight)


def test_compressed_arrays(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", w=np.zeros(100), v=np.zeros(3))
    with pytest.raises(
        FormatError, match=r"'w\.npy' is compressed.*np\.savez instead of"
    ) as raised:
        open_checkpoint(tmp_path / "x.npz")
    assert "damaged" not in str(raised.value)


def test_a_length_that_no_header_has(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_reader, "MAX_JSON_BYTES", 1000)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1001) + b"{}")
    with pytest.raises(FormatError, match="a header of 1001 bytes"):
        open_checkpoint(path)
