"""Run folders: one writer, one recipe, checkpoints that are whole or refused."""

import dataclasses

import pytest
import torch

from polyak.errors import FormatError, OutputError, UsageError
from polyak.reference_run.leg_checkpoint import LegCheckpoint
from polyak.reference_run.recipe import Recipe
from polyak.reference_run.run import run_folder

RECIPE = Recipe(epochs=4)
HERE = {"torch": "2.13", "threads": "2"}


def checkpoint(**changes):
    values = {"environment": HERE, "data": "abc", "records": [{"epoch": 3}]}
    return LegCheckpoint(**{**values, "state": {"w": torch.arange(3.0)}, **changes})


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
        pytest.raises(OutputError, match=r"Another process is writing .*run "),
        run_folder(folder, RECIPE, resume=True),
    ):
        pass
    with run_folder(folder, RECIPE, resume=True):  # free again
        pass


def test_resuming_another_recipe_says_what_differs(tmp_path):
    with run_folder(tmp_path / "run", RECIPE, resume=False) as folder:
        pass
    other = dataclasses.replace(RECIPE, rate=0.05, seeds=5)
    with (
        pytest.raises(UsageError, match=r"rate: 0\.05 here, 0\.1 there\n  seeds: 5 here, 3 there"),
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


def test_a_checkpoint_reads_back(tmp_path):
    path = tmp_path / "latest"
    assert LegCheckpoint.read(path) is None
    checkpoint().save(path)
    checkpoint(records=[{"epoch": 4}]).save(path)
    found = LegCheckpoint.read(path)
    assert found.records == [{"epoch": 4}]
    assert torch.equal(found.state["w"], torch.arange(3.0))


def test_any_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "latest"
    checkpoint().save(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(FormatError, match=r"damaged|not a checkpoint"):
            LegCheckpoint.read(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="damaged"):
        LegCheckpoint.read(path)


def test_a_foreign_file_is_refused(tmp_path):
    torch.save({"model": 1}, tmp_path / "foreign")
    with pytest.raises(FormatError, match="not a checkpoint of this version of polyak"):
        LegCheckpoint.read(tmp_path / "foreign")


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
        checkpoint(records=[{"epoch": 4}]).save(path)
    monkeypatch.undo()
    assert LegCheckpoint.read(path).records == [{"epoch": 3}]
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]
