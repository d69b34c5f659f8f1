"""Kill training runs at random times, resume them, and compare every bit with an uninterrupted run.

    python scripts/kill_train.py --kills 50

Each run is killed with SIGKILL or SIGINT shortly after a random line of its output, resumed and
killed again until it is done; then its metrics and weights are compared byte by byte with those of
an uninterrupted run. A run that ends before its kill is replaced by a new one.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def child(folder: Path) -> None:
    """A short run with BatchNorm, shifts and all arms, on a few of the images that ship."""
    from polyak.reference_run import loop
    from polyak.reference_run.data import Data, Split, embedded_data
    from polyak.reference_run.recipe import Recipe

    whole = embedded_data()

    def first(split: Split, n: int) -> Split:
        return Split(split.images[:n].clone(), split.labels[:n].clone())

    loop.load_data = lambda recipe: Data(
        train=first(whole.train, 320),
        validation=first(whole.validation, 100),
        test=first(whole.test, 100),
    )
    arms = ("sgd", "half", "swa", "cyclic")
    fields = {"shift": 1, "cycle_epochs": 1, "record_intervals": 6}
    recipe = Recipe(epochs=4, seeds=2, arms=arms, device="cpu", **fields)
    print("ready", flush=True)
    loop.train(
        recipe,
        folder,
        resume=True,
        watch=lambda record, done: print(f"{done:.3f}", flush=True),
    )


def start(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--child", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder: Path) -> None:
    process = start(folder)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"a run failed:\n{errors}")


def kill(folder: Path, chance: random.Random) -> bool:
    """Start or resume the run and kill it; False if it ended first."""
    process = start(folder)
    lines = chance.randrange(1, 9)
    for _, _line in zip(range(lines), process.stdout, strict=False):
        pass
    time.sleep(chance.random() * 0.08)
    process.send_signal(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]))
    _, errors = process.communicate()
    if process.returncode == 0:
        return False
    if process.returncode > 0 and "KeyboardInterrupt" not in errors:
        sys.exit(f"a resumed run failed:\n{errors}")
    return True


def results(folder: Path) -> dict[str, bytes]:
    kept = [folder / "metrics.jsonl", *folder.rglob("*.safetensors"), *folder.rglob("*.part")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def main(kills: int, seed: int) -> None:
    chance, done, runs = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        finish(Path(scratch) / "alone")
        expected = results(Path(scratch) / "alone")
        while done < kills:
            folder = Path(scratch) / f"run-{runs}"
            while done < kills and kill(folder, chance):
                done += 1
            finish(folder)
            runs += 1
            found = results(folder)
            if found != expected:
                differ = [n for n in expected | found if found.get(n) != expected.get(n)]
                sys.exit(f"after {done} kills, run {runs} differs in {', '.join(sorted(differ))}")
    print(f"{done} kills over {runs} runs: {len(expected)} files the same, byte for byte")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
    else:
        main(arguments.kills, arguments.seed)
