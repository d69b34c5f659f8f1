"""Torch files from before 1.6: streams that torch still writes, and the tars and parts that it only reads."""

import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from reference.old_torch import (
    MAGIC,
    Numbered,
    Storage,
    View,
    object_of,
    real_tar_members,
    stream_of,
    tar_members,
    tar_of,
)
from reference.stored import assert_reads, many_tensors

from polyak import average_checkpoints
from polyak.checkpoints import diff_checkpoints, inspect_checkpoint, open_checkpoint
from polyak.checkpoints.reading import pickle_reader
from polyak.errors import ArgumentError, FormatError


def save(value, path, protocol=2):
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_dtype_and_view(tmp_path, protocol):
    state = many_tensors()
    path = save(state, tmp_path / "x.pt", protocol)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "torch before 1.6"
        assert_reads(checkpoint, state)
        assert_reads(checkpoint, state, piece=7)
        assert len(checkpoint.ties) == 1


def test_what_torch_loads_is_what_is_read(tmp_path):
    state = many_tensors()
    for name in ("uint16", "float8"):  # torch 2.13 does not load these from its own file
        del state[name]
    path = save(state, tmp_path / "x.pt")
    assert_reads(open_checkpoint(path), torch.load(path, weights_only=True))


def test_wrappers_keys_and_metadata(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = dict(model.state_dict())
    root = {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "optimizer": {"state": {0: {"m": torch.ones(9)}}, "fine": True},
        "args": [1, (2.5, None)],
    }
    path = save(root, tmp_path / "step-70.ckpt")
    with open_checkpoint(path) as checkpoint:
        assert_reads(checkpoint, state)
        assert (checkpoint.metadata, checkpoint.step) == ({"epoch": "3"}, 70)
    assert_reads(open_checkpoint(path, key="optimizer.state.0"), {"m": torch.ones(9)})
    with pytest.raises(ArgumentError, match="no key 'none'"):
        open_checkpoint(path, key="none")


def test_merges_differences_and_inspection(tmp_path):
    states = [many_tensors() for _ in range(2)]
    states[1] = {name: (2 * t if t.is_floating_point() and t.dtype != torch.float8_e4m3fn else t)
                 for name, t in states[0].items() if name != "float8"}  # fmt: skip
    del states[0]["float8"]
    states[1]["tied"] = states[1]["transposed"]
    old = [save(state, tmp_path / f"step-{i}.pt") for i, state in enumerate(states)]
    new = [tmp_path / f"new-step-{i}.pt" for i in range(2)]
    for state, path in zip(states, new, strict=True):
        torch.save(state, path)
    for before, after in zip(old, new, strict=True):
        assert diff_checkpoints(before, after).same
        assert inspect_checkpoint(before).tensors == inspect_checkpoint(after).tensors
    average_checkpoints(old, tmp_path / "old.safetensors")
    average_checkpoints(new, tmp_path / "new.safetensors")
    assert diff_checkpoints(tmp_path / "old.safetensors", tmp_path / "new.safetensors").same
    assert not diff_checkpoints(*old).same


def test_a_whole_module_is_refused_by_its_class(tmp_path):
    save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"Linear, which polyak does not build.*state_dict\(\)"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore")
def test_quantised_and_sparse_tensors_are_refused_by_name(tmp_path):
    odd = {"q": torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)}
    odd |= {"s": torch.eye(3).to_sparse(), "good": torch.ones(2)}
    path = save(odd, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"q: It is quantised(.|\n)*s: It is sparse"):
        open_checkpoint(path)
    assert list(open_checkpoint(path, strict=False).tensors) == ["good"]


def floats(count, first=0):
    return count, torch.arange(first, first + count).float().numpy().tobytes()


def test_parts_of_storages_and_parts_of_one_key(tmp_path):
    """What torch before 0.4 wrote of storages that share memory: a part says where in the whole it is."""
    storages = {"a": floats(6), "b": floats(2, 10)}
    path = tmp_path / "x.pt"
    data = stream_of(None, storages)
    preamble = b"".join(pickle.dumps(x, 2) for x in (MAGIC, 1001, {"little_endian": True}))
    plain = stream_of(None, storages)[len(preamble) + len(pickle.dumps(None, 2)) :]
    assert data.endswith(plain)
    path.write_bytes(preamble + object_of({"a": 6, "b": 2}) + plain)
    loaded = torch.load(path, weights_only=True)["state_dict"]
    assert loaded["part"].tolist() == [2.0, 3.0]
    with open_checkpoint(path) as checkpoint:
        assert_reads(checkpoint, loaded)
        assert checkpoint.metadata == {"epoch": "3", "best": "0.5"}


def test_a_tensor_and_its_twin_in_a_part_are_tied(tmp_path):
    whole = Storage("a", torch.FloatStorage, 6)
    part = Storage("a", torch.FloatStorage, 6, ("v", 2, 4))
    state = {"x": View(whole, 2, (2,), (1,)), "y": View(part, 0, (2,), (1,))}
    (tmp_path / "x.pt").write_bytes(stream_of(state, {"a": floats(6)}))
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert checkpoint.ties == {"y": "x"}
    assert checkpoint.tensors["x"].load().tolist() == [2.0, 3.0]


def test_parameters_of_torch_0_4(tmp_path):
    class Parameter:
        def __reduce__(self):
            view = View(Storage("a", torch.FloatStorage, 6), 0, (2, 3), (3, 1), old=True)
            return torch.nn.Parameter, (view, True)

    data = stream_of(OrderedDict(w=Parameter()), {"a": floats(6)})
    (tmp_path / "x.pt").write_bytes(data)
    assert_reads(open_checkpoint(tmp_path / "x.pt"), {"w": torch.arange(6.0).reshape(2, 3)})


def test_a_state_dict_of_python_2(tmp_path):
    """Its OrderedDict is a call with a list of pairs, and its strings are bytes."""

    class State:
        def __reduce__(self):
            view = View(Storage("a", torch.FloatStorage, 6), 0, (6,), (1,), old=True)
            return OrderedDict, ([["lin.0.weight", view]],)

    data = stream_of(State(), {"a": floats(6)})
    data = data.replace(b"X\x0c\0\0\0lin.0.weight", b"U\x0clin.0.weight")
    (tmp_path / "x.pth").write_bytes(data)
    assert_reads(open_checkpoint(tmp_path / "x.pth"), {"lin.0.weight": torch.arange(6.0)})
    assert_reads(open_checkpoint(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth"))


def one(storage=None, view=None):
    storage = storage or Storage("a", torch.FloatStorage, 6)
    return {"w": View(storage, *(view or (0, (6,), (1,))))}


SIX = {"a": floats(6)}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (stream_of(one(), {"a": floats(5)}), "has 5 values, and its tensors expect 6"),
        (stream_of(one(), {"a": (6, b"1234")}), "is cut short"),
        (stream_of(one(), {"a": (-1, b"")}), "has -1 values"),
        (stream_of(one(), SIX) + b"more", "goes on for 4 bytes after its last storage"),
        (stream_of(one(), {}), "in a storage that the file does not hold|goes on"),
        (stream_of(one(), {**SIX, "b": floats(1)}), "the storage 'b' belongs to nothing"),
        (stream_of(one(view=(1, (6,), (1,))), SIX), "reaches beyond the end of its storage"),
        (stream_of(one(view=(0, (6, 2), (1, 0))), SIX), "expanded or overlaps"),
        (stream_of(one(view=(0, (600, 2), (2, 1))), SIX), "beyond the end"),
        (stream_of(one(Storage("a", torch.FloatStorage, 6, ("v", 4, 4))), SIX), "part of a storage"),
        (stream_of(one(Storage("a", torch.FloatStorage, 6, ("v", -1, 4))), SIX), "part of a storage"),
        (stream_of(one(Storage("a", torch.FloatStorage, 6, 7)), SIX), "part of a storage"),
        (stream_of(one(Storage(1, torch.FloatStorage, 6)), SIX), "that torch does not write"),
        (stream_of(one(Storage("a", torch.FloatStorage, -6)), SIX), "that torch does not write"),
        (
            stream_of([one(), one(Storage("a", torch.LongStorage, 6))], SIX),
            "described in two ways",
        ),
        (stream_of(one(), SIX).replace(b"M\xe9\x03.", b"M\xea\x03."), "begins with .* and 1002"),
    ],
)  # fmt: skip
def test_damaged_streams(tmp_path, data, reason):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(FormatError, match=reason):
        open_checkpoint(tmp_path / "x.pt")


def test_every_cut_is_noticed(tmp_path):
    data = save({"w": torch.ones(3), "v": torch.zeros(2, 2)}, tmp_path / "x.pt").read_bytes()
    for length in range(len(data)):
        (tmp_path / "x.pt").write_bytes(data[:length])
        with pytest.raises(FormatError):
            open_checkpoint(tmp_path / "x.pt")


def test_nothing_is_run(tmp_path):
    marker = tmp_path / "marker"

    class Runs:
        def __reduce__(self):
            return Path.touch, (marker,)

    save({"w": torch.ones(1), "x": Runs()}, tmp_path / "x.pt")
    assert_reads(open_checkpoint(tmp_path / "x.pt"), {"w": torch.ones(1)})
    assert not marker.exists()


def test_only_the_headers_are_read(tmp_path, monkeypatch):
    """16 MB of values are passed over, and a pickle longer than a window is found whole."""
    state = {
        "big": torch.zeros(4 << 20),
        **{f"layer.{i}.weight": torch.ones(2) for i in range(900)},
    }
    path = save(state, tmp_path / "x.pt")
    code = (
        "import sys, polyak.checkpoints.reading.storage as storage\n"
        "read, seen = storage.LocalFile.read_into, []\n"
        "storage.LocalFile.read_into = lambda self, at, to: seen.append(len(to)) or read(self, at, to)\n"
        "from polyak import open_checkpoint\n"
        "assert len(open_checkpoint(sys.argv[1]).tensors) == 901\n"
        "print(sum(seen))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True)
    assert int(done.stdout) < 1 << 20
    sizes = []
    machine = pickle_reader.PickleMachine

    def counted(data, *rest):
        sizes.append(len(data))
        return machine(data, *rest)

    monkeypatch.setattr(pickle_reader, "PickleMachine", counted)
    assert len(open_checkpoint(path).tensors) == 901
    assert max(sizes) > 1 << 16


# --- tars of torch 0.1


def test_a_tar_reads_as_torch_reads_it(tmp_path):
    path = tmp_path / "x.pth"
    for protocol in (1, 2):
        members = {"sys_info": pickle.dumps({}, protocol), **real_tar_members()}
        path.write_bytes(tar_of(members))
        loaded = torch.load(path, weights_only=False)["state_dict"]
        with open_checkpoint(path) as checkpoint:
            assert_reads(checkpoint, loaded)
            assert_reads(checkpoint, loaded, piece=3)
            assert (checkpoint.format, checkpoint.metadata) == ("torch before 1.6", {"epoch": "3"})


def test_a_tar_with_other_dtypes_parts_of_parts_and_no_storage(tmp_path):
    wholes = {7: torch.arange(8).double(), 8: torch.tensor([1.5, -2.0]).half()}
    views = {9: (7, 2, 5), 10: (9, 1, 3)}
    tensors = {1: (10, 1, (2,), (1,)), 2: (8, 0, (2,), (1,)), 3: (7, 0, (2, 2), (1, 4))}
    value = {"a": Numbered(1), "b": Numbered(2), "c": Numbered(3), "same": Numbered(1)}
    path = tmp_path / "x.pth"
    path.write_bytes(tar_of(tar_members(tensors, views, (wholes, value))))
    loaded = torch.load(path, weights_only=False)
    assert loaded["a"].tolist() == [4.0, 5.0]
    assert_reads(open_checkpoint(path), loaded)
    tensors[1] = (None, 0, (0,), (1,))
    path.write_bytes(tar_of(tar_members(tensors, views, (wholes, value))))
    assert open_checkpoint(path).tensors["a"].shape == (0,)


@pytest.mark.parametrize(
    ("member", "change", "reason"),
    [
        ("storages", lambda raw: raw[:-40], "is damaged|ends in the middle|without an end"),
        ("tensors", lambda raw: raw[:-8], "is cut short"),
        ("tensors", lambda raw: pickle.dumps(-1, 2), "how many storages and tensors"),
        ("storages", lambda raw: pickle.dumps("x", 2), "how many storages and tensors"),
        ("pickle", lambda raw: raw.replace(b"X\x01\0\0\x002", b"X\x01\0\0\x009"), "not there"),
        ("tensors", lambda raw: raw.replace(struct.pack("<i4x", 2), struct.pack("<i4x", 65), 1),
         "a tensor of 65 dimensions"),
        ("tensors", lambda raw: raw.replace(struct.pack("<qq", 2, 3), struct.pack("<qq", -2, 3), 1),
         "no view of a storage"),
        ("tensors", lambda raw: raw.replace(struct.pack("<qq", 2, 3), struct.pack("<qq", 9, 3), 1),
         "beyond the end of its storage|overlaps"),
        ("storages", lambda raw: raw.replace(pickle.dumps([(201, 101, 6, 4)], 2),
                                             pickle.dumps([(201, 101, 9, 4)], 2)), "is not in it"),
    ],
)  # fmt: skip
def test_damaged_tars(tmp_path, member, change, reason):
    members = real_tar_members()
    members[member] = change(members[member])
    assert members != real_tar_members()
    (tmp_path / "x.pth").write_bytes(tar_of(members))
    with pytest.raises(FormatError, match=reason):
        open_checkpoint(tmp_path / "x.pth")


def test_headers_of_tars(tmp_path):
    data = bytearray(tar_of(real_tar_members()))
    path = tmp_path / "x.pth"
    for place, reason in ((100, "checksum"), (124, "checksum"), (148, "checksum")):
        changed = data.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(FormatError, match=f"is a tar archive: .*{reason}"):
            open_checkpoint(path)
    path.write_bytes(data[:1600])
    with pytest.raises(FormatError, match="ends after the file"):
        open_checkpoint(path)
    twice = tar_of({"a": b"1"}).rstrip(b"\0") + bytes(511)
    path.write_bytes(twice[: len(twice) // 512 * 512] + tar_of({"a": b"2"}))
    with pytest.raises(FormatError, match="duplicate member 'a'"):
        open_checkpoint(path)
