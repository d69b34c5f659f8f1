"""Remote files by ranges: `memory://` stands for s3, gs and https."""

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from reference.stored import assert_reads
from safetensors.torch import save, save_file

from polyak.checkpoints import open_checkpoint, places
from polyak.errors import ArgumentError, FormatError


@pytest.fixture
def store():
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/", recursive=True) if memory.ls("/") else None


def state():
    torch.manual_seed(0)
    return {
        "a": torch.randn(300, 500),
        "b": torch.arange(7),
        "t": torch.randn(20, 30).t().contiguous(),
    }


@pytest.mark.parametrize("piece", [0, 50_000])
@pytest.mark.parametrize("block", [1000, places.BLOCK_BYTES])
def test_files(store, tmp_path, monkeypatch, piece, block):
    monkeypatch.setattr(places, "BLOCK_BYTES", block)
    store.pipe("/run/step-5.safetensors", save(state()))
    torch.save({"model": state()}, tmp_path / "x.pt")
    store.put(str(tmp_path / "x.pt"), "/run/step-6.pt")
    for step, name in ((5, "step-5.safetensors"), (6, "step-6.pt")):
        with open_checkpoint(f"memory://run/{name}") as checkpoint:
            assert_reads(checkpoint, state(), piece)
            assert checkpoint.step == step
            checkpoint.check_unchanged()


@pytest.mark.filterwarnings("ignore")
def test_folders(store, tmp_path):
    dcp.save({"model": state()}, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    store.put(str(tmp_path / "dcp"), "/run/dcp", recursive=True)
    save_file(state(), tmp_path / "model.safetensors")
    store.put(str(tmp_path / "model.safetensors"), "/run/checkpoint-7/model.safetensors")
    for name in ("dcp", "checkpoint-7"):
        with open_checkpoint(f"memory://run/{name}/") as checkpoint:
            assert_reads(checkpoint, state())
    assert open_checkpoint("memory://run/checkpoint-7").step == 7


def test_only_ranges_are_read(store, monkeypatch):
    """The header of a large file costs a block, not the file."""
    store.pipe("/x.safetensors", save({"w": torch.zeros(3_000_000)}))
    asked = []
    whole = type(store).cat_file

    def counting(self, path, start=None, end=None, **more):
        asked.append(end - start)
        return whole(self, path, start=start, end=end, **more)

    monkeypatch.setattr(type(store), "cat_file", counting)
    open_checkpoint("memory://x.safetensors")
    assert sum(asked) <= places.BLOCK_BYTES


def test_what_is_missing_changed_or_unknown(store):
    with pytest.raises(ArgumentError, match="nothing at memory://none"):
        open_checkpoint("memory://none.pt")
    with pytest.raises(ArgumentError, match="cannot be opened"):
        open_checkpoint("nonsense://x.pt")
    store.pipe("/x.safetensors", save({"w": torch.zeros(3)}))
    checkpoint = open_checkpoint("memory://x.safetensors")
    store.pipe("/x.safetensors", save({"w": torch.zeros(4)}))
    with pytest.raises(FormatError, match="was changed"):
        checkpoint.check_unchanged()
