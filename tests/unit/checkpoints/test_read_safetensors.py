"""Safetensors files: what the library writes, and damaged headers."""

import inspect
import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.stored import assert_reads
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model

from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.reading import safetensors_reader, stored, untrusted_json
from polyak.errors import FormatError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
]  # fmt: skip


@pytest.mark.parametrize("piece", [0, 1, 6, 4096])
def test_every_dtype(tmp_path, piece):
    state = {str(dtype): torch.arange(1, 13).reshape(3, 4).to(dtype) for dtype in DTYPES}
    state |= {"scalar": torch.tensor(1.5), "empty": torch.empty(2, 0), "größe": torch.ones(1)}
    save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert_reads(checkpoint, state, piece)
        assert checkpoint.metadata == {"format": "pt"}
        assert all(len(stored.spans) == 1 for stored in checkpoint.tensors.values())


def test_ties_of_save_model(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    save_model(model, str(tmp_path / "x.safetensors"))
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.ties == {"head.weight": "embed.weight"}
    assert_reads(checkpoint, dict(model.state_dict()))


def test_ties_in_the_metadata_of_polyak(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path, {"polyak": "0.1.0", "ties": '{"b": "a"}'})
    assert open_checkpoint(path).ties == {"b": "a"}
    for ties in ('{"b": "c"}', '{"b": ["a"]}', '{"a": "a"}'):
        save_file({"a": torch.ones(1)}, path, {"polyak": "0.1.0", "ties": ties})
        with pytest.raises(FormatError, match="metadata ties"):
            open_checkpoint(path)
    save_file({"a": torch.ones(1)}, path, {"ties": "of another tool"})
    assert open_checkpoint(path).ties == {}


def test_packed_values_below_a_byte(tmp_path):
    entry = {"dtype": "F4", "shape": [4, 2], "data_offsets": [0, 4]}
    checkpoint = open_checkpoint(written(tmp_path, {"w": entry}, b"abcd"))
    assert checkpoint.tensors["w"].nbytes == 4
    with pytest.raises(FormatError, match="does not fill whole bytes"):
        open_checkpoint(written(tmp_path, {"w": {**entry, "shape": [3]}}, b"abcd"))


def written(folder, header, data, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"w": entry(4, 8)}, b"x" * 8, "a hole before tensor 'w'"),
        ({"v": entry(0, 4), "w": entry(0, 4)}, b"x" * 4, "an overlap at tensor"),
        ({"w": entry(0, 4)}, b"x" * 3, "cut short"),
        ({"w": entry(0, 4)}, b"x" * 5, "has 1 unexpected bytes after the last tensor"),
        ({"w": entry(0, 8)}, b"x" * 8, "takes 4 bytes, but data_offsets say 8"),
        ({"w": entry(4, 0)}, b"x" * 4, "takes 4 bytes, but data_offsets say -4"),
        ({"w": entry(0, 4, dtype="F33")}, b"x" * 4, "dtype 'F33' is unknown"),
        ({"w": entry(0, 4, [-1])}, b"x" * 4, "two lists of sizes"),
        ({"w": entry(0, 4, [True])}, b"x" * 4, "two lists of sizes"),
        ({"w": entry(0, 4, [1.0])}, b"x" * 4, "two lists of sizes"),
        ({"w": entry(0, 4, [1] * 65)}, b"x" * 4, "at most 64 of them"),
        ({"w": {**entry(0, 4), "more": 1}}, b"x" * 4, "expected dtype, shape and data_offsets"),
        ({"w": [1]}, b"", "expected dtype, shape and data_offsets"),
        ({"w": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, b"x" * 4, "two numbers"),
        ({"__metadata__": {"a": 1}}, b"", "must map strings to strings"),
        ({"__metadata__": {"a": "\ud800"}}, b"", "must map strings to strings"),
        ({"\ud800": entry(0, 4)}, b"x" * 4, "not valid JSON"),
        (b'{"w": NaN}', b"", "not valid JSON: NaN"),
        (b'{"w": 1, "w": 2}', b"", "duplicate key 'w'"),
        (b'{"w": ' + b"9" * 5000 + b"}", b"", "not valid JSON"),  # more digits than Python converts
        (b"[1]", b"", "does not begin with"),
        (b"{\xff}", b"", "not valid JSON"),
    ],
)
def test_damaged_headers(tmp_path, header, data, reason):
    with pytest.raises(FormatError, match=reason):
        open_checkpoint(written(tmp_path, header, data))


@pytest.mark.parametrize(
    "space", [b" ", b"\n", b"\r\n", b"\t  ", b" " * 600, b"\x0b", b"\0", b"\xc2\xa0"]
)
def test_white_space_before_the_header_is_taken_as_safetensors_takes_it(tmp_path, space):
    raw = json.dumps({"w": entry(0, 4)}).encode()
    for header in (space + raw, raw + space, space + raw + space):
        path = written(tmp_path, header, b"abcd")
        try:
            expected = load_file(path)
        except SafetensorError:
            with pytest.raises(FormatError):
                open_checkpoint(path)
        else:
            assert_reads(open_checkpoint(path), expected)


def test_wrong_header_lengths(tmp_path, monkeypatch):
    assert safetensors_reader.MAX_JSON_BYTES == 100_000_000  # as the format has it
    monkeypatch.setattr(safetensors_reader, "MAX_JSON_BYTES", 1000)
    with pytest.raises(FormatError, match=r"a header of 1001 bytes; safetensors allows 1000"):
        open_checkpoint(written(tmp_path, {}, b"", length=1001))
    with pytest.raises(FormatError, match="cut short"):
        open_checkpoint(written(tmp_path, {}, b"", length=999))


def test_sizes_beyond_all_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "MAX_SIZE", 1000)
    with pytest.raises(FormatError, match=r"from 0 to below 2\*\*62"):
        open_checkpoint(written(tmp_path, {"w": entry(0, 0, [0, 1001])}, b""))


def test_more_entries_than_tensors_can_have(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted_json, "_MAX_CONTAINERS", 20)
    header = {f"w{i}": entry(4 * i, 4 * i + 4) for i in range(7)}
    with pytest.raises(FormatError, match="holds more than a million tensors"):
        open_checkpoint(written(tmp_path, header, b"x" * 28))


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="its parser has a bound that is not ours")
def test_deep_json_ends_in_an_error(tmp_path):
    depth, limit = len(inspect.stack()), sys.getrecursionlimit()
    sys.setrecursionlimit(depth + 150)
    try:
        with pytest.raises(FormatError, match="nested too deeply"):
            open_checkpoint(written(tmp_path, b'{"w": ' + b"[" * 200, b""))
    finally:
        sys.setrecursionlimit(limit)


@given(st.data())
def test_every_truncation_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FormatError):
        open_checkpoint(path)


def test_a_merged_file_is_known_by_its_metadata(tmp_path):
    for metadata, merged in (({"polyak": "1", "inputs": "[]"}, True), ({"inputs": "[]"}, False)):
        save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors", metadata)
        with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
            assert checkpoint.is_merged is merged
