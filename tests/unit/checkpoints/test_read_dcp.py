"""DCP folders written by torch.distributed.checkpoint, by one process and by two."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from reference.sharded_save import build_model, save_sharded
from reference.stored import assert_reads, read_all

from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.reading.extra_state import TensorAt
from polyak.errors import FormatError, PolyakError

# torch's own DCP code warns about running without a process group, and from its own internals.
pytestmark = pytest.mark.filterwarnings("ignore")


def tiny_state():
    torch.manual_seed(3)
    return {
        "rows": torch.randn(7, 5),
        "bias": torch.randn(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(4, dtype=torch.int64),
        "transposed": torch.randn(4, 6).t(),
        "empty": torch.empty(0, 3),
    }


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dcp") / "step-12"
    state = {"model": tiny_state(), "optim": {"state": {0: {"m": torch.ones(2)}}}, "step": 5}
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


@pytest.mark.parametrize("piece", [0, 3, 16])
def test_one_process(single, piece):
    with open_checkpoint(single) as checkpoint:
        assert_reads(checkpoint, tiny_state(), piece)
        assert (checkpoint.format, checkpoint.step) == ("dcp", 12)


def test_a_key_selects_another_part(single):
    with open_checkpoint(single, key="optim") as checkpoint:
        assert_reads(checkpoint, {"state.0.m": torch.ones(2)})
    with open_checkpoint(single, key="") as checkpoint:
        assert "model.rows" in checkpoint.tensors
        assert "optim.state.0.m" in checkpoint.tensors


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    mp.spawn(save_sharded, args=(2, str(folder)), nprocs=2)
    return folder / "ckpt"


@pytest.mark.parametrize("piece", [0, 4, 28, 1000])
def test_fsdp2_shards_of_two_processes(sharded, piece):
    assert len(list(sharded.glob("*.distcp"))) == 2
    with open_checkpoint(sharded) as checkpoint:
        assert_reads(checkpoint, dict(build_model().state_dict()), piece)
        assert len(checkpoint.tensors["0.weight"].spans) == 2


@pytest.mark.parametrize("piece", [0, 3, 12, 20])
def test_column_shards_are_gathered(sharded, piece):
    torch.manual_seed(7)
    wide = torch.randn(5, 9)
    with open_checkpoint(sharded, key="extra") as checkpoint:
        assert checkpoint.tensors["columns"].spans is None
        assert_reads(checkpoint, {"columns": wide, "replicated": wide}, piece)


def test_a_missing_rank_is_named(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "ckpt")
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(PolyakError, match=r"no file .*__1_0\.distcp"):
        open_checkpoint(folder)


def test_a_rank_file_cut_short_is_named(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "ckpt")
    shard = folder / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(FormatError, match=r"__1_0\.distcp is cut short"):
        open_checkpoint(folder)


def test_swapped_ranks_are_noticed(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "ckpt")
    first, second = (folder / name for name in ("__0_0.distcp", "__1_0.distcp"))
    data = second.read_bytes()
    second.write_bytes(first.read_bytes())
    first.write_bytes(data + b"\0" * 4096)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(FormatError):
        for stored in checkpoint.tensors.values():
            read_all(stored)


def test_metadata_that_would_run_something_runs_nothing(tmp_path):
    class Runs:
        def __reduce__(self):
            return Path.touch, (tmp_path / "marker",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(FormatError, match=r"expected a metadata\.Metadata"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "marker").exists()


def edited(sharded, tmp_path, change):
    """A copy of the folder whose metadata was changed by torch's own reader and pickled again."""
    folder = shutil.copytree(sharded, tmp_path / "ckpt")
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def test_holes_and_overlaps_of_chunks(sharded, tmp_path):
    def hole(metadata):
        metadata.state_dict_metadata["model.0.weight"].chunks.pop()

    with pytest.raises(FormatError, match=r"0\.weight: It has 35 values, and 20 are stored"):
        open_checkpoint(edited(sharded, tmp_path / "hole", hole))

    def overlap(metadata):
        chunks = metadata.state_dict_metadata["model.0.weight"].chunks
        chunks[1] = chunks[0]

    with pytest.raises(FormatError, match=r"0\.weight: It has chunks that overlap"):
        open_checkpoint(edited(sharded, tmp_path / "overlap", overlap))


def test_a_path_out_of_the_folder_is_refused(sharded, tmp_path):
    def escape(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = "../outside.distcp"

    with pytest.raises(FormatError, match="is not a file name"):
        open_checkpoint(edited(sharded, tmp_path, escape))


def test_safetensors_written_by_dcp(tmp_path):
    state = {"rows": torch.randn(7, 5), "bias": torch.ones(3)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    writer = dcp.HuggingFaceStorageWriter
    dcp.save(state, storage_writer=writer(str(whole)), no_dist=True)
    with open_checkpoint(whole) as checkpoint:
        assert_reads(checkpoint, state)
    dcp.save(state, storage_writer=writer(str(parts), save_distributed=True), no_dist=True)
    with open_checkpoint(parts) as checkpoint:
        assert_reads(checkpoint, state)
    for path in parts.iterdir():
        with pytest.raises(FormatError, match="that one rank saved"):
            open_checkpoint(path)


@pytest.mark.parametrize("beside", [{"step": 5}, {"groups": [{"lr": 0.1, "name": None}]}])
@pytest.mark.parametrize("size", [3, 100_000])  # the end of a long file looks like no zip
def test_safetensors_behind_pickles_are_explained(tmp_path, beside, size):
    """What torch 2.13 writes for a state with values that are no tensors."""
    state = {"rows": torch.randn(size)}
    dcp.save(
        {**state, **beside},
        storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path)),
        no_dist=True,
    )
    (path,) = tmp_path.glob("*.safetensors")
    for place in (path, tmp_path):
        with pytest.raises(FormatError, match=r"a value that is no tensor.*Save the tensors alone"):
            open_checkpoint(place)
    written = path.read_bytes()  # as the message says
    path.write_bytes(written[written.index(b'{"__metadata__"') - 8 :])
    with open_checkpoint(path) as checkpoint:
        assert_reads(checkpoint, state)


@pytest.mark.parametrize("lost", [1, 200, 4000])
def test_safetensors_behind_pickles_that_were_cut_short_are_not_called_whole(tmp_path, lost):
    dcp.save(
        {"rows": torch.randn(3000), "step": 5},
        storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path)),
        no_dist=True,
    )
    (path,) = tmp_path.glob("*.safetensors")
    with pytest.raises(FormatError, match="What is saved is whole"):
        open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(FormatError, match=r"Save the tensors alone.*does not end where") as caught:
        open_checkpoint(path)
    assert "is whole" not in str(caught.value)


def torch_file(path):
    torch.save({"rows": torch.randn(1000), "__metadata__": 1}, path)


def arrays(path):
    with path.open("wb") as file:
        np.savez(file, rows=np.ones(1000))


def text(path):
    """A file of torch.save with the words of a header, but no length before them."""
    torch.save({"rows": torch.randn(1000), "note": '{"__metadata__": {}}'}, path)


@pytest.mark.parametrize("write", [torch_file, arrays, text])
@pytest.mark.parametrize("left", [0.5, 0.99])
def test_other_damaged_zips_get_no_such_explanation(tmp_path, write, left):
    """Only the name is that of a safetensors file: nothing in it is whole."""
    path = tmp_path / "model.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    assert "HuggingFaceStorageWriter" not in str(caught.value)
    assert "What is saved is whole" not in str(caught.value)


def test_a_chunk_of_another_tensor_is_noticed(single, tmp_path):
    def swap(metadata):
        where = {index.fqn: index for index in metadata.storage_data}
        first, second = where["model.rows"], where["model.transposed"]
        data = metadata.storage_data
        data[first], data[second] = data[second], data[first]

    with open_checkpoint(edited(single, tmp_path, swap)) as checkpoint:
        read_all(checkpoint.tensors["bias"])
        for name in ("rows", "transposed"):
            with pytest.raises(FormatError, match=rf"should hold F32 .* of '{name}'"):
                read_all(checkpoint.tensors[name])


def test_a_chunk_larger_than_its_item_is_refused(single, tmp_path):
    def enlarge(metadata):
        entry = metadata.state_dict_metadata["model.rows"]
        entry.size = torch.Size([4_000, *entry.size[1:]])
        entry.chunks[0].sizes = entry.size

    with pytest.raises(FormatError, match=r"the chunk of 'rows' at .* does not fit"):
        open_checkpoint(edited(single, tmp_path, enlarge))


def test_state_that_is_no_tensor(tmp_path):
    extra = {"scale": torch.ones(3), "n": [4, None], "both": [torch.zeros(1), ("a", 2.5)]}
    state = {"a.weight": torch.ones(2), "a._extra_state": extra}
    tensors = {
        "a.weight": torch.ones(2),
        "a._extra_state.scale": torch.ones(3),
        "a._extra_state.both.0": torch.zeros(1),
    }
    for number, saved in enumerate((state, {"model": state, "step": 1})):
        dcp.save(saved, checkpoint_id=tmp_path / str(number), no_dist=True)
        with open_checkpoint(tmp_path / str(number)) as checkpoint:
            assert_reads(checkpoint, tensors)
            assert checkpoint.extra["a._extra_state"] == {
                "scale": TensorAt("a._extra_state.scale"),
                "n": [4, None],
                "both": [TensorAt("a._extra_state.both.0"), ("a", 2.5)],
            }
