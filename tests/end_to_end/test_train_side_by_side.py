"""`polyak train --jobs`: legs in processes side by side end in the bits of one process, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

DATA = """
from polyak.reference_run.data import Data, Split, embedded_data
def few():
    whole = embedded_data()
    first = lambda split, n: Split(split.images[:n].clone(), split.labels[:n].clone())
    return Data(first(whole.train, 200), first(whole.validation, 60), first(whole.test, 60))
"""
ARGUMENTS = [
    "train",
    "--epochs",
    "4",
    "--data",
    "few_images:few",
    "--device",
    "cpu",
]
CODE = """
import sys
from polyak.cli import app, train_display
train_display.measure_landscape = lambda run: None
train_display.write_report = lambda folder: folder / "report.html"
if __name__ == "__main__":
    sys.exit(app.run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("side_by_side")
    (folder / "few_images.py").write_text(DATA)
    (folder / "short_polyak.py").write_text(CODE)
    return folder


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "short_polyak.py", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def results(folder):
    kept = [folder / "metrics.jsonl", *folder.rglob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_the_same_bits_side_by_side_and_after_a_kill(there):
    alone = finish(start(there, *ARGUMENTS, "--seeds", "3:5", "--output", "alone", "--jobs", "1"))
    assert "2 seeds of sgd, half, swa; 1 thread" in alone
    expected = results(there / "alone")
    assert {json.loads(line)["seed"] for line in expected["metrics.jsonl"].splitlines()} == {3, 4}

    process = start(there, *ARGUMENTS, "--seeds", "3:5", "--output", "beside", "--jobs", "2")
    for line in process.stdout:
        if "epoch   2/4" in line:
            break
    os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must not go on writing
    with process:
        process.stdout.read()  # ends when the last worker has
    before = (there / "beside" / "metrics.jsonl").read_bytes()
    time.sleep(0.3)
    assert (there / "beside" / "metrics.jsonl").read_bytes() == before

    # What a stopped run prints as advice: no recipe, no fields.
    output = finish(start(there, "train", "--resume", "--output", "beside", "--jobs", "2"))
    assert "Resuming recipe default in beside" in output
    assert "2 side by side, 1 thread each" in output
    assert results(there / "beside") == expected


def test_an_error_in_a_worker_is_one_message(there):
    process = start(
        there, *ARGUMENTS, "--output", "nan", "--jobs", "2", "--swa-rate", "1e9", "--seeds", "1"
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Seed 0, arm swa, epoch 3:" in output
    assert "Traceback" not in output
