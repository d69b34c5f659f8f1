"""One opening: every file is opened once, every folder listed once, a remote store asked once."""

import collections
import json
import os

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save, save_file

from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.reading import storage

STATE = {"a": torch.randn(8, 4), "b": torch.arange(5)}


@pytest.fixture
def asked(monkeypatch):
    """What the operating system is asked: (call, path) -> how often."""
    counts = collections.Counter()

    def counting(name):
        whole = getattr(os, name)

        def call(path, *args, **kwargs):
            if isinstance(path, (str, os.PathLike)):
                counts[name, os.fspath(path)] += 1
            return whole(path, *args, **kwargs)

        return call

    for name in ("open", "stat", "listdir"):
        monkeypatch.setattr(os, name, counting(name))
    return counts


def assert_once(asked, *opened, listed=()):
    """Each of the files was opened once, each of the folders listed once, and nothing else was."""
    assert asked.total() <= len(opened) + len(listed) + 1  # and one look whether it is a folder
    assert {path for (name, path) in asked if name == "open"} == set(map(str, opened))
    assert {path for (name, path) in asked if name == "listdir"} == set(map(str, listed))


def test_a_file(tmp_path, asked):
    save_file(STATE, tmp_path / "step-3.safetensors")
    torch.save(STATE, tmp_path / "step-3.pt")
    for name in ("step-3.safetensors", "step-3.pt"):
        asked.clear()
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint.step == 3
            for tensor in checkpoint.tensors.values():
                tensor.load()
        assert_once(asked, tmp_path / name)


def test_a_folder_of_transformers(tmp_path, asked):
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for name, shard in weight_map.items():
        save_file({name: STATE[name]}, tmp_path / shard)
    index, trainer = tmp_path / "model.safetensors.index.json", tmp_path / "trainer_state.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    trainer.write_text('{"global_step": 9}')
    shards = [tmp_path / shard for shard in weight_map.values()]
    for path in (tmp_path, index):
        asked.clear()
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.step == 9
        assert_once(asked, index, trainer, *shards, listed=[tmp_path])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_dcp(tmp_path, asked):
    dcp.save(STATE, checkpoint_id=tmp_path, no_dist=True)
    asked.clear()
    with open_checkpoint(tmp_path) as checkpoint:
        for tensor in checkpoint.tensors.values():
            tensor.load()
    assert_once(asked, tmp_path / ".metadata", tmp_path / "__0_0.distcp", listed=[tmp_path])


def test_small_files_beside_the_weights_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_POOL", pool := storage.DescriptorPool(100))
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 9}')
    with open_checkpoint(tmp_path):
        assert len(pool._open) == 1
    (tmp_path / "trainer_state.json").write_text('{"global_step": "x"}')
    with pytest.raises(ValueError, match="global_step"):
        open_checkpoint(tmp_path)
    assert not pool._open


def test_a_remote_store(monkeypatch):
    store = fsspec.filesystem("memory")
    store.pipe("/once/step-7/model.safetensors", save(STATE))
    counts = collections.Counter()

    def counting(name):
        whole = getattr(type(store), name)

        def call(self, path, *args, **kwargs):
            counts[name, self._strip_protocol(path)] += 1
            return whole(self, path, *args, **kwargs)

        return call

    for name in ("info", "ls", "cat_file"):
        monkeypatch.setattr(type(store), name, counting(name))
    file, folder = "/once/step-7/model.safetensors", "/once/step-7"
    for path in (f"memory:/{folder}", f"memory:/{file}"):
        counts.clear()
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.step == 7
        assert counts["info", file] == counts["cat_file", file] == counts["ls", folder] == 1
        assert counts.total() <= 4  # and one look whether the path is a folder
    store.rm("/once", recursive=True)
