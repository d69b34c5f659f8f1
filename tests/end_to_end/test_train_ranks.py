"""`torchrun -m polyak train`: processes that share each batch train as one does, and resume to the bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

DATA = """
from polyak.reference_run.data import Data, Split, embedded_data
def few():
    whole = embedded_data()
    first = lambda split, n: Split(split.images[:n].clone(), split.labels[:n].clone())
    return Data(first(whole.train, 203), first(whole.validation, 60), first(whole.test, 60))
"""
ARGUMENTS = [
    "train", "taught", "--epochs", "4", "--seeds", "1", "--arms", "sgd", "swa",
    "--data", "few_images:few", "--device", "cpu",
]  # fmt: skip


def start(folder, output, *arguments, processes=2, batch="50"):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), "polyak", *ARGUMENTS]
    return subprocess.Popen(
        [*command, "--batch-size", batch, "--output", output, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r["train_loss"] for r in map(json.loads, lines) if r["kind"] == "epoch"]


def results(folder):
    return {
        p.name: p.read_bytes() for p in [folder / "metrics.jsonl", *folder.rglob("*.safetensors")]
    }


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "few_images.py").write_text(DATA)
    return folder


@pytest.fixture(scope="module")
def whole(there):
    return finish(start(there, "whole")), there / "whole"


def test_it_ends_in_the_same_table_printed_once(whole):
    output, folder = whole
    assert output.count("averaged model  whole/swa.safetensors") == 1
    assert output.count("On the test images") == 1
    assert output.count("seed 0 sgd    epoch   1/4") == 1
    assert (folder / "report.html").is_file()


def test_two_processes_train_as_one(there, whole):
    finish(start(there, "alone", processes=1))
    # 203 images in batches of 50: the shares of the last batch are 2 images and 1.
    assert losses(whole[1]) == pytest.approx(losses(there / "alone"), rel=1e-4)
    ours, alone = (load_file(f / "swa.safetensors") for f in (whole[1], there / "alone"))
    assert all((ours[name] - alone[name]).abs().max() < 1e-3 for name in alone)


def kill_after_an_epoch(process, folder):
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_killed_and_resumed_it_ends_in_the_same_bytes(there, whole):
    kill_after_an_epoch(start(there, "killed"), there / "killed")
    finish(start(there, "killed", "--resume"))
    assert results(there / "killed") == results(whole[1])
    alone = start(there, "killed", "--resume", processes=1)
    output, _ = alone.communicate(timeout=200)
    assert "processes: 2 (ddp) then, 1 now" in " ".join(output.split())


def test_sharded_it_is_the_same_run(there, whole):
    finish(start(there, "sharded", "--strategy", "fsdp"))
    assert losses(there / "sharded") == pytest.approx(losses(whole[1]), rel=1e-4)
    ours, copies = (load_file(f / "swa.safetensors") for f in (there / "sharded", whole[1]))
    assert all((ours[name] - copies[name]).abs().max() < 1e-3 for name in copies)
    kill_after_an_epoch(start(there, "cut", "--strategy", "fsdp"), there / "cut")
    finish(start(there, "cut", "--resume", "--strategy", "fsdp"))
    assert results(there / "cut") == results(there / "sharded")


def test_a_last_batch_with_fewer_images_than_processes_is_refused(there):
    process = start(there, "many", batch="202")
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "too few for 2 processes" in " ".join(output.split())
    assert not (there / "many").exists()
