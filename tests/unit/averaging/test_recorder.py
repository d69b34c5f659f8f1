"""The recorder: what it captures, what it writes, and what happens when something goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from safetensors import safe_open
from torch import nn

import polyak
from polyak import files, schedules
from polyak.averaging import recorder
from polyak.checkpoints.intervals import scan_intervals
from polyak.errors import (
    ArgumentError,
    FormatError,
    MismatchError,
    OutputError,
    PolyakError,
    PolyakWarning,
    UsageError,
)


class Scalar(nn.Module):
    """One weight, whose value is the step that it was left by."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.register_buffer("seen", torch.tensor(0))

    def go(self, step):
        with torch.no_grad():
            self.weight.fill_(step)
            self.seen.fill_(step)


def record(model, folder, steps, *, dt=1, first=0, **options):
    made = polyak.Recorder(model, folder, **options)
    for step in range(first + 1, first + steps + 1):
        model.go(step)
        made.update(dt)
    return made


def read(folder):
    """(start, end) -> captures, mean, newest buffer."""
    found = {}
    for one in scan_intervals(folder).intervals:
        with safe_open(one.path, "pt") as file:
            mean, seen = file.get_tensor("weight"), file.get_tensor("seen")
        assert (mean == mean[0]).all()
        found[one.start, one.end] = (one.captures, mean[0].item(), seen.item())
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("interval-*"))}


def test_captures_are_even_and_the_last_interval_has_its_true_edge(tmp_path):
    record(Scalar(), tmp_path, 250, interval=100, captures=20).close()
    found = read(tmp_path)
    assert [*found] == [(0, 100), (100, 200), (200, 250)]
    # In the middles of 20 cells, 3, 8, ..., 98: the mean of weights that drift is that of all steps.
    assert found[0, 100] == (20, 50.5, 100)
    assert found[100, 200] == (20, pytest.approx(150.5), 200)
    assert found[200, 250] == (10, pytest.approx(225.5), 250)
    assert [*contents(tmp_path)] == [f"interval-{k}.safetensors" for k in (1, 2, 3)]


@pytest.mark.parametrize(
    ("interval", "captures", "expected"),
    [(10, 20, 10), (30, 20, 20), (7, 3, 3), (1, 20, 1), (94, 20, 20), (12.5, 5, 5)],
)
def test_the_number_of_captures_whatever_the_number_of_steps(
    tmp_path, interval, captures, expected
):
    record(Scalar(), tmp_path, 200, interval=interval, captures=captures).close()
    found = scan_intervals(tmp_path).intervals
    assert {one.captures for one in found[:-1]} == {expected}
    assert found[-1].end == 200
    assert sum(one.end - one.start for one in found) == 200


def test_total_is_divided(tmp_path):
    record(Scalar(), tmp_path, 1000, total=1000, intervals=64).close()
    assert len(read(tmp_path)) == 64
    assert next(iter(read(tmp_path))) == (0, 16)


def test_one_capture_is_a_snapshot_of_the_end(tmp_path):
    record(Scalar(), tmp_path, 30, interval=10, captures=1).close()
    assert read(tmp_path) == {(0, 10): (1, 10, 10), (10, 20): (1, 20, 20), (20, 30): (1, 30, 30)}


def test_units_of_uneven_steps_have_true_edges_and_weigh_by_time(tmp_path):
    model = Scalar()
    made = polyak.Recorder(model, tmp_path, interval=1000, captures=10, unit="tokens")
    for step, dt in enumerate([700, 700, 100, 900, 2500], start=1):
        model.go(step)
        made.update(dt)
    made.close()
    assert read(tmp_path) == {
        (0, 1400): (2, 1.5, 2),
        (1400, 2400): (2, pytest.approx(3.9, abs=0.06), 4),
        (2400, 4900): (1, 5, 5),
    }
    assert scan_intervals(tmp_path).intervals[0].unit == "tokens"


def test_attached_it_counts_real_steps_beside_other_averages(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = polyak.Average(model, polyak.SWA())
    average.attach(optimizer)
    with polyak.Recorder(model, tmp_path, interval=5) as made:
        made.attach(optimizer)
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    found = scan_intervals(tmp_path).intervals
    assert [(one.start, one.end) for one in found] == [(0, 5), (5, 10), (10, 12)]
    assert average.count == 12
    optimizer.step()  # detached: nothing happens
    assert len(scan_intervals(tmp_path).intervals) == 3


def test_steps_that_only_the_device_knows_were_skipped_do_not_count(tmp_path):
    model = Scalar()
    made = polyak.Recorder(model, tmp_path, interval=4, captures=2)
    step = 0
    for real in [0, 0, 1, 1, 0, 1, 0, 1, 1, 1]:
        step += real
        model.go(step)
        made.update(real=torch.tensor(float(real)))
    made.update(real=False)
    made.close()
    assert read(tmp_path) == {(0, 4): (2, 3, 4), (4, 6): (1, 6, 6)}


def test_the_averaging_points_of_a_schedule(tmp_path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lr = polyak.LRSchedule(optimizer, schedules.CyclicLinear(high=0.1, low=0.01, cycle=3))
    with pytest.raises(ArgumentError, match="unit='captures'"):
        polyak.Recorder(model, tmp_path, interval=1, captures=1).attach(optimizer, at=lr)
    with polyak.Recorder(model, tmp_path, interval=1, captures=1, unit="captures") as made:
        made.attach(optimizer, at=lr)
        for _ in range(9):
            optimizer.step()
            lr.step()
    assert len(scan_intervals(tmp_path).intervals) == 4  # the entering weights, and three points


def test_the_newest_statistics_and_every_name_are_in_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(requires_grad=False)
    with polyak.Recorder(model, tmp_path, interval=2) as made:
        for _ in range(2):
            model(torch.randn(8, 2))
            made.update()
    state = torch.nn.Sequential(*model).state_dict()
    (one,) = scan_intervals(tmp_path).intervals
    with polyak.open_checkpoint(one.path) as opened:
        assert opened.tensors.keys() == state.keys()
        assert opened.step == 2
        assert opened.metadata["batchnorm"] == "stale"
        for name, tensor in state.items():
            assert torch.equal(opened.tensors[name].load(), tensor), name


def test_the_size_is_said_at_the_start(tmp_path, capsys):
    record(Scalar(), tmp_path / "a", 1, total=640)
    record(Scalar(), tmp_path / "b", 1, interval=1, keep=8)
    record(Scalar(), tmp_path / "c", 1, interval=10, dtype=torch.bfloat16)
    said = capsys.readouterr().err.splitlines()
    assert "64 intervals of 20 bytes: 1.28 kB in all" in said[0]
    assert "at most 8 intervals of 20 bytes: 160 bytes in all" in said[1]
    assert "14 bytes for every interval of 10" in said[2]


def test_a_record_that_is_full_is_merged_in_pairs(tmp_path):
    made = record(Scalar(), tmp_path, 100, interval=5, captures=5, keep=8)
    assert made.interval == 20
    made.close()
    found = read(tmp_path)
    assert [*found] == [(0, 20), (20, 40), (40, 60), (60, 80), (80, 100)]
    assert found[0, 20] == (20, 10.5, 20)
    assert found[20, 40] == (20, 30.5, 40)
    assert found[80, 100] == (5, pytest.approx(91), 100)


def test_a_record_can_be_continued_bitwise_in_the_middle_of_an_interval(tmp_path):
    kinds = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}, "full": {"keep": 4}}
    for name, options in kinds.items():
        torch.manual_seed(0)
        walk = torch.randn(150, 3).cumsum(0)
        whole, parts = tmp_path / name / "whole", tmp_path / name / "parts"

        def go(made, model, steps, walk=walk):
            for step in steps:
                with torch.no_grad():
                    model.weight.copy_(walk[step])
                made.update()

        model = Scalar()
        made = polyak.Recorder(model, whole, interval=20, **options)
        go(made, model, range(150))
        made.close()
        model = Scalar()
        made = polyak.Recorder(model, parts, interval=20, **options)
        go(made, model, range(47))
        file = tmp_path / "state.pt"
        torch.save(made.state_dict(), file)
        go(made, model, range(47, 131))  # and then the process dies
        made._folder.wait()
        model = Scalar()
        made = polyak.Recorder(model, parts, interval=20, **options)
        made.load_state_dict(torch.load(file, weights_only=True))
        go(made, model, range(47, 150))
        made.close()
        assert contents(parts) == contents(whole), name


def test_what_a_run_wrote_after_the_state_is_rewritten(tmp_path):
    model = Scalar()
    made = record(model, tmp_path, 25, interval=10)
    state = made.state_dict()
    torch.save(state, tmp_path / "state.pt")
    for step in range(26, 60):
        model.go(1000 + step)
        made.update()
    made.close()
    assert [*read(tmp_path)][-1] == (50, 59)
    again = polyak.Recorder(model, tmp_path, interval=10)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(26, 36):
        model.go(step)
        again.update()
    again.close()
    assert [*read(tmp_path)] == [(0, 10), (10, 20), (20, 30), (30, 35)]
    assert read(tmp_path)[20, 30][1] == pytest.approx(25.5)


def test_a_folder_with_another_record_is_refused(tmp_path):
    model = Scalar()
    first = record(model, tmp_path, 25, interval=10)
    state = first.state_dict()
    first.close()
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="holds another record"):
        record(model, tmp_path, 25, interval=10)
    other = record(model, tmp_path / "other", 25, first=7, interval=10)
    foreign = other.state_dict()
    with pytest.raises(OutputError, match="another record than the state"):
        polyak.Recorder(model, tmp_path, interval=10).load_state_dict(foreign)
    with pytest.raises(MismatchError, match="intervals of 10"):
        polyak.Recorder(model, tmp_path, interval=20).load_state_dict(state)
    with pytest.raises(MismatchError, match="different average"):
        polyak.Recorder(nn.Linear(2, 2), tmp_path, interval=10).load_state_dict(state)
    with pytest.raises(FormatError, match="not the state of a Recorder"):
        polyak.Recorder(model, tmp_path, interval=10).load_state_dict({"version": 1})
    assert contents(tmp_path) == before


def test_bfloat16_carries_what_rounding_leaves(tmp_path):
    torch.manual_seed(1)
    model = nn.Linear(40, 40)
    walk = 1 + 0.01 * torch.randn(64, 40, 40).cumsum(0)
    for dtype in (torch.float32, torch.bfloat16):
        with polyak.Recorder(model, tmp_path / str(dtype), interval=2, dtype=dtype) as made:
            for values in walk:
                with torch.no_grad():
                    model.weight.copy_(values)
                made.update()
    exact = polyak.Trajectory(tmp_path / "torch.float32").average("swa")["weight"]
    rounded = polyak.Trajectory(tmp_path / "torch.bfloat16").average("swa")["weight"]
    assert rounded.dtype == torch.float32
    nearest = torch.stack([
        polyak.open_checkpoint(one.path).tensors["weight"].load().bfloat16().float()
        for one in scan_intervals(tmp_path / "torch.float32").intervals
    ]).mean(0)  # fmt: skip
    carried, plain = (rounded - exact).norm(), (nearest - exact).norm()
    assert carried < plain / 3


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, monkeypatch):
    broken = {"now": True}

    def write(path, tensors, **options):
        if broken["now"]:
            raise OutputError(f"Could not write {path}: No space left on device. Make room.")
        return original(path, tensors, **options)

    from polyak.checkpoints.writing import save

    original = save.write_checkpoint
    monkeypatch.setattr(save, "write_checkpoint", write)
    model = Scalar()
    made = record(model, tmp_path, 10, interval=10)
    model.go(11)
    with pytest.warns(PolyakWarning, match=r"No space left.*0 to 10 steps is not lost"):
        made.update()
    broken["now"] = False
    for step in range(12, 31):
        model.go(step)
        made.update()
    made.close()
    assert read(tmp_path) == {(0, 20): (20, 10.5, 20), (20, 30): (10, 25.5, 30)}
    made = record(model, tmp_path / "b", 15, interval=10)
    broken["now"] = True
    with pytest.raises(OutputError, match="No space left"):
        made.close()


def test_a_slow_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "SLOW_SECONDS", -1.0)
    made = record(Scalar(), tmp_path, 10, interval=10)
    with pytest.warns(PolyakWarning, match="Training waited .* for the disk"):
        made.update()


@pytest.mark.parametrize(("captures", "dt", "goes_on"), [(2, 1, 2), (1, 1, 9), (3, 0.5, 1.5)])
def test_only_a_capture_waits_for_the_disk(tmp_path, monkeypatch, captures, dt, goes_on):
    released, sync = threading.Event(), files.sync
    monkeypatch.setattr(files, "sync", lambda path: released.wait(9) and sync(path))
    made = record(Scalar(), tmp_path, round(10 / dt), dt=dt, interval=10, captures=captures)
    for step in range(
        round(goes_on / dt)
    ):  # up to the next capture, though the file is not written
        made.model.go(11 + step)
        made.update(dt)
    assert made.time == 10 + round(goes_on / dt) * dt
    assert read(tmp_path) == {}
    released.set()
    made.close()
    first, last = read(tmp_path).items()
    assert first[0] == (0, 10)
    assert last[0] == (10, made.time)


def test_weights_that_are_not_finite_are_missing_from_the_record_and_said(tmp_path):
    model = Scalar()
    made = record(model, tmp_path, 15, interval=10)
    nn.init.constant_(model.weight, float("nan"))
    for _ in range(5):
        made.update()
    model.go(21)
    with pytest.warns(PolyakWarning, match=r"NaN or infinity in weight.*10 to 20 steps"):
        made.update()
    for step in range(22, 31):
        model.go(step)
        made.update()
    made.close()
    assert [*read(tmp_path)] == [(0, 10), (20, 30)]
    trajectory = polyak.Trajectory(tmp_path)
    assert trajectory.missing == ((10, 20),)
    assert trajectory.average("window:length=10")["weight"][0] == 25.5
    with pytest.raises(FormatError, match="missing: 10 to 20"):
        trajectory.plan("window:length=15")


def test_on_the_host_and_in_other_dtypes(tmp_path):
    model = Scalar(torch.bfloat16)
    record(model, tmp_path / "a", 20, interval=10, device="cpu").close()
    with polyak.open_checkpoint(tmp_path / "a" / "interval-1.safetensors") as opened:
        assert opened.tensors["weight"].dtype == "F32"
    record(Scalar(torch.float64), tmp_path / "b", 20, interval=10).close()
    with polyak.open_checkpoint(tmp_path / "b" / "interval-1.safetensors") as opened:
        assert opened.tensors["weight"].dtype == "F64"


def test_interval_files_are_ordinary_averaged_files(tmp_path):
    model = Scalar()
    record(model, tmp_path / "a", 20, interval=10).close()
    average = polyak.Average(model, polyak.SWA())
    average.load(tmp_path / "a" / "interval-2.safetensors")
    assert (average.time, average.count) == (10, 10)
    files = sorted((tmp_path / "a").glob("interval-*"))
    polyak.average_checkpoints(files, tmp_path / "mean.safetensors")
    with polyak.open_checkpoint(tmp_path / "mean.safetensors") as opened:
        assert opened.tensors["weight"].load()[0] == 10.5
        assert opened.step == 20
        assert "interval" not in opened.metadata


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "length of an interval or that of the training"),
        ({"interval": 10, "total": 10}, "not both"),
        ({"interval": 0}, "interval is 0"),
        ({"total": float("nan")}, "total is nan"),
        ({"interval": "10"}, "interval is '10'"),
        ({"interval": 10, "captures": 0}, "captures is 0"),
        ({"interval": 10, "intervals": 0}, "intervals is 0"),
        ({"interval": 10, "keep": 3}, "even number"),
        ({"interval": 10, "dtype": torch.float16}, "dtype is torch.float16"),
        ({"interval": 10, "unit": 3}, "unit is 3"),
        ({"interval": 10, "device": "nowhere"}, "device is 'nowhere'"),
    ],
)
def test_options_out_of_their_domain(tmp_path, options, words):
    with pytest.raises(ArgumentError, match=re.escape(words)):
        polyak.Recorder(Scalar(), tmp_path, **options)


def test_calls_that_do_not_fit_the_moment(tmp_path):
    model = Scalar()
    made = record(model, tmp_path / "a", 3, interval=10)
    with pytest.raises(ArgumentError, match="dt is 0"):
        made.update(0)
    average = polyak.Average(model, polyak.SWA())
    average.update()
    with average.applied(), pytest.raises(UsageError, match="inside applied"):
        made.update()
    made.close()
    made.close()
    with pytest.raises(UsageError, match="after close"):
        made.update()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = polyak.Recorder(model, tmp_path / "b", interval=10, unit="tokens")
    with pytest.raises(ArgumentError, match="counts steps"):
        tokens.attach(optimizer)


def test_an_error_in_the_block_leaves_what_was_finished(tmp_path):
    model = Scalar()
    with pytest.raises(KeyboardInterrupt), polyak.Recorder(model, tmp_path, interval=10) as made:
        for step in range(1, 26):
            model.go(step)
            made.update()
        raise KeyboardInterrupt
    assert [*read(tmp_path)] == [(0, 10), (10, 20)]


def test_a_kill_leaves_whole_files_and_the_run_is_continued(tmp_path):
    program = textwrap.dedent(
        """
        import sys, torch, polyak
        folder, state = sys.argv[1:]
        torch.manual_seed(0)
        model = torch.nn.Linear(300, 300)
        recorder = polyak.Recorder(model, folder, interval=10)
        first = 0
        if len(sys.argv) and __import__("os").path.exists(state):
            loaded = torch.load(state, weights_only=True)
            recorder.load_state_dict(loaded["recorder"])
            first = loaded["step"]
        for step in range(first, 200):
            with torch.no_grad():
                model.weight.fill_(step)
            recorder.update()
            if step == 95 and not first:
                torch.save({"recorder": recorder.state_dict(), "step": 96}, state)
            print(step, flush=True)
        recorder.close()
        """
    )
    folder, state = tmp_path / "record", tmp_path / "state.pt"
    command = [sys.executable, "-c", program, str(folder), str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            if int(line) >= 143:
                os.kill(running.pid, signal.SIGKILL)
                break
    found = scan_intervals(folder)
    assert not found.damaged
    assert len(found.intervals) >= 13
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    whole = tmp_path / "whole"
    command[3:] = [str(whole), str(tmp_path / "none.pt")]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert contents(folder) == contents(whole)
    assert not list(folder.glob(".*"))
    with safe_open(folder / "interval-20.safetensors", "pt") as file:
        assert json.loads(file.metadata()["interval"]) == [190, 200]


def test_flat_parameters_are_refused(tmp_path):
    class FullyShardedDataParallel(nn.Linear):
        pass

    with pytest.raises(PolyakError, match="fully_shard"):
        polyak.Recorder(FullyShardedDataParallel(2, 2), tmp_path, interval=10)


def ddp_rank(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with polyak.Recorder(model, folder / "record", interval=2, keep=4) as made:
        made.attach(optimizer)
        for step in range(12):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
            if step == 4:
                torch.save(made.state_dict(), folder / f"state-{rank}.pt")
    assert made.interval == 4
    torch.distributed.destroy_process_group()


def test_under_ddp_rank_0_records(tmp_path):
    import torch.multiprocessing as mp

    running = mp.start_processes(ddp_rank, (tmp_path,), 2, join=False, start_method="fork")
    assert any(running.join(timeout=60) for _ in range(4))
    found = scan_intervals(tmp_path / "record").intervals
    assert [(one.start, one.end) for one in found] == [(0, 4), (4, 8), (8, 12)]
    with polyak.open_checkpoint(found[0].path) as opened:
        assert {*opened.tensors} == {"weight", "bias"}  # without the wrapper's prefix
    states = [torch.load(tmp_path / f"state-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert states[0]["record"]
    assert {n: states[0][n] for n in ("time", "start", "interval")} == {
        n: states[1][n] for n in ("time", "start", "interval")
    }
