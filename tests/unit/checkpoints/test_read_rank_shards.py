"""Safetensors that every rank wrote for itself (`HuggingFaceStorageWriter`), read together."""

import json
import shutil

import pytest
import torch
import torch.multiprocessing as mp
from reference.dtensor_save import save_rank_shards, whole_tensors
from reference.stored import assert_reads
from safetensors.torch import load_file, save_file

from polyak import average_checkpoints
from polyak.checkpoints import open_checkpoint
from polyak.errors import ArgumentError, FormatError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(save_rank_shards, (2, folder), 2)
    return folder


def test_all_ranks_together_are_the_model(saved):
    for place in ("one", "two"):
        with open_checkpoint(saved / place) as checkpoint:
            assert checkpoint.format == "safetensors rank shards"
            assert checkpoint.metadata == {"format": "pt", "ranks": "2"}
            assert_reads(checkpoint, whole_tensors())
            assert_reads(checkpoint, whole_tensors(), piece=5)


def test_they_are_averaged(saved, tmp_path):
    average_checkpoints([saved / "one", saved / "two"], tmp_path / "out.safetensors")
    found, expected = load_file(tmp_path / "out.safetensors"), whole_tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    average_checkpoints([saved / "one", saved / "two"], tmp_path / "folder")
    with open_checkpoint(tmp_path / "folder") as checkpoint:  # no file of it is called a rank's
        assert_reads(checkpoint, expected)


def test_what_is_missing_or_mixed_is_named(saved, tmp_path):
    files = sorted(path.name for path in (saved / "two").iterdir())
    copy = tmp_path / "copy"

    def without(*names):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(saved / "two", copy)
        for name in names:
            (copy / name).unlink()
        return copy

    with pytest.raises(FormatError, match="lacks files of shard-00001"):
        open_checkpoint(without(*(name for name in files if name.startswith("shard-00001"))))
    with pytest.raises(FormatError, match="lacks files of model-00002"):
        open_checkpoint(without(*(name for name in files if "model-00002" in name)))
    shutil.copy(without() / files[0], copy / "shard-00009-model-00001-of-00003.safetensors")
    with pytest.raises(FormatError, match="of different saves: of 2 and of 3 files"):
        open_checkpoint(copy)
    with pytest.raises(FormatError, match=r"values, and .* are stored"):
        open_checkpoint(without(next(n for n in files if n.startswith("shard-00001-model-00001"))))
    with pytest.raises(FormatError, match="Name its folder"):
        open_checkpoint(saved / "two" / files[0])
    with pytest.raises(ArgumentError, match="has no key 'model'"):
        open_checkpoint(saved / "two", key="model")


def shard(folder, rank, tensors, offsets):
    folder.mkdir(exist_ok=True)
    info = {name: {"saved_offsets": at} for name, at in offsets.items()}
    path = folder / f"shard-{rank:05}-model-00001-of-00001.safetensors"
    save_file(tensors, path, {"DCP_SHARDING_INFO": json.dumps(info)})
    return path


@pytest.mark.parametrize(
    ("second", "at", "reason"),
    [
        (torch.ones(2, 3), [1, 0], "overlap"),
        (torch.ones(2, 3), [3, 0], "values, and .* are stored"),
        (torch.ones(2, 2), [2, 0], "values, and .* are stored"),
        (torch.ones(2, 3).half(), [2, 0], "different dtypes"),
        (torch.ones(3), [2], "different dtypes or dimensions"),
        (torch.ones(2, 3), [2], "does not say where its part of 'w' begins"),
        (torch.ones(2, 3), [-2, 0], "does not say where its part of 'w' begins"),
        (torch.ones(2, 3), None, "does not say where its part of 'w' begins"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, second, at, reason):
    shard(tmp_path, 1, {"w": torch.ones(2, 3)}, {"w": [0, 0]})
    shard(tmp_path, 2, {"w": second}, {"w": at})
    with pytest.raises(FormatError, match=reason):
        open_checkpoint(tmp_path)


def test_a_renamed_part_is_known_by_its_offsets(tmp_path):
    path = shard(tmp_path / "x", 2, {"w": torch.ones(2, 3)}, {"w": [2, 0]})
    path = path.rename(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="the parts of tensors that one rank saved"):
        open_checkpoint(path)
