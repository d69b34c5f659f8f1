"""Several ranks write one file: the bytes of a single process, and an error on one is an error on all."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from polyak.checkpoints.writing import collective
from polyak.checkpoints.writing.collective import Boxes, write_collectively
from polyak.checkpoints.writing.save import write_checkpoint
from polyak.errors import ArgumentError, MismatchError, OutputError

sys.path.insert(0, str(Path(__file__).parents[2] / "reference"))

import collective_ranks
from collective_ranks import METADATA, RANKS, TIES, boxes_of, whole


def write(rank, path, entries=None, **options):
    options = {"ties": TIES, "metadata": METADATA, **options}
    write_collectively(path, boxes_of(rank) if entries is None else entries, **options)


def in_small_pieces(rank, folder):
    collective.SCRATCH = 700  # a box of 64 x 24 float64 is 12 kB
    try:
        write(rank, folder / "pieces.safetensors")
    finally:
        collective.SCRATCH = 4 * 1024**2


def some_ranks(rank, folder):
    group = dist.new_group([1, 3])
    if rank in (1, 3):
        both = torch.arange(6.0).reshape(2, 3)
        mine = {"w": (torch.float32, (2, 3), [([rank // 2, 0], both[rank // 2 : rank // 2 + 1])])}
        write_collectively(folder / "group.safetensors", mine, group=group)


def changed(rank, guilty, **entries):
    return {**boxes_of(rank), **entries} if rank == guilty else boxes_of(rank)


def fails_on_one(rank, folder):
    """A rank whose write fails in the middle: a disk that is full for it."""
    original = os.pwrite

    def full(descriptor, data, offset):
        if offset > 6000:
            raise OSError(28, "No space left on device")
        return original(descriptor, data, offset)

    os.pwrite = full if rank == 2 else original
    try:
        write(rank, folder / "kept.safetensors", overwrite=True)
    finally:
        os.pwrite = original


SHORT = (torch.float32, (2, 3), [((0, 0), torch.zeros(1, 3))])
LONG = (torch.float32, (3, 3), [((0, 0), torch.zeros(1, 3))])
OUTSIDE = (torch.float32, (2, 3), [((1, 0), torch.zeros(2, 3))])
CALLS = {
    "file": lambda rank, folder: write(rank, folder / "model.safetensors"),
    "pieces": in_small_pieces,
    "group": some_ranks,
    "shards": lambda r, f: write(r, f / "shards", shards=True, shard_size=3000, sidecars={"config.json": b"{}"}),
    "one shard": lambda r, f: write(r, f / "one-shard", shards=True),
    "shards again": lambda r, f: write(r, f / "shards", shards=True, overwrite=True, shard_size=50_000, sidecars={"config.json": b"1"}),
    "exists": lambda rank, folder: write(rank, folder / "model.safetensors"),
    "foreign": lambda r, f: write(r, f / "foreign", shards=True, overwrite=True),
    "suffix": lambda rank, folder: write(rank, folder / "model.pt"),
    "shape": lambda r, f: write(r, f / "x.safetensors", changed(r, 3, few=LONG)),
    "names": lambda r, f: write(r, f / "x.safetensors", changed(r, 2, more=SHORT)),
    "order": lambda r, f: write(r, f / "x.safetensors", dict(sorted(boxes_of(r).items(), reverse=r == 1))),
    "count": lambda r, f: write(r, f / "x.safetensors", metadata={"count": str(3 + (r == 3))}),
    "path": lambda rank, folder: write(rank, folder / f"x{rank}.safetensors"),
    "repeated": lambda r, f: write(r, f / "x.safetensors", changed(r, 3, few=SHORT)),
    "missing": lambda r, f: write(r, f / "x.safetensors", changed(r, 1, few=(torch.float32, (2, 3), []))),
    "outside": lambda r, f: write(r, f / "x.safetensors", changed(r, 1, few=OUTSIDE)),
    "no folder": lambda rank, folder: write(rank, folder / "nowhere" / "x.safetensors"),
    "full": fails_on_one,
    "after all": lambda rank, folder: write(rank, folder / "kept.safetensors", overwrite=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collective")
    (folder / "kept.safetensors").write_bytes(b"what was there")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "notes.txt").write_text("of the user")
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=collective_ranks.run, args=(rank, str(folder), CALLS))
        for rank in range(RANKS)
    ]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(120)
        one.kill()
    assert [one.exitcode for one in ranks] == [0] * RANKS
    return folder


@pytest.fixture(scope="module")
def told(done):
    """What each rank was told, per call."""
    found = [json.loads((done / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    return {call: [one[call] for one in found] for call in CALLS}


@pytest.mark.parametrize("name", ["model", "pieces", "kept"])
def test_the_file_is_that_of_one_process(done, tmp_path, name):
    write_checkpoint(tmp_path / "one.safetensors", whole(), ties=TIES, metadata=METADATA)
    assert (done / f"{name}.safetensors").read_bytes() == (
        tmp_path / "one.safetensors"
    ).read_bytes()


def test_some_of_the_ranks_can_write(done):
    assert load_file(done / "group.safetensors")["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_shards_hold_each_tensor_whole_and_an_index_lists_them(done):
    index = json.loads((done / "shards" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert (done / "shards" / "config.json").read_bytes() == b"1"  # of the second write
    assert {p.name for p in (done / "shards").iterdir()} == files | {
        "config.json",
        "model.safetensors.index.json",
    }
    for name, tensor in whole().items():
        with safe_open(done / "shards" / index["weight_map"][name], "pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.metadata()["format"] == "pt"
            assert file.metadata()["profile"] == "SWA()"
    assert [p.name for p in (done / "one-shard").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        ("exists", "OutputError", "model.safetensors exists"),
        ("foreign", "OutputError", "holds notes.txt"),
        ("suffix", "ArgumentError", "suffix '.pt'; expected .safetensors."),
        (
            "shape",
            "MismatchError",
            "Rank 3 was given other tensors than rank 0: number 5 is ['few'",
        ),
        (
            "names",
            "MismatchError",
            "Rank 2 was given other tensors than rank 0: number 10 is ['more'",
        ),
        ("order", "MismatchError", "Rank 1 was given other tensors than rank 0: number 1 is"),
        ("count", "MismatchError", "Rank 3 was given other metadata than rank 0"),
        ("path", "MismatchError", "Rank 1 was given other path than rank 0"),
        (
            "repeated",
            "MismatchError",
            "few: the ranks' boxes hold 9 values, some twice; expected 6",
        ),
        ("missing", "MismatchError", "few: the ranks' boxes hold 3 values; expected 6"),
        ("outside", "ArgumentError", "The box [2, 3] at [1, 0] is not inside few, [2, 3]"),
        ("no folder", "OutputError", "Make the folder"),
        ("full", "OutputError", "No space left on device. Make room"),
    ],
)
def test_an_error_on_one_rank_is_an_error_on_all(told, call, kind, said):
    assert [found[0] for found in told[call]] == [kind] * RANKS
    assert all(said in found[1] for found in told[call]), told[call]


def test_a_failure_leaves_what_was_there_and_nothing_else(done, told):
    assert told["full"][0][1].startswith("Rank 2 failed: ")
    assert told["file"] == told["after all"] == ["nothing"] * RANKS
    left = {path.name for path in done.iterdir()}
    assert left == {
        "model.safetensors", "pieces.safetensors", "kept.safetensors", "group.safetensors", "shards",
        "one-shard", "foreign", "rendezvous", *(f"rank{rank}.json" for rank in range(RANKS)),
    } - (set() if (done / "rendezvous").exists() else {"rendezvous"})  # fmt: skip


def test_without_a_process_group_one_process_writes(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4)
    path = tmp_path / "one.safetensors"
    write_collectively(
        path, {"w": Boxes(torch.float32, (3, 4), [((0, 0), tensor.t().contiguous().t())])}
    )
    assert torch.equal(load_file(path)["w"], tensor)
    with pytest.raises(OutputError, match="exists"):
        write_collectively(path, {"w": Boxes(torch.float32, (3, 4), [((0, 0), tensor)])})
    with pytest.raises(MismatchError, match="hold 0 values; expected 12"):
        write_collectively(path, {"w": Boxes(torch.float32, (3, 4), [])}, overwrite=True)
    with pytest.raises(ArgumentError, match="A box of w is"):
        write_collectively(path, {"w": Boxes(torch.float64, (3, 4), [((0, 0), tensor)])})
    with pytest.raises(ArgumentError, match="which no file holds"):
        write_collectively(path, {"w": Boxes(torch.quint8, (1,), [])})
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]
