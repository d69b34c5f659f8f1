"""What is written reads back with the libraries themselves: safetensors, torch, zipfile, Transformers."""

import json
import struct
import zipfile

import pytest
import torch
from reference.merging import stored_checkpoints
from safetensors.torch import load_file, save_file

from polyak.checkpoints.merging.average import average_checkpoints
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.writing import layouts
from polyak.checkpoints.writing.layouts import TensorSpec, TorchLayout
from polyak.errors import FormatError, OutputError

EVERY_DTYPE = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.fixture
def state():
    tensors = {str(d): torch.arange(24).reshape(2, 3, 4).to(d) for d in EVERY_DTYPE}
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "größe": torch.ones(1),
    }


def converted(state, folder, name, **options):
    [path] = stored_checkpoints(folder, [state])
    average_checkpoints([path], {folder / name: "swa"}, **options)
    return folder / name


def test_safetensors(tmp_path, state):
    path = converted(state, tmp_path, "out.safetensors")
    found = load_file(path)
    assert found.keys() == state.keys()
    assert all(
        torch.equal(
            found[n].view(torch.uint8) if n != "scalar" else found[n],
            state[n].view(torch.uint8) if n != "scalar" else state[n],
        )
        for n in state
        if state[n].numel()
    )
    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert (8 + header) % 4096 == 0
    entries = json.loads(raw[8 : 8 + header])
    for name, entry in entries.items():
        if name != "__metadata__" and state[name].numel():
            assert entry["data_offsets"][0] % state[name].element_size() == 0  # aligned


def test_torch_archive(tmp_path, state):
    path = converted(state, tmp_path, "out.pt")
    assert zipfile.ZipFile(path).testzip() is None  # every checksum is right
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert list(found) != [] and found.keys() == state.keys()
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert (
                found[name].flatten().view(torch.uint8).tolist()
                == tensor.flatten().view(torch.uint8).tolist()
            )
    assert found._metadata["polyak"]["profile"] == "SWA()"
    with open_checkpoint(path) as opened:
        assert opened.tensors.keys() == state.keys()


def test_torch_archive_of_a_module_loads_strictly(tmp_path):
    model = torch.nn.TransformerEncoderLayer(8, 2, 16)
    path = converted(dict(model.state_dict()), tmp_path, "out.ckpt")
    model.load_state_dict(torch.load(path, weights_only=True))


def test_64_bit_fields_of_large_archives():
    """Sizes and offsets beyond 4 GiB; only the headers are made, nothing of that size is written."""
    tensors = [TensorSpec(f"t{i}", "U8", (3 << 30,)) for i in range(3)]
    tensors.append(TensorSpec("huge", "U8", (5 << 30,)))
    layout = TorchLayout(tensors, {}, {})
    assert all(offset % layouts.ALIGNMENT == 0 for offset in layout.offsets)
    directory = layout._directory()
    assert layout.size == layout._directory_at + len(directory)
    assert struct.unpack("<Q", directory[-22 - 20 - 56 + 48 :][:8]) == (layout._directory_at,)
    ends = [o + t.nbytes for o, t in zip(layout.offsets, tensors, strict=True)]
    assert all(end <= start for end, start in zip(ends, layout.offsets[1:], strict=False))


def test_shards_with_an_index_and_configuration(tmp_path):
    inputs = []
    for step in (100, 200):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file(
            {f"l{i}.weight": torch.full((64, 8), float(step)) for i in range(5)},
            folder / "model.safetensors",
        )
        (folder / "config.json").write_text(json.dumps({"step": step}))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({}, folder / "optimizer.pt")
        inputs.append(folder)
    target = tmp_path / "averaged"
    average_checkpoints(inputs, {target: "swa"}, shard_size=5000)
    names = sorted(path.name for path in target.iterdir())
    assert names == [
        "config.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert json.loads((target / "config.json").read_text()) == {"step": 200}
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64 * 8 * 4
    with open_checkpoint(target) as opened:
        assert len(opened.tensors) == 5
    with pytest.raises(OutputError, match="exists"):
        average_checkpoints(inputs, {target: "swa"})
    average_checkpoints(inputs, {target: "swa"}, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "averaged",
        "checkpoint-100",
        "checkpoint-200",
    ]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_transformers_loads_a_merged_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    models = [transformers.LlamaForCausalLM(config) for _ in range(2)]
    for step, model in enumerate(models, start=1):
        model.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size="10KB")
    target = tmp_path / "averaged"
    average_checkpoints(sorted(tmp_path.glob("checkpoint-*")), {target: "swa"}, shard_size="8KB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target)
    pairs = zip(*(model.state_dict().values() for model in (*models, loaded)), strict=True)
    for one, two, mean in pairs:
        torch.testing.assert_close(mean, (one + two) / 2)


def test_a_header_beyond_the_limit(monkeypatch, tmp_path, state):
    monkeypatch.setattr("polyak.checkpoints.writing.layouts.MAX_HEADER", 1000)
    with pytest.raises(FormatError, match="safetensors allows 1000"):
        converted(state, tmp_path, "out.safetensors")


def test_outputs_that_cannot_be(tmp_path, state, monkeypatch):
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        converted(state, tmp_path, "there.safetensors")
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    with pytest.raises(OutputError, match="no folder"):
        converted(state, tmp_path, "none/x.safetensors")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OutputError, match="10 bytes free and"):
        converted(state, tmp_path, "x.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-100.safetensors",
        "there.safetensors",
    ]


def test_a_disk_that_fills_up(tmp_path, monkeypatch, state):
    import errno
    import os

    real = os.pwrite

    def full(descriptor, data, offset):
        if len(data) > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    [path] = stored_checkpoints(tmp_path, [{"w": torch.randn(1000)}])
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"No space left.*Make room.*resume=True"):
        average_checkpoints([path], {tmp_path / "o.safetensors": "swa"})
    monkeypatch.undo()
    assert not (tmp_path / "o.safetensors").exists()
    average_checkpoints([path], {tmp_path / "o.safetensors": "swa"}, resume=True)
    assert len(list(tmp_path.iterdir())) == 2
