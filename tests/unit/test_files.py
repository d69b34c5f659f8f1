"""Files that cannot be written: one error of ours, which says what to do; nothing is left behind."""

import errno
import os
import resource
import signal
import subprocess
import traceback

import pytest
from torch import nn

import polyak
from polyak.cli.app import run
from polyak.errors import ArgumentError, OutputError
from polyak.files import file_target, replacing, writing_errors
from polyak.report.schedule import save_schedule_plot


@pytest.fixture
def read_only(tmp_path):
    """A folder in which nobody can write: on a read-only file system where we may mount one."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.getuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("root may write everywhere, and cannot mount a read-only file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def average():
    average = polyak.Average(nn.Linear(2, 1), polyak.SWA())
    average.update()
    return average


SCHEDULE = polyak.schedules.chain((4, polyak.schedules.Constant(0.1)))
WRITERS = {
    "safetensors": lambda average, folder: average.save(folder / "a.safetensors"),
    "torch": lambda average, folder: average.save(folder / "a.pt"),
    "picture": lambda average, folder: save_schedule_plot(SCHEDULE, folder / "a.svg"),
    "merge": lambda average, folder: merged(average, folder, "a.safetensors"),
    "folder": lambda average, folder: merged(average, folder, "a"),
}


def saved(average, folder):
    place = folder / "input.safetensors"
    average.save(place, overwrite=True)
    return place


def merged(average, folder, name):
    polyak.average_checkpoints([saved(average, folder.parent)], folder / name)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_read_only_folder(write, average, read_only):
    with pytest.raises(OutputError, match=r"(Read-only|[Pp]ermission).*Choose") as caught:
        write(average, read_only)
    assert "".join(traceback.format_exception(caught.value)).count("Traceback") == 1
    assert not list(read_only.iterdir())


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_is_not_there(write, average, tmp_path):
    with pytest.raises(OutputError, match=r"Make the folder .*missing first") as caught:
        write(average, tmp_path / "missing")
    assert "Make room" not in str(caught.value)
    assert "".join(traceback.format_exception(caught.value)).count("Traceback") == 1


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_in_the_place_of_the_folder(write, average, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OutputError,
        match=r"a part of this path is a file|file is a file, so .* cannot be written in it",
    ):
        write(average, tmp_path / "file")


@pytest.mark.parametrize("name", ["s3://bucket/swa.pt", "memory://swa.safetensors"])
def test_an_address_is_no_place_to_write(average, tmp_path, name):
    with pytest.raises(
        OutputError, match="is an address; outputs are written to folders of this machine"
    ):
        polyak.average_checkpoints([saved(average, tmp_path)], name)
    with pytest.raises(OutputError, match="is an address"):
        file_target(name, overwrite=False)


@pytest.mark.parametrize("name", [".pt", ".safetensors", ".PTH"])
def test_a_suffix_is_no_name(average, tmp_path, name):
    with pytest.raises(ArgumentError, match="is a suffix without a name; write it out"):
        merged(average, tmp_path, name)
    assert not (tmp_path / name).exists()


def test_a_name_that_is_too_long(average, tmp_path):
    with pytest.raises(OutputError, match="Choose a shorter name") as caught:
        average.save(tmp_path / f"{'n' * 300}.pt")
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(OutputError, match="Choose a shorter name"):
        merged(average, tmp_path, f"{'n' * 300}.pt")


def test_a_folder_in_the_place_of_the_file(average, tmp_path):
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(OutputError, match="is a folder; expected the name of a file"):
        average.save(tmp_path / "a.pt")
    with pytest.raises(OutputError, match="is a folder"):
        average.save(tmp_path / "a.pt", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_full_disk_says_make_room(tmp_path):
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with writing_errors(tmp_path / "x"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OutputError as error:
        assert "Make room" in str(error)
        assert error.errno == errno.ENOSPC
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # a real write that fails on its way
    try:
        with (
            pytest.raises(OutputError, match="File too large"),
            replacing(tmp_path / "x") as part,
        ):
            part.write_bytes(bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["schedule", "--plot", "{}/x.svg"], ["train", "--output", "{}/run"]],
    ids=lambda arguments: arguments[0],
)
def test_the_command_line_prints_one_message(arguments, read_only, capsys):
    assert run([argument.format(read_only) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("Could not write") == 1
    assert "Traceback" not in error
    assert "Choose" in error
