"""A recorder in which something fails or is interrupted: it has changed nothing, and nothing is lost."""

from __future__ import annotations

import itertools
import threading
import warnings
from concurrent import futures

import pytest
import torch
from safetensors import safe_open
from torch import nn

import polyak
from polyak import files
from polyak.averaging import record_folder, recorder
from polyak.averaging.tracker import Tracker
from polyak.checkpoints.intervals import scan_intervals
from polyak.checkpoints.writing import save
from polyak.errors import MismatchError, OutputError, PolyakWarning, UsageError


@pytest.fixture(autouse=True)
def any_disk_is_fast_enough(monkeypatch):
    monkeypatch.setattr(recorder, "SLOW_SECONDS", 60.0)


def made(folder, **options):
    return polyak.Recorder(nn.Linear(1, 1, bias=False), folder, **{"interval": 10, **options})


def go(recorder, first, last):
    for step in range(first, last + 1):
        nn.init.constant_(recorder.model.weight, step)
        recorder.update()


def read(folder):
    """(start, end) -> the mean."""
    found = {}
    for one in scan_intervals(folder).intervals:
        with safe_open(one.path, "pt") as file:
            found[one.start, one.end] = file.get_tensor("weight").item()
    return found


def failing(monkeypatch, where, name, error, times=1):
    """Let a function raise so many times; each time is noted in what is returned."""
    original, raised = getattr(where, name), []

    def fail(*args, **options):
        if len(raised) < times:
            raised.append(error)
            raise error
        return original(*args, **options)

    monkeypatch.setattr(where, name, fail)
    return raised


@pytest.mark.parametrize("captures", [1, 10])
def test_a_failure_is_forgotten_by_an_earlier_state(tmp_path, monkeypatch, captures):
    one = made(tmp_path, captures=captures)
    go(one, 1, 20)
    state = one.state_dict()
    with monkeypatch.context() as patched:
        failing(patched, save, "write_checkpoint", OSError(28, "No space left"), 99)
        with pytest.warns(PolyakWarning, match="No space left"):
            go(one, 21, 65)
            one.state_dict()
    one.load_state_dict(state)
    go(one, 21, 50)
    one.close()
    assert [*read(tmp_path)] == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50)]


@pytest.mark.parametrize("call", ["update", "close", "state_dict"])
def test_an_interrupt_while_waiting_leaves_what_is_being_written(tmp_path, monkeypatch, call):
    released, write = threading.Event(), save.write_checkpoint

    def slow(*args, **options):
        released.wait(9)
        return write(*args, **options)

    monkeypatch.setattr(save, "write_checkpoint", slow)
    one = made(tmp_path)
    go(one, 1, 10)
    failing(monkeypatch, futures.Future, "result", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go(one, 1000, 1000) if call == "update" else getattr(one, call)()
    threading.Timer(0.2, released.set).start()
    go(one, 1000, 1009 if call != "update" else 1008)
    one.close()
    assert read(tmp_path) == {(0, 10): 5.5, (10, 20): pytest.approx(1004, abs=1)}


@pytest.mark.parametrize(
    ("where", "name", "error"),
    [
        (Tracker, "finish", UsageError("An update on the host failed.")),
        (recorder, "contents_of", RuntimeError("out of memory")),
        (record_folder.ThreadPoolExecutor, "submit", RuntimeError("can't start new thread")),
        (record_folder, "refuse_nonfinite", MemoryError("in the thread")),
    ],
)
@pytest.mark.parametrize("keep", [None, 2])
def test_an_interval_that_could_not_be_handed_over_goes_on(
    tmp_path, monkeypatch, where, name, error, keep
):
    one = made(tmp_path, keep=keep)
    go(one, 1, 18)
    with monkeypatch.context() as patched:
        raised = failing(patched, where, name, error)
        with pytest.raises(type(error), match=str(error)):
            go(one, 19, 21)
    assert raised
    go(one, int(one.time) + 1, 40)
    one.close()
    found = read(tmp_path)
    edges = [0.0, *(end for _, end in found)]
    assert [*found] == list(itertools.pairwise(edges))  # neither gaps nor overlaps
    assert edges[-1] == 40
    for (start, end), mean in found.items():
        assert mean == pytest.approx((start + end + 1) / 2, abs=0.06)  # one update was not taken


def test_a_warning_that_is_an_error_loses_nothing(tmp_path, monkeypatch):
    one = made(tmp_path)
    go(one, 1, 10)
    with monkeypatch.context() as patched, warnings.catch_warnings():
        patched.setattr(recorder, "SLOW_SECONDS", -1.0)
        warnings.simplefilter("error", PolyakWarning)
        with pytest.raises(PolyakWarning, match="Training waited"):
            go(one, 11, 11)
    go(one, 12, 20)
    one.close()
    assert [*read(tmp_path)] == [(0, 10), (10, 20)]


def test_a_file_that_was_moved_into_place_but_not_synced_is_not_left_beside_the_longer_one(
    tmp_path, monkeypatch
):
    one = made(tmp_path)
    sync = files.sync

    def broken(path):
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        sync(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "sync", broken)
        go(one, 1, 10)
        with pytest.warns(PolyakWarning, match="Input/output error"):
            one.state_dict()
    assert [*read(tmp_path)] == [(0, 10)]
    go(one, 11, 20)
    one.close()
    assert read(tmp_path) == {(0, 20): 10.5}


def test_a_folder_of_another_record_can_be_emptied(tmp_path):
    with made(tmp_path) as first:
        go(first, 500, 510)
    one = made(tmp_path, captures=1)
    with pytest.raises(OutputError, match="holds another record"):
        go(one, 1, 10)
    with pytest.raises(OutputError, match="holds another record"):
        go(one, 11, 11)
    for path in tmp_path.iterdir():
        path.unlink()
    go(one, 12, 20)
    one.close()
    assert read(tmp_path) == {(0, 12): 12, (12, 20): 20}


def test_an_update_that_is_refused_takes_no_time(tmp_path):
    one = made(tmp_path)
    go(one, 1, 5)
    average = polyak.Average(one.model, polyak.SWA())
    average.update()
    for _ in range(3):
        with average.applied(), pytest.raises(UsageError, match="inside applied"):
            one.update()
    assert one.time == 5


def test_a_state_that_could_not_be_loaded_has_changed_nothing(tmp_path, monkeypatch):
    one = made(tmp_path, dtype=torch.bfloat16)
    go(one, 1, 10)
    state = one.state_dict()
    go(one, 11, 30)
    other = {**state, "carry": (("body.weight", torch.zeros(3)),)}
    with pytest.raises(MismatchError, match="of another model"):
        one.load_state_dict(other)
    with pytest.raises(MismatchError, match=r"\(3,\), but this model's is \(1, 1\)"):
        one.load_state_dict({**state, "carry": (("weight", torch.zeros(3)),)})
    with monkeypatch.context() as patched:
        failing(patched, recorder.state, "load_state", RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            one.load_state_dict(state)
    assert one.time == 30
    go(one, 31, 40)
    one.close()
    assert [*read(tmp_path)] == [(0, 10), (10, 20), (20, 30), (30, 40)]
