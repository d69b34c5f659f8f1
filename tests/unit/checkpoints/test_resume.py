"""Interrupted, continued, shared among processes, verified: always the same bytes."""

import hashlib
import json
import multiprocessing
import os

import pytest
import torch
from reference.merging import stored_checkpoints
from safetensors import safe_open

from polyak.checkpoints.merging import journal as journals
from polyak.checkpoints.merging import plan as planning
from polyak.checkpoints.merging import prepare
from polyak.checkpoints.merging.average import average_checkpoints
from polyak.checkpoints.merging.plan import share_of_chunks
from polyak.errors import OutputError, UsageError

ANY = torch.Generator().manual_seed(2)
HOW = {"swa": "swa", "ema": "ema:half_life=100"}


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MergePlan", lambda tensors, _: planning.MergePlan(tensors, 256))
    states = [
        {
            "a": torch.randn(3000, generator=ANY),
            "b": torch.randn(999, generator=ANY).bfloat16(),
            "n": torch.tensor(i),
        }
        for i in range(3)
    ]
    return stored_checkpoints(tmp_path, states)


def outputs(folder):
    folder.mkdir(exist_ok=True)
    return {folder / "x.safetensors": HOW["swa"], folder / "y.pt": HOW["ema"]}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def interrupt_after(chunks):
    def progress(done, total):
        if done >= chunks:
            raise KeyboardInterrupt

    return progress


def interrupted(paths, folder, chunks, **options):
    with pytest.raises(KeyboardInterrupt):
        average_checkpoints(
            paths, outputs(folder), progress=interrupt_after(chunks), threads=1, **options
        )
    assert not (folder / "x.safetensors").exists()


@pytest.mark.parametrize("chunks", [1, 10, 30])
def test_continues_to_the_same_bytes(tmp_path, paths, chunks):
    average_checkpoints(paths, outputs(tmp_path / "whole"))
    interrupted(paths, tmp_path / "again", chunks)
    done = []
    average_checkpoints(
        paths,
        outputs(tmp_path / "again"),
        resume=True,
        threads=1,
        progress=lambda n, total: done.append(n),
    )
    assert done[0] > chunks  # nothing is done twice
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_resuming_what_is_whole_and_what_never_began(tmp_path, paths):
    for _ in range(2):
        average_checkpoints(paths, outputs(tmp_path / "out"), resume=True, verify=True)
    assert len(contents(tmp_path / "out")) == 2
    with pytest.raises(OutputError, match="exists"):
        average_checkpoints(
            paths, {tmp_path / "out" / "x.safetensors": "power:gamma=2"}, resume=True
        )


def test_a_changed_input_is_not_continued(tmp_path, paths):
    interrupted(paths, tmp_path / "out", 5)
    os.utime(paths[0], ns=(1, 1))
    with pytest.raises(UsageError, match="left by another merge"):
        average_checkpoints(paths, outputs(tmp_path / "out"), resume=True)
    average_checkpoints(paths, outputs(tmp_path / "out"))
    assert len(contents(tmp_path / "out")) == 2  # what was left is gone


def test_after_the_machine_went_down_only_synced_chunks_count(tmp_path, paths, monkeypatch):
    average_checkpoints(paths, outputs(tmp_path / "whole"))
    interrupted(paths, tmp_path / "again", 10)
    monkeypatch.setattr(journals, "_boot_id", lambda: b"another".ljust(64))
    done = []
    average_checkpoints(
        paths,
        outputs(tmp_path / "again"),
        resume=True,
        threads=1,
        progress=lambda n, total: done.append(n),
    )
    assert done[0] == 1
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_synced_chunks_survive_the_machine(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(journals, "SYNC_SECONDS", -1.0)
    interrupted(paths, tmp_path / "out", 10)
    monkeypatch.setattr(journals, "_boot_id", lambda: b"another".ljust(64))
    done = []
    average_checkpoints(
        paths,
        outputs(tmp_path / "out"),
        resume=True,
        threads=1,
        progress=lambda n, total: done.append(n),
    )
    assert done[0] >= 10


def test_another_process_at_it_is_noticed(tmp_path, paths):
    interrupted(paths, tmp_path / "out", 5)
    [journal] = (tmp_path / "out").glob(".x.*/journal-*")
    held = journals.Journal(journal, 1, 2, keep=True)
    try:
        for options in ({}, {"resume": True}):
            with pytest.raises(OutputError, match="Another process"):
                average_checkpoints(paths, outputs(tmp_path / "out"), **options)
    finally:
        held.close()


@pytest.mark.parametrize("count", [2, 5])
def test_parts_in_any_order_publish_once(tmp_path, paths, count):
    average_checkpoints(paths, outputs(tmp_path / "whole"), verify=True)
    order = [*range(2, count + 1), 1]
    for position, part in enumerate(order):
        done = average_checkpoints(
            paths, outputs(tmp_path / "parts"), part=f"{part}/{count}", verify=True
        )
        assert done.published == (position == count - 1)
        assert done.published == (tmp_path / "parts" / "x.safetensors").exists()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def run_part(paths, targets, part):
    average_checkpoints(paths, targets, part=part)


def test_parts_at_the_same_time(tmp_path, paths):
    average_checkpoints(paths, outputs(tmp_path / "whole"))
    context = multiprocessing.get_context("fork" if torch.get_num_threads() == 1 else "spawn")
    targets = outputs(tmp_path / "parts")
    crew = [context.Process(target=run_part, args=(paths, targets, f"{i}/3")) for i in (1, 2, 3)]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
    assert [process.exitcode for process in crew] == [0, 0, 0]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_part_that_was_killed_goes_on(tmp_path, paths):
    average_checkpoints(paths, outputs(tmp_path / "whole"))
    average_checkpoints(paths, outputs(tmp_path / "parts"), part="2/2")
    interrupted(paths, tmp_path / "parts", 3, part="1/2")
    done = average_checkpoints(paths, outputs(tmp_path / "parts"), part="1/2", resume=True)
    assert done.published
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 500])
def test_parts_split_the_bytes_evenly(tmp_path, paths, count):
    with prepare.prepared(
        paths, {tmp_path / "x.safetensors": "swa"}, prepare.MergeOptions()
    ) as merge:
        parts = [share_of_chunks(merge.plan, i, count) for i in range(count)]
        assert [index for part in parts for index in part] == list(range(len(merge.plan)))
        if count < 10:
            assert max(map(len, parts)) - min(map(len, parts)) <= 4


def test_verify_puts_the_hashes_into_the_file(tmp_path, paths):
    target = tmp_path / "out.safetensors"
    average_checkpoints(paths, {target: "swa"}, verify=True)
    with safe_open(target, "pt") as file:
        inputs = json.loads(file.metadata()["inputs"])
    for one, path in zip(inputs, paths, strict=True):
        assert one["sha256"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}


def test_verify_notices_a_disk_that_lies(tmp_path, paths, monkeypatch):
    real = os.pwrite

    def flips(descriptor, data, offset):
        damaged = bytearray(data)
        if len(damaged) == 256:
            damaged[17] ^= 4
        return real(descriptor, damaged, offset)

    monkeypatch.setattr(os, "pwrite", flips)
    with pytest.raises(OutputError, match="does not hold what was written"):
        average_checkpoints(paths, {tmp_path / "out.safetensors": "swa"}, verify=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_whole_output_of_another_dtype_is_not_taken_for_ours(tmp_path, paths):
    target = tmp_path / "out.safetensors"
    average_checkpoints(paths, {target: "swa"})
    for options in ({"dtype": "float16"}, {"exclude": ["a"]}):
        with pytest.raises(OutputError, match="exists"):
            average_checkpoints(paths, {target: "swa"}, resume=True, **options)
