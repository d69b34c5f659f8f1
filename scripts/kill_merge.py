"""Kill a merge with SIGKILL at random moments, resume it, and compare the bytes: `kill_merge.py 50`.

Each round merges in its own process, which is killed after a random time; it is then resumed (and
killed again, up to three times) until it ends. Every round must give the bytes of an uninterrupted run.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

MERGE = """
import sys
from polyak.checkpoints.merging.average import average_checkpoints
folder, out, *flags = sys.argv[1:]
paths = [f"{folder}/step-{i}.safetensors" for i in range(1, 5)]
print("ready", flush=True)
outputs = {f"{out}/a.safetensors": "swa", f"{out}/b.pt": "ema:half_life=2", f"{out}/c": "power:std=0.1"}
average_checkpoints(paths, outputs, resume="--resume" in flags, shard_size="9MB", verify="--verify" in flags)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by name: bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def start(folder: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    """A merge in its own process, past its imports."""
    command = [sys.executable, "-c", MERGE, str(folder), str(out), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if process.stdout is None or process.stdout.readline() != "ready\n":
        raise SystemExit("The merge did not start.")
    return process


def finish(process: subprocess.Popen[str]) -> bool:
    """Wait; whether it came to its end. SystemExit with its words if it failed."""
    _, errors = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"The merge failed:\n{errors}")
    return process.returncode == 0


def one_round(folder: Path, out: Path, seconds: float, generator: random.Random) -> int:
    """Kill up to three times, then let it end; how many kills hit."""
    hits = 0
    for attempt in range(4):
        process = start(folder, out, "--verify", *(["--resume"] if attempt else []))
        if attempt < 3:
            time.sleep(generator.uniform(0, 1.2 * seconds))
            process.send_signal(signal.SIGKILL)
        if finish(process):
            break
        hits += 1
    return hits


def run(rounds: int, megabytes: int, seed: int = 0) -> int:
    """The rounds; how many kills hit a running merge. SystemExit where the bytes differ."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        noise = torch.Generator().manual_seed(seed)
        for step in range(1, 5):
            tensors = {
                f"t{i}": torch.randn(megabytes * 2**18 // 4, generator=noise) for i in range(4)
            }
            save_file(tensors, folder / f"step-{step}.safetensors")
        (folder / "whole").mkdir()
        process = start(folder, folder / "whole", "--verify")
        begin = time.perf_counter()
        finish(process)
        seconds = time.perf_counter() - begin
        expected, kills = contents(folder / "whole"), 0
        for index in range(rounds):
            out = folder / f"round-{index}"
            out.mkdir()
            kills += one_round(folder, out, seconds, generator)
            if contents(out) != expected:
                raise SystemExit(f"round {index}: the bytes differ")
            for path in sorted(out.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
    return kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=50)
    parser.add_argument("--megabytes", type=int, default=32, help="of each of the four inputs")
    given = parser.parse_args()
    hits = run(given.rounds, given.megabytes)
    print(f"{given.rounds} rounds, {hits} kills of a running merge, all byte-identical")
