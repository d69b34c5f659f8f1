"""Torch archives, written by torch itself."""

import argparse
import dataclasses
import math
import zipfile
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference.stored import assert_reads, many_tensors, read_all, row_major_bytes
from safetensors.torch import save_file

from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.reading import find_tensors, gather
from polyak.errors import ArgumentError, FormatError


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_and_view(tmp_path, protocol):
    state = many_tensors()
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert_reads(checkpoint, state)
        assert_reads(checkpoint, state, piece=7)  # not a multiple of any value's size
        assert checkpoint.ties == {"transposed": "tied"} or checkpoint.ties == {
            "tied": "transposed"
        }
        assert checkpoint.tensors["plain"].dtype == "F32"
        assert checkpoint.tensors["float8"].dtype == "F8_E4M3"
        assert checkpoint.tensors["uint16"].dtype == "U16"


def test_storage_order_reads_the_same_values_the_quick_way(tmp_path):
    state = many_tensors()
    torch.save(state, tmp_path / "x.pt")
    for name in ("permuted", "channels_last", "transposed", "plain"):
        stored = open_checkpoint(tmp_path / "x.pt", strict=True).tensors.get(name)
        if stored is None:
            continue
        quick = stored.in_storage_order()
        expected = state[name].permute(stored.storage_order)
        assert quick.shape == tuple(expected.shape)
        assert read_all(quick) == row_major_bytes(expected)


def test_a_module_state_in_lightning_and_plain_style(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = dict(model.state_dict())
    for number, root in enumerate(
        (
            model.state_dict(),
            {"state_dict": model.state_dict(), "epoch": 3},
            {"model": {"state_dict": model.state_dict()}, "optimizer": {"m": torch.ones(9)}},
            {"model_state_dict": model.state_dict(), "loss": torch.tensor(0.5)},
            OrderedDict(module=OrderedDict(model.state_dict()), other=defaultdict(list)),
        )
    ):
        torch.save(root, tmp_path / f"{number}.pt")
        assert_reads(open_checkpoint(tmp_path / f"{number}.pt"), state)


@dataclasses.dataclass
class Settings:
    width: int = 3
    weights: object = None


def test_other_objects_beside_the_tensors_are_inert(tmp_path):
    state = {"w": torch.randn(3)}
    root = {
        "model": state,
        "args": argparse.Namespace(rate=0.1, path=tmp_path),
        "settings": Settings(),
        "kept": {"best": Settings(weights=torch.ones(100))},
        "set": {1, 2},
        "long": list(range(100_000)),
        "global_step": 70,
        "nan": math.nan,
    }
    torch.save(root, tmp_path / "last.ckpt")
    with open_checkpoint(tmp_path / "last.ckpt") as checkpoint:
        assert_reads(checkpoint, state)
        assert checkpoint.step == 70
        assert checkpoint.metadata == {"global_step": "70", "nan": "nan"}


def test_other_objects_on_the_way_to_a_tensor_are_refused_by_name(tmp_path):
    root = {"a": torch.ones(1), "best": Settings(weights=torch.ones(100))}
    torch.save(root, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"best: It is an object of .*Settings"):
        open_checkpoint(tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt", strict=False)
    assert list(checkpoint.tensors) == ["a"]
    assert list(checkpoint.refused) == ["best"]
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(FormatError, match=r"Linear, which polyak does not build.*state_dict\(\)"):
        open_checkpoint(tmp_path / "module.pt")


def quantised():
    return torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: torch.ones(1, 5).expand(1000, 5), "is expanded or overlaps itself"),
        (lambda: torch.ones(9).as_strided((3, 3), (2, 1)), "is expanded or overlaps itself"),
        (lambda: torch.eye(3).to_sparse(), "is sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "is sparse"),
        (quantised, "is quantised"),
        (lambda: torch.empty(3, device="meta"), "is on the meta device"),
        (lambda: torch.randn(3, dtype=torch.complex64).conj(), "is lazily conjugated"),
    ],
)
def test_tensors_that_are_not_dense_values_are_refused_by_name(tmp_path, build, reason):
    torch.save({"good": torch.ones(2), "layer.odd": build()}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=rf"layer\.odd: It {reason}"):
        open_checkpoint(tmp_path / "x.pt")


def test_keys(tmp_path):
    tensors = [torch.full((2,), float(value)) for value in range(4)]
    root = {
        "ema": {"a.b": {"w": tensors[0]}},
        "nets": [{"w": tensors[1]}, {"w": tensors[2]}],
        7: {"w": tensors[3]},
    }
    torch.save(root, tmp_path / "x.pt")
    for key, tensor in (("ema.a.b", 0), ("nets.1", 2), ("nets.0", 1), ("7", 3)):
        assert_reads(open_checkpoint(tmp_path / "x.pt", key=key), {"w": tensors[tensor]})
    everything = open_checkpoint(tmp_path / "x.pt", key="")
    assert sorted(everything.tensors) == ["7.w", "ema.a.b.w", "nets.0.w", "nets.1.w"]
    with pytest.raises(
        FormatError,
        match=r"cannot tell which tensors are the model\'s\. .* under 'ema', 'nets', '7'",
    ):
        open_checkpoint(tmp_path / "x.pt")
    with pytest.raises(ArgumentError, match=r"no key 'ema\.c' \('c' was not found\)"):
        open_checkpoint(tmp_path / "x.pt", key="ema.c")


def test_a_key_into_a_flat_file_is_left_out(tmp_path):
    tensors = {"w": torch.ones(2), "b": torch.zeros(1)}
    torch.save(tensors, tmp_path / "x.pt")
    save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        with pytest.raises(ArgumentError, match=r"no key 'model'.* [Ll]eave out key=\.$"):
            open_checkpoint(tmp_path / name, key="model")


def test_a_tensor_alone_and_a_list(tmp_path):
    torch.save(torch.arange(3), tmp_path / "x.pt")
    assert_reads(open_checkpoint(tmp_path / "x.pt"), {"tensor": torch.arange(3)})
    torch.save([torch.ones(1), torch.zeros(1)], tmp_path / "x.pt")
    assert_reads(open_checkpoint(tmp_path / "x.pt"), {"0": torch.ones(1), "1": torch.zeros(1)})
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="There are no tensors here"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_tensor_subclass_is_not_taken_for_a_tensor(tmp_path):
    class Scaled(torch.Tensor):
        pass

    globals()["Scaled"] = Scaled
    Scaled.__qualname__ = "Scaled"
    torch.save({"w": torch.ones(2).as_subclass(Scaled), "v": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"w: It is an object of .*Scaled"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_parameter_with_attributes_is_a_tensor(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.sharded_by = "rows"
    torch.save({"w": parameter}, tmp_path / "x.pt")
    assert_reads(open_checkpoint(tmp_path / "x.pt"), {"w": parameter})


COPIES = {
    "timm": ("state_dict", "state_dict_ema", lambda state: state),
    "of torch": (
        "model",
        "swa_model",
        lambda state: {"n_averaged": torch.tensor(3)} | below(state),
    ),
    "wrapped once more": ("model", "teacher", lambda state: {"state_dict": state}),
    "without its buffers": ("model", "ema", lambda state: {"a.weight": state["a.weight"]}),
}


def below(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("kind", COPIES)
def test_a_second_copy_of_the_model_is_asked_about(tmp_path, kind):
    first, second, copy = COPIES[kind]
    state = {"a.weight": torch.ones(2, 3), "a.count": torch.tensor(1)}
    other = {name: 2 * tensor for name, tensor in state.items()}
    torch.save({first: state, second: copy(other), "epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(
        FormatError, match=rf"there twice, under '{first}' and under '{second}'.*key="
    ):
        open_checkpoint(tmp_path / "x.pt")
    assert_reads(open_checkpoint(tmp_path / "x.pt", key=first), state)
    assert open_checkpoint(tmp_path / "x.pt", key=second).tensors


@pytest.mark.parametrize(
    "beside",
    [
        {"optimizer": {"a.weight": torch.ones(2, 3)}},
        {"momentum_buffers": {"a.weight": torch.ones(2, 3)}},
        {"current_model_state": {"a.weight": torch.ones(2, 3)}},  # Lightning's layout
        {"discriminator": {"a.weight": torch.ones(4, 3)}},
        {"average": {"version": 2, "tensors": {"a.weight": torch.ones(2, 3)}}},
        {"loss": torch.ones(2, 3), "history": [torch.ones(2, 3)]},
    ],
)
def test_what_is_no_second_copy(tmp_path, beside):
    state = {"a.weight": torch.zeros(2, 3)}
    torch.save({"state_dict": state, **beside}, tmp_path / "x.pt")
    assert_reads(open_checkpoint(tmp_path / "x.pt"), state)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_empty_weights_of_zero_3_are_refused_by_name(tmp_path, suffix):
    state = {"a.weight": torch.empty(0), "b.weight": torch.empty(0).half(), "b.bias": torch.ones(2)}
    path = tmp_path / f"x.{suffix}"
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    with pytest.raises(
        FormatError, match=r"2 of its .*\n  a\.weight: It is empty, as DeepSpeed ZeRO-3"
    ):
        open_checkpoint(path)
    assert list(open_checkpoint(path, strict=False).tensors) == ["b.bias"]
    empty = {
        "a.weight": torch.empty(0, 2),
        "a.bias": torch.empty(0),
        "weight": torch.empty(0).long(),
    }
    torch.save(empty, tmp_path / "y.pt")  # a layer without outputs, and an empty list of indices
    assert_reads(open_checkpoint(tmp_path / "y.pt"), empty)


def rezipped(source, target, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The archive again, through Python's zipfile, its entries changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


@pytest.fixture
def plain(tmp_path):
    torch.save(
        {"w": torch.arange(6.0), "t": torch.arange(6.0).reshape(2, 3).t()}, tmp_path / "p.pt"
    )
    return tmp_path / "p.pt"


def test_big_endian_archives(plain, tmp_path):
    big = rezipped(plain, tmp_path / "big.pt", swapped)
    expected = {"w": torch.arange(6.0), "t": torch.arange(6.0).reshape(2, 3).t()}
    for piece in (0, 3, 4):
        assert_reads(open_checkpoint(big), expected, piece)


def swapped(name, data):
    if name.endswith("byteorder"):
        return b"big"
    if "/data/" in name:
        return (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            .view(-1, 4)
            .flip(1)
            .numpy()
            .tobytes()
        )
    return data


def test_compressed_and_inconsistent_archives(plain, tmp_path):
    packed = rezipped(plain, tmp_path / "z.pt", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="is compressed"):
        open_checkpoint(packed)
    short = rezipped(
        plain, tmp_path / "s.pt", lambda name, data: data[:-4] if "/data/" in name else data
    )
    with pytest.raises(FormatError, match=r"w: It is in a storage of 6 F32, but 20 bytes"):
        open_checkpoint(short)
    odd = rezipped(
        plain, tmp_path / "o.pt", lambda name, data: b"pdp" if name.endswith("byteorder") else data
    )
    with pytest.raises(FormatError, match="neither little nor big"):
        open_checkpoint(odd)


def test_encrypted_entries_are_refused(plain, tmp_path):
    data = bytearray(plain.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 8] |= 1
        at = data.find(b"PK\x01\x02", at + 1)
    (tmp_path / "e.pt").write_bytes(data)
    with pytest.raises(FormatError, match="is encrypted"):
        open_checkpoint(tmp_path / "e.pt")


def test_entries_that_overlap_are_refused(plain, tmp_path):
    data = bytearray(plain.read_bytes())
    first = data.find(b"PK\x01\x02")
    second = data.find(b"PK\x01\x02", first + 1)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    (tmp_path / "e.pt").write_bytes(data)
    with pytest.raises(FormatError, match=r"overlaps|is not where the directory says"):
        open_checkpoint(tmp_path / "e.pt")


def test_an_archive_cut_anywhere_is_refused(plain, tmp_path):
    data = plain.read_bytes()
    for length in range(0, len(data), 37):
        (tmp_path / "c.pt").write_bytes(data[:length])
        with pytest.raises(FormatError):
            open_checkpoint(tmp_path / "c.pt")


def test_zip64(tmp_path, monkeypatch):
    """Sizes that need zip64: written as such by zipfile when its limits are lowered."""
    torch.save({"w": torch.arange(5000.0)}, tmp_path / "p.pt")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10_000)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    wide = rezipped(tmp_path / "p.pt", tmp_path / "wide.pt")
    assert b"PK\x06\x06" in wide.read_bytes()
    assert_reads(open_checkpoint(wide), {"w": torch.arange(5000.0)})


@pytest.mark.parametrize("piece", [3, 8, 40])
@pytest.mark.parametrize("tiles", [1, 16])
def test_transposed_tensors_are_read_by_tiles(tmp_path, monkeypatch, piece, tiles):
    monkeypatch.setattr(gather, "TILE_BYTES", 32)
    monkeypatch.setattr(gather, "MAX_TILES", tiles)
    monkeypatch.setattr(gather, "_TILES", gather._Tiles())
    state = many_tensors()
    torch.save(state, tmp_path / "x.pt")
    assert_reads(open_checkpoint(tmp_path / "x.pt"), state, piece)
    assert len(gather._TILES._kept) <= tiles


def test_threads_share_tiles(tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "TILE_BYTES", 1024)
    monkeypatch.setattr(gather, "MAX_TILES", 2)
    wide = torch.randn(64, 50).t()
    torch.save({"w": wide, "v": wide + 1}, tmp_path / "x.pt")
    stored = open_checkpoint(tmp_path / "x.pt").tensors.values()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda tensor: read_all(tensor, 100), [*stored] * 8))
    assert read == [row_major_bytes(wide), row_major_bytes(wide + 1)] * 8


def test_storages_above_four_gigabytes(tmp_path):
    """5.2 GB of holes, written by torch: real zip64 fields."""
    state = {"large": torch.empty(1_300_000_000), "after": torch.ones(5)}
    with torch.serialization.skip_data():
        torch.save(state, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert checkpoint.tensors["large"].nbytes == 5_200_000_000
        (span,) = checkpoint.tensors["after"].spans
        assert span.offset > 2**32
        last = memoryview(bytearray(b"x" * 8))
        checkpoint.tensors["large"].read_into(5_200_000_000 - 8, last)
        assert bytes(last) == bytes(8)


def test_few_bytes_do_not_become_many_names(tmp_path, monkeypatch):
    """A shared list counts wherever it is; the bounds are so low that few bytes go beyond them."""
    monkeypatch.setattr(find_tensors, "MAX_TENSORS", 100)
    monkeypatch.setattr(find_tensors, "_MAX_VISITS", 2000)
    long_names = {"k" * 800: [torch.ones(1)] * 50}
    many_names = [[[torch.ones(1)] * 5] * 5] * 5
    for root, reason in ((long_names, "2000 values besides"), (many_names, "100 tensors")):
        torch.save(root, tmp_path / "x.pt")
        assert (tmp_path / "x.pt").stat().st_size < 5000
        with pytest.raises(FormatError, match=f"more than {reason}"):
            open_checkpoint(tmp_path / "x.pt", key="")


@pytest.mark.parametrize("view", [b"K\x00K\x07\x85", b"K\x01K\x06\x85", b"K\xffK\x06\x85"])
def test_views_that_leave_their_storage_are_refused(tmp_path, view):
    torch.save({"w": torch.arange(6.0), "v": torch.ones(9)}, tmp_path / "p.pt")

    def moved(name, data):
        if not name.endswith("data.pkl"):
            return data
        assert data.count(b"K\x00K\x06\x85") == 1  # offset 0, size (6,)
        return data.replace(b"K\x00K\x06\x85", view)

    path = rezipped(tmp_path / "p.pt", tmp_path / "l.pt", moved)
    with pytest.raises(FormatError, match="w: It reaches beyond the end of its storage"):
        open_checkpoint(path)


def test_an_entry_moved_by_its_local_header_is_refused(plain, tmp_path):
    """The directory and the local header each hold a part of where an entry is."""
    data = bytearray(plain.read_bytes())
    at = data.find(b"/data/0") - len("p") - 30
    assert data[at : at + 4] == b"PK\x03\x04"
    extra = int.from_bytes(data[at + 28 : at + 30], "little")
    data[at + 28 : at + 30] = (extra + 200).to_bytes(2, "little")
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(FormatError, match="runs into what follows"):
        open_checkpoint(tmp_path / "m.pt")
