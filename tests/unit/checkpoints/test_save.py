"""`write_checkpoint`: read back by the libraries themselves, equal bytes in any process, whole or nothing."""

import errno
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.writing.save import write_checkpoint
from polyak.errors import ArgumentError, OutputError
from polyak.version import __version__

STATE = {
    "half": torch.arange(5).half(),
    "columns": torch.arange(12.0).reshape(3, 4).t(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flag": torch.tensor([True, False]),
    "brain": torch.randn(7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "complex": torch.tensor([1 + 2j]).conj(),
    "part": torch.arange(10)[2:8:2],
    "empty": torch.empty(0, 3),
    "weight": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.pth", "x.bin", "x.CKPT"])
def test_read_back_by_the_libraries(tmp_path, name):
    path = tmp_path / name
    write_checkpoint(path, STATE, ties={"tied": "columns"}, metadata={"count": "3"})
    is_torch = not name.endswith("safetensors")
    found = torch.load(path) if is_torch else load_file(path)
    assert found.keys() == STATE.keys() | ({"tied"} if is_torch else set())
    for key, tensor in STATE.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
    with open_checkpoint(path) as opened:
        assert opened.ties == {"tied": "columns"}
        wanted = {"count": "3", "polyak": __version__, "format": "pt"}
        assert {key: opened.metadata[key] for key in wanted} == wanted


def test_safetensors_are_aligned(tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", STATE)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        sizes = [STATE[name].element_size() for name in file.offset_keys()]
    assert sizes == sorted(sizes, reverse=True)


def test_a_torch_file_is_the_state_dict(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    state = model.state_dict()
    write_checkpoint(tmp_path / "x.pt", state, metadata={"time": "7", "version": "x"})
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    for mmap in (False, True):
        found = torch.load(tmp_path / "x.pt", mmap=mmap)
        assert type(found) is OrderedDict
        assert list(found) == list(state)
        assert found._metadata.items() >= state._metadata.items()
        assert found._metadata["polyak"]["time"] == "7"
        assert not any(model.load_state_dict(found))


def test_metadata_does_not_reach_a_module_of_the_same_name(tmp_path):
    model = torch.nn.ModuleDict({"polyak": torch.nn.BatchNorm1d(2), "time": torch.nn.Linear(1, 1)})
    write_checkpoint(tmp_path / "x.pt", model.state_dict(), metadata={"time": "7"})
    for assign in (False, True):
        model.load_state_dict(torch.load(tmp_path / "x.pt"), assign=assign)


def test_tied_tensors_share_their_storage(tmp_path):
    write_checkpoint(tmp_path / "x.pt", {"b": torch.ones(3)}, ties={"a": "b"})
    found = torch.load(tmp_path / "x.pt")
    assert list(found) == ["b", "a"]
    assert found["a"].data_ptr() == found["b"].data_ptr()


WRITE = """
import sys, torch
from polyak.checkpoints.writing.save import write_checkpoint
texts = {"".join(list(text)): "".join(list("weight")) for text in ("weight", "unit", "0", "cpu")}
tensors = {name: torch.ones(3, 2) for name in ("weight", "0", "storage")}
tensors = type("State", (dict,), {"_metadata": {"weight": {"version": 1}}})(tensors)
if sys.argv[2] == "again":
    texts = dict(reversed(texts.items()))
write_checkpoint(sys.argv[1], tensors, ties={"unit": "0"}, metadata=texts, overwrite=True)
"""


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_equal_contents_give_equal_bytes_in_any_process(tmp_path, name):
    written = []
    for turn in ("once", "again"):
        command = [sys.executable, "-c", WRITE, str(tmp_path / name), turn]
        environment = os.environ | {"PYTHONHASHSEED": str(len(turn))}
        subprocess.run(command, check=True, env=environment)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_refusals_leave_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    one = {"w": torch.ones(1)}
    with pytest.raises(OutputError, match=r"x\.safetensors exists.*pass overwrite=True"):
        write_checkpoint(path, one)
    for name, tensors, options, message in [
        ("x.gguf", one, {}, r"has the suffix '\.gguf'; expected \.safetensors"),
        ("x", one, {}, "has the suffix ''"),
        ("x.pt", {"w": torch.ones(1).to_sparse()}, {}, "w is not a dense tensor"),
        ("x.pt", {"w": torch.ones(1, device="meta")}, {}, "w is not a dense tensor"),
        ("x.pt", {"w": [1.0]}, {}, "w is not a dense tensor"),
        ("x.pt", {"w": torch.quantize_per_tensor(torch.ones(1), 1, 0, torch.qint8)}, {}, "no file"),
        ("x.pt", one, {"ties": {"a": "b"}}, "ties maps 'a' to 'b'"),
        ("x.pt", one, {"ties": {"w": "w"}}, "ties maps 'w' to 'w'"),
        ("x.pt", one, {"metadata": {"count": 3}}, "must be text; found 3"),
        ("x.pt", {1: torch.ones(1)}, {}, "must be text; found 1"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            write_checkpoint(tmp_path / name, tensors, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_text() == "mine"
    write_checkpoint(path, one, overwrite=True)
    assert load_file(path)["w"].tolist() == [1.0]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(descriptor, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.pt"
    write_checkpoint(path, {"w": torch.ones(1)})
    before = path.read_bytes()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"No space left.*Make room"):
        write_checkpoint(path, {"w": torch.zeros(1)}, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]
    assert path.read_bytes() == before
