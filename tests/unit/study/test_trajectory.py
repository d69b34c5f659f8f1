"""Averages made afterwards from a record: plans, values, files, and what is refused."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from reference.trajectory import planned_error as obvious_error
from safetensors.torch import load_file, save_file
from torch import nn

import polyak
from polyak.checkpoints import thin_record
from polyak.checkpoints.intervals import scan_intervals
from polyak.checkpoints.thinning import grouped
from polyak.errors import ArgumentError, FormatError, MismatchError, OutputError, StaleStatistics
from polyak.study.trajectory import Trajectory

LENGTH, COUNT = 20, 32
PROFILES = [
    "swa", "ema:half_life=60", "ema:half_life=60,keep_initial=true", "power:std=0.1", "window:length=160",
    "window:length=155", "annealed:shape=cosine", "annealed:shape=sqrt", "swa:start=300", "ema:half_life=30,start=110",
]  # fmt: skip


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.last = nn.Linear(5, 5, bias=False)
        self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(5)


@pytest.fixture(scope="module")
def walk():
    torch.manual_seed(0)
    return torch.randn(LENGTH * COUNT, 5, 5, dtype=torch.float64).cumsum(0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, walk):
    folder = tmp_path_factory.mktemp("record")
    model = Tied()
    with polyak.Recorder(model, folder, interval=LENGTH, captures=5) as made:
        for step, values in enumerate(walk, start=1):
            with torch.no_grad():
                model.first.weight.copy_(values)
                model.norm.num_batches_tracked.fill_(step)
            made.update()
    return folder


@pytest.fixture
def folder(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "record", ignore=lambda *_: [".means"])


def captured_mean(walk, start, end):
    """The mean of the captures of whole intervals, the third of every four steps, in float64."""
    return walk[start:end].reshape(-1, 4, 5, 5)[:, 2].mean(0)


@pytest.mark.filterwarnings("ignore::polyak.errors.StaleStatistics")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("until", [None, 320, 333.5])
def test_weights_sum_to_1_and_the_average_is_their_sum(recorded, walk, profile, until):
    trajectory = Trajectory(recorded, cache_size=0)
    plan = trajectory.plan(profile, until)
    assert sum(plan.weights) == pytest.approx(1, abs=1e-12)
    assert min(plan.weights) >= 0
    found = trajectory.average(profile, until)
    expected = sum(
        weight * captured_mean(walk, int(piece.start), int(piece.end))
        for weight, piece in zip(plan.weights, plan.pieces, strict=True)
    )
    torch.testing.assert_close(found["first.weight"].double(), expected, atol=2e-6, rtol=2e-7)
    assert torch.equal(found["last.weight"], found["first.weight"])
    # The newest statistics: of the last capture, in the middle of the last four steps.
    assert found["norm.num_batches_tracked"] == plan.pieces[-1].end - 1
    triples = [(piece.start, piece.end, piece.captures) for piece in plan.pieces]
    error = obvious_error(polyak.maths.text.as_profile(profile), triples, plan.weights, plan.until)
    assert plan.error == pytest.approx(error, rel=0.03)
    assert 1 <= plan.effective_samples <= 5 * COUNT
    assert "planned error" in str(plan)


@pytest.mark.filterwarnings("ignore::polyak.errors.StaleStatistics")
def test_windows_on_edges_read_few_files_and_are_the_mean_of_their_captures(folder, walk):
    trajectory = Trajectory(folder)
    for first, last in [(0, 32), (1, 31), (3, 30), (8, 16), (31, 32), (5, 6)]:
        for _ in range(4):  # in the end the means are there
            now = last * LENGTH
            profile = polyak.Window((last - first) * LENGTH)
            found = trajectory.average(profile, now)["first.weight"].double()
            expected = captured_mean(walk, first * LENGTH, now)
            torch.testing.assert_close(found, expected, atol=3e-6, rtol=2e-7)
        with trajectory._opened([trajectory.plan(profile, now)]) as (inputs, _):
            assert len(inputs) - 1 < 16
    sizes = [one.stat().st_size for one in (folder / ".means").iterdir()]
    assert 3 <= len(sizes) <= 6, sizes  # none of a few files, which are read as fast


@pytest.mark.filterwarnings("ignore::polyak.errors.StaleStatistics")
def test_kept_means_stay_within_their_limit_and_follow_the_record(folder):
    size = next(folder.glob("interval-*")).stat().st_size
    small = Trajectory(folder, cache_size=3 * size)
    for first in (1, 3, 5, 7):
        small.average(polyak.Window((COUNT - first) * LENGTH))
        kept = list((folder / ".means").iterdir())
        assert sum(one.stat().st_size for one in kept) <= 3 * size + 4096 * len(kept)
    none = Trajectory(folder, cache_size="0")
    shutil.rmtree(folder / ".means")
    before = none.average("window:length=400")["first.weight"]
    assert not (folder / ".means").exists()
    assert torch.allclose(before, Trajectory(folder).average("window:length=400")["first.weight"])
    # Another file in the place of an interval: its means are not used again.
    shutil.copy(folder / "interval-1.safetensors", folder / "copy")
    changed = load_file(folder / "interval-20.safetensors")
    changed["first.weight"] += 1
    from safetensors import safe_open

    with safe_open(folder / "interval-20.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(changed, folder / "interval-20.safetensors", metadata)
    after = Trajectory(folder).average("window:length=400")["first.weight"]
    torch.testing.assert_close(after, before + 1 / 20)


@pytest.mark.filterwarnings("ignore::polyak.errors.StaleStatistics")
def test_saved_files_hold_the_average_and_say_what_they_are(folder, tmp_path):
    trajectory = Trajectory(folder, cache_size=0)
    outputs = {tmp_path / "a.safetensors": "ema:half_life=60", tmp_path / "b.pt": polyak.SWA()}
    done = trajectory.save(outputs, until=333)
    assert len(done.inputs) == 17
    alone = trajectory.average("ema:half_life=60", 333)
    saved = load_file(tmp_path / "a.safetensors")
    assert torch.equal(saved["first.weight"], alone["first.weight"])
    model = Tied()
    model.load_state_dict(torch.load(tmp_path / "b.pt"))
    assert torch.equal(model.first.weight, trajectory.average("swa", 333)["first.weight"])
    with polyak.open_checkpoint(tmp_path / "a.safetensors") as opened:
        assert opened.metadata["profile"] == "ema:half_life=60"
        assert opened.metadata["time"] == "333.0"
        assert opened.step == 333
        assert "interval" not in opened.metadata
    average = polyak.Average(model, "ema:half_life=60")
    average.load(tmp_path / "a.safetensors")  # and averaging goes on from there
    assert average.time == 333
    with pytest.raises(OutputError, match="exists"):
        trajectory.save(tmp_path / "a.safetensors", "swa")
    trajectory.save(tmp_path / "a.safetensors", "swa", dtype="bfloat16", overwrite=True)
    assert load_file(tmp_path / "a.safetensors")["first.weight"].dtype == torch.bfloat16


def test_a_moment_inside_an_interval_says_what_it_costs(recorded):
    trajectory = Trajectory(recorded)
    plan = trajectory.plan("window:length=100", 330)
    assert [piece.end for piece in plan.pieces][-1] == 340
    assert plan.weights[-1] == pytest.approx(0.1)
    assert any("inside the interval from 320 to 340" in note for note in plan.notes)
    assert plan.error > trajectory.plan("window:length=100", 340).error
    assert plan.key != trajectory.plan("window:length=100", 340).key
    short = trajectory.plan("ema:half_life=4")
    assert not short.resolved
    assert "not resolved" in str(short)


@pytest.mark.parametrize("until", [0, -5, 641, float("nan")])
def test_a_moment_outside_the_record(recorded, until):
    with pytest.raises(ArgumentError, match=r"the record is from 0 to 640 steps"):
        Trajectory(recorded).plan("swa", until)


def test_what_is_empty_at_that_moment(recorded):
    with pytest.raises(ArgumentError, match="starts at 500"):
        Trajectory(recorded).plan("swa:start=500", 400)
    assert Trajectory(recorded).plan("swa", 7).weights == (1.0,)  # within the first interval


def test_missing_and_damaged_intervals_are_named_and_the_rest_works(folder):
    (folder / "interval-3.safetensors").unlink()
    broken = folder / "interval-9.safetensors"
    broken.write_bytes(broken.read_bytes()[:-40])
    (folder / "interval-11.safetensors").write_bytes(b"not at all")
    trajectory = Trajectory(folder)
    assert trajectory.missing == ((40, 60), (160, 180), (200, 220))
    assert [*trajectory.damaged] == [str(folder / f"interval-{k}.safetensors") for k in (11, 9)]
    assert sum(trajectory.plan("window:length=400").weights) == pytest.approx(1)
    assert sum(trajectory.plan("ema:half_life=30").weights) == pytest.approx(1)
    with pytest.raises(FormatError, match=r"40 to 60, 160 to 180, 200 to 220(.|\n)*interval-9"):
        trajectory.plan("swa")


def test_intervals_of_another_run_are_named(folder, tmp_path):
    other = tmp_path / "other"
    with polyak.Recorder(nn.Linear(2, 2), other, interval=1) as made:
        for _ in range(40):
            made.update()
    shutil.copy(other / "interval-40.safetensors", folder / "interval-40.safetensors")
    found = Trajectory(folder)  # a stretch that the record has already: it is not used
    assert found.end == 640
    shutil.copy(other / "interval-3.safetensors", folder / "interval-3.safetensors")
    with pytest.raises((MismatchError, FormatError)):
        Trajectory(folder).plan("swa")


def test_no_record(tmp_path):
    with pytest.raises(ArgumentError, match="holds no recorded intervals"):
        Trajectory(tmp_path)
    with pytest.raises(ArgumentError, match=r"There is no folder .*nowhere"):
        Trajectory(tmp_path / "nowhere")
    save_file({"w": torch.ones(1)}, tmp_path / "interval-1.safetensors")
    with pytest.raises(ArgumentError, match="not a recorded interval"):
        Trajectory(tmp_path)


def test_checkpoints_become_a_trajectory(tmp_path):
    torch.manual_seed(0)
    values = torch.randn(6).double().cumsum(0)
    for k, value in enumerate(values, start=1):
        save_file({"w": value.float()[None]}, tmp_path / f"step-{k * 100}.safetensors")
    trajectory = Trajectory.from_checkpoints([tmp_path])
    assert (trajectory.unit, trajectory.start, trajectory.end) == ("steps", 0, 600)
    for method in (
        "ema:half_life=150",
        "power:std=0.1",
        "swa",
        "window:length=300",
        "annealed:shape=sqrt",
    ):
        polyak.average_checkpoints(
            sorted(tmp_path.glob("step-*")), tmp_path / "out.pt", method=method, overwrite=True
        )
        expected = torch.load(tmp_path / "out.pt")["w"]
        assert torch.equal(trajectory.average(method)["w"], expected)
    assert trajectory.plan("window:length=300").weights == pytest.approx(
        (0, 0, 0, 1 / 3, 1 / 3, 1 / 3)
    )
    steps = [100, 200, 300, 400]
    centred = trajectory.plan("ema:half_life=150", 450)
    assert centred.until == 400
    assert centred.weights == pytest.approx(
        polyak.maths.pieces.piece_weights(polyak.EMA.from_half_life(150), steps).tolist()
    )
    with pytest.raises(ArgumentError, match="from 100 to 600"):
        trajectory.plan("swa", 50)


def test_thinning(folder):
    swa = Trajectory(folder, cache_size=0).plan("swa")
    with pytest.warns(StaleStatistics):
        before = Trajectory(folder, cache_size=0).average("window:length=320")["first.weight"]
    assert thin_record(folder, 16) == 16
    found = scan_intervals(folder).intervals
    assert {one.end - one.start for one in found} == {40}
    assert {one.captures for one in found} == {10}
    with pytest.warns(StaleStatistics):
        after = Trajectory(folder, cache_size=0).average("window:length=320")["first.weight"]
    assert (after - before).norm() <= 8e-8 * before.norm()
    assert Trajectory(folder).plan("swa").effective_samples == pytest.approx(swa.effective_samples)
    assert thin_record(folder, 5, by="age") == 11
    lengths = [one.end - one.start for one in scan_intervals(folder).intervals]
    assert lengths == sorted(lengths, reverse=True)
    assert sum(lengths) == 640
    assert thin_record(folder, 10) == 0
    with pytest.raises(ArgumentError, match="'evenly' or 'age'"):
        thin_record(folder, 2, by="size")


def test_a_kill_between_the_merge_and_the_removal_leaves_a_record(folder):
    whole = Trajectory(folder, cache_size=0).plan("swa")
    kept = folder / "kept"
    shutil.copy(folder / "interval-1.safetensors", kept)
    thin_record(folder, 16)
    kept.replace(folder / "interval-1.safetensors")  # as if it had not been removed yet
    found = Trajectory(folder)
    assert (len(found.intervals), found.missing) == (16, ())
    assert found.plan("swa").effective_samples == pytest.approx(whole.effective_samples)


def test_groups_do_not_reach_over_what_is_missing(folder):
    (folder / "interval-16.safetensors").unlink()
    found = scan_intervals(folder).intervals
    groups = grouped(found, 1)
    assert [(g[0].start, g[-1].end) for g in groups] == [(0, 300), (320, 640)]
    assert all(a.end == b.start for g in groups for a, b in itertools.pairwise(g))


def test_a_record_is_found_in_the_folder_of_its_run(recorded, tmp_path):
    run = tmp_path / "run"
    first = shutil.copytree(recorded, run / "record" / "seed-0" / "swa")
    (run / "metrics.jsonl").write_text("{}")
    assert Trajectory(run).folder == first
    assert Trajectory(run / "record").edges == Trajectory(recorded).edges
    second = shutil.copytree(recorded, run / "record" / "seed-1" / "swa")
    with pytest.raises(ArgumentError, match="holds 2 records; name the one") as refused:
        Trajectory(run)
    assert str(first) in str(refused.value)
    assert str(second) in str(refused.value)
    assert Trajectory(second).folder == second


@pytest.mark.filterwarnings("ignore::polyak.errors.StaleStatistics")
def test_an_average_is_made_in_the_tensors_that_are_given(folder):
    trajectory = Trajectory(folder)
    plan = trajectory.plan("window:length=400")
    expected = dict(trajectory.tensors(plan))
    fits = torch.full_like(expected["first.weight"], float("nan"))
    row = torch.zeros(expected["first.bias"].shape[0] * 2)[::2]  # not in one row
    wide = torch.zeros_like(expected["norm.weight"], dtype=torch.float64)
    into = {"first.weight": fits, "first.bias": row, "norm.weight": wide}
    found = dict(trajectory.tensors(plan, into=into))
    assert found["first.weight"] is fits
    assert found["first.bias"] is not row
    assert found["norm.weight"] is not wide
    assert row.count_nonzero() == wide.count_nonzero() == 0
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
