"""Distributed checkpoints in and out: what a merge writes is loaded by torch, on other numbers of ranks."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from polyak import average_checkpoints, open_checkpoint
from polyak.checkpoints.merging import plan
from polyak.errors import ArgumentError, PolyakWarning

sys.path.insert(0, str(Path(__file__).parents[2] / "reference"))

import dcp_ranks
from dcp_ranks import STEPS

pytestmark = pytest.mark.filterwarnings("ignore::polyak.errors.StaleStatistics")

CASES = {
    "plain-merged": "plain",
    "nested-merged": "nested",
    "titan-merged": "titan",
    "titan-model": "titan",
    "files-merged": "plain",
}


def launch(target, world, *args):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=target, args=(rank, world, *args)) for rank in range(world)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(180)
        one.kill()
    assert [one.exitcode for one in ranks] == [0] * world


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on two ranks, saved in the layouts of several frameworks."""
    folder = tmp_path_factory.mktemp("dcp")
    launch(dcp_ranks.train, 2, str(folder))
    return folder


@pytest.fixture(scope="module")
def merged(run):
    """Every layout merged, and loaded by torch on three ranks."""

    def inputs(layout):
        return sorted((run / layout).iterdir())

    average_checkpoints(inputs("plain"), run / "plain-merged", format="dcp")
    average_checkpoints(
        inputs("nested"), run / "nested-merged", format="dcp", key="app.model", keep_state=True
    )
    average_checkpoints(inputs("titan"), run / "titan-merged", format="dcp", keep_state=True)
    with pytest.warns(
        PolyakWarning, match=r"what else is in .*step-300: optimizer \(\d+\), train_state \(3\)"
    ):
        average_checkpoints(inputs("titan"), run / "titan-model", format="dcp", dcp_files=5)
    files = [run / f"full-{step}.pt" for step in STEPS]
    plain = [run / f"flat-{step}.pt" for step in STEPS]
    for path, flat in zip(files, plain, strict=True):
        torch.save(dict(torch.load(path, weights_only=True)), flat)
    with pytest.warns(PolyakWarning, match="without state that is no tensor: 1._extra_state"):
        average_checkpoints(plain, run / "files-merged", format="dcp", dcp_key="model", dcp_files=3)
    launch(dcp_ranks.load, 3, str(run), {k: v for k, v in CASES.items() if k != "files-merged"})
    return run


def mean_of(run):
    full = [torch.load(run / f"full-{step}.pt", weights_only=True) for step in STEPS]
    statistics = ("running_mean", "running_var", "num_batches_tracked", "_extra_state")
    return {
        name: value
        if name.endswith(statistics)
        else torch.stack([one[name] for one in full]).double().mean(0).float()
        for name, value in full[-1].items()
    }


@pytest.mark.parametrize("name", ["plain-merged", "nested-merged", "titan-merged", "titan-model"])
def test_torch_loads_the_average_on_another_number_of_ranks(merged, name):
    expected, loaded = mean_of(merged), torch.load(merged / f"{name}-loaded.pt", weights_only=True)
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith("_extra_state"):
            assert loaded[key] == {"note": "after 300"}
        else:
            torch.testing.assert_close(loaded[key], value, rtol=1e-6, atol=1e-7)


def test_state_of_the_run_is_the_newest_s_on_request(merged):
    for name in ("nested-merged", "titan-merged"):
        seen = json.loads((merged / f"{name}-seen.json").read_text())
        assert seen == {"step": 300, "ntokens_seen": 300_000}
    with open_checkpoint(merged / "titan-model", key="") as model:
        assert not [name for name in model.tensors if name.startswith("optimizer")]
    with open_checkpoint(merged / "titan-merged", key="") as whole:
        assert [name for name in whole.tensors if name.startswith("optimizer")]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_model_of_torch_files_goes_into_a_dcp_folder(merged):
    state = {"model": {"0.weight": torch.zeros(300, 70), "1.weight": torch.zeros(300, 70)}}
    dcp.load(state, checkpoint_id=merged / "files-merged", no_dist=True)
    for name, value in state["model"].items():
        torch.testing.assert_close(value, mean_of(merged)[name], rtol=1e-6, atol=1e-7)
    assert len([*(merged / "files-merged").glob("*.distcp")]) == 3


def test_there_are_as_many_files_as_before_and_rows_are_cut_as_fsdp_does(merged):
    assert len([*(merged / "plain-merged").glob("*.distcp")]) == 2
    assert len([*(merged / "titan-model").glob("*.distcp")]) == 5
    described = dcp.FileSystemReader(merged / "titan-model").read_metadata()
    chunks = described.state_dict_metadata["0.weight"].chunks
    assert [tuple(one.sizes) for one in chunks] == [(300, 70)]  # 84 kB: not worth more than one
    assert described.planner_data["0.weight"] == ("0.weight",)


def test_the_folder_says_what_it_is_made_of_and_is_not_averaged_again(merged):
    with open_checkpoint(merged / "plain-merged") as opened:
        assert opened.is_merged
        assert opened.step == 300
        assert [one["step"] for one in json.loads(opened.metadata["inputs"])] == [*STEPS]
    with pytest.raises(ArgumentError, match="would count twice"):
        average_checkpoints(
            [*sorted((merged / "plain").iterdir()), merged / "plain-merged"],
            merged / "again",
            format="dcp",
        )


def digest(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_and_resumed_merges_write_the_same_bytes(merged, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK_BYTES", 4096)
    inputs = sorted((merged / "titan").iterdir())
    options = {"format": "dcp", "keep_state": True, "verify": True}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    average_checkpoints(inputs, tmp_path / "a" / "m", **options)
    parts = [
        average_checkpoints(inputs, tmp_path / "b" / "m", part=f"{part}/3", **options)
        for part in (2, 3, 1)
    ]
    assert [one.published for one in parts] == [False, False, True]
    assert digest(tmp_path / "a" / "m") == digest(tmp_path / "b" / "m")
    again = average_checkpoints(inputs, tmp_path / "a" / "m", resume=True, **options)
    assert again.published
    replaced = average_checkpoints(inputs, tmp_path / "b" / "m", overwrite=True, **options)
    assert replaced.published
    assert digest(tmp_path / "a" / "m") == digest(tmp_path / "b" / "m")
