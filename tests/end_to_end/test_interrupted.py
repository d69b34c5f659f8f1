"""Ctrl-C in a real process: one line that says what can be continued, and exit code 130."""

import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

# A process that presses Ctrl-C on itself when it comes to a certain point, then goes on as `polyak`.
WHEN_IMPORTING = """
class Press:
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
"""
WHEN_MERGING = """
from polyak.checkpoints.merging import journal
mark = journal.Journal.mark
def marked(self, chunk, checksums):
    mark(self, chunk, checksums)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
journal.Journal.mark = marked
"""
WHEN_REPLACING = """
from polyak import files
files.sync = lambda path: os.kill(os.getpid(), signal.SIGINT)
"""


def polyak(*arguments, then="", cwd):
    code = f"import os, signal, sys, time\n{textwrap.dedent(then)}\nfrom polyak.cli import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        save_file({"w": torch.full((300_000,), float(step))}, tmp_path / f"step-{step}.safetensors")
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


AVERAGE = ["average", "step-1.safetensors", "step-2.safetensors", "-o", "out.safetensors"]


@pytest.mark.parametrize(
    "name", ["cyclopts", "polyak.cli.app", "rich.console", "torch", "torch.nn"]
)
def test_while_importing(folder, name):
    done = polyak(*AVERAGE, then=WHEN_IMPORTING.format(name=name), cwd=folder)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (130, "Stopped.", "")
    assert names(folder) == ["step-1.safetensors", "step-2.safetensors"]


def test_while_merging(folder):
    done = polyak(*AVERAGE, "--threads", "1", then=WHEN_MERGING, cwd=folder)
    assert done.returncode == 130
    (kept,) = [name for name in names(folder) if name.startswith(".")]
    assert done.stderr.strip() == (
        f"Stopped. What was done is kept in {kept}. Continue with the same command and --resume, or remove it."
    )
    assert polyak(*AVERAGE, "--resume", cwd=folder).returncode == 0
    assert torch.equal(load_file(folder / "out.safetensors")["w"], torch.full((300_000,), 1.5))
    assert not [name for name in names(folder) if name.startswith(".")]


def test_while_a_picture_is_written(tmp_path):
    done = polyak("schedule", "--plot", "x.svg", then=WHEN_REPLACING, cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr.strip() == "Stopped."
    assert names(tmp_path) == []


def test_signals_are_real(tmp_path):
    done = polyak("--version", then="os.kill(os.getpid(), signal.SIGINT)", cwd=tmp_path)
    assert done.returncode == -signal.SIGINT  # outside `main`: Python's own way
