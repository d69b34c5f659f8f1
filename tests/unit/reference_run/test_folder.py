"""Run folders: one writer, one recipe, metrics cut back, checkpoints that are whole or refused."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from polyak.errors import FormatError, OutputError, UsageError
from polyak.reference_run.loop import RunCheckpoint, read_checkpoint
from polyak.reference_run.recipe import Recipe
from polyak.reference_run.run import MetricsLog, run_folder

RECIPE = Recipe(epochs=4, cycle_epochs=1)
HERE = {"torch": "2.13", "threads": "2"}


def checkpoint(**changes):
    values = {"environment": HERE, "data": "abc", "done": 3, "metrics_bytes": 10, "branch": None}
    return RunCheckpoint(**{**values, "arm": {"w": torch.arange(3.0)}, **changes})


def test_a_new_folder_holds_its_recipe(tmp_path):
    with run_folder(tmp_path / "deep" / "run", RECIPE, resume=False) as folder:
        assert (folder / "recipe.toml").read_text() == RECIPE.to_toml()


def test_a_folder_that_is_not_empty_is_refused_without_resume(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with (
        pytest.raises(OutputError, match=r"is not empty\. Choose another folder"),
        run_folder(tmp_path, RECIPE, resume=False),
    ):
        pass
    with run_folder(tmp_path / "run", RECIPE, resume=False) as folder:
        pass
    with (
        pytest.raises(OutputError, match=r"is not empty\. Pass resume=True"),
        run_folder(folder, RECIPE, resume=False),
    ):
        pass
    with (
        pytest.raises(UsageError, match=r"does not hold a run: it has no recipe\.toml"),
        run_folder(tmp_path, RECIPE, resume=True),
    ):
        pass


def test_two_writers_are_refused(tmp_path):
    with (
        run_folder(tmp_path / "run", RECIPE, resume=False) as folder,
        pytest.raises(UsageError, match="Another run is writing"),
        run_folder(folder, RECIPE, resume=True),
    ):
        pass
    with run_folder(folder, RECIPE, resume=True):  # free again
        pass


def test_resuming_another_recipe_says_what_differs(tmp_path):
    with run_folder(tmp_path / "run", RECIPE, resume=False) as folder:
        pass
    other = dataclasses.replace(RECIPE, rate=0.1, seeds=5)
    with (
        pytest.raises(UsageError, match=r"rate: 0\.1 here, 0\.05 there\n  seeds: 5 here, 3 there"),
        run_folder(folder, other, resume=True),
    ):
        pass


def test_a_run_killed_before_its_recipe_starts_again(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with run_folder(tmp_path, RECIPE, resume=True):
        assert (tmp_path / "recipe.toml").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="Could not write"),
        run_folder(tmp_path / "file" / "run", RECIPE, resume=False),
    ):
        pass


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.append([{"a": 1}])
    known = log.length
    log.append([{"b": 0.1}, {"c": 3}])
    log.close()
    with path.open("a") as file:
        file.write('{"half')
    again = MetricsLog(path, known)
    again.append([{"d": 4}])
    again.close()
    assert path.read_text() == '{"a": 1}\n{"d": 4}\n'
    assert again.length == path.stat().st_size


def test_a_full_disk_is_one_message_also_when_the_file_is_closed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    with Path("/dev/full").open("wb") as full:
        os.dup2(full.fileno(), log._file.fileno())
    with pytest.raises(OutputError, match="No space left on device"):
        log.append([{"a": 1}])
    with pytest.raises(OutputError, match="No space left on device"):  # what is buffered is tried
        log.close()


def test_metrics_shorter_than_at_the_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match="has 3 bytes, but had 99 when the checkpoint"):
        MetricsLog(tmp_path / "metrics.jsonl", 99)


def test_a_checkpoint_reads_back(tmp_path):
    path = tmp_path / "latest"
    assert read_checkpoint(path) is None
    checkpoint().save(path)
    checkpoint(done=4).save(path)
    found = read_checkpoint(path)
    assert found.done == 4
    assert torch.equal(found.arm["w"], torch.arange(3.0))


def test_any_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "latest"
    checkpoint().save(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(FormatError, match=r"damaged|not a checkpoint"):
            read_checkpoint(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="damaged"):
        read_checkpoint(path)


def test_a_foreign_file_is_refused(tmp_path):
    torch.save({"model": 1}, tmp_path / "foreign")
    with pytest.raises(FormatError, match="not a checkpoint of this version of polyak"):
        read_checkpoint(tmp_path / "foreign")


def test_another_thread_count_or_data_is_refused():
    with pytest.raises(UsageError, match="threads: 2 then, 1 now"):
        checkpoint().check({**HERE, "threads": "1"}, "abc")
    with pytest.raises(UsageError, match="not what this run began with"):
        checkpoint().check(HERE, "def")
    checkpoint().check(HERE, "abc")


def test_a_disk_that_fills_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    checkpoint().save(path)

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        checkpoint(done=4).save(path)
    monkeypatch.undo()
    assert read_checkpoint(path).done == 3
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]
