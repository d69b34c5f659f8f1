"""Kill training runs at random times, resume them, and compare every bit with an uninterrupted run.

    python scripts/kill_train.py --kills 50 [--task words]

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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyak.reference_run.recipe import Recipe


def child(folder: Path, task: str) -> None:
    """A short run of a task, which prints a line for each record."""
    from polyak.reference_run import loop

    recipe = few_words(folder) if task == "words" else few_images()
    print("ready", flush=True)
    loop.train(
        recipe,
        folder,
        resume=True,
        watch=lambda record, done: print(f"{done:.3f}", flush=True),
    )


def few_words(folder: Path) -> "Recipe":
    """All arms and averages on the beginning of the text that ships."""
    from polyak.reference_run.recipe import load_recipe
    from polyak.reference_run.text import embedded_text

    text = folder.parent / "text.txt"
    if not text.exists():
        text.write_bytes(embedded_text()[:4000])
    small = {"epochs": 8, "epoch_size": 16, "batch_size": 4, "context": 8, "record_intervals": 6}
    return load_recipe("words", small | {"seeds": 1, "device": "cpu", "data": str(text)})


def few_images() -> "Recipe":
    """BatchNorm, shifts and all arms, on a few of the images that ship."""
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
    return Recipe(epochs=4, seeds=2, arms=arms, device="cpu", **fields)


def start(folder: Path, task: str) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--child", str(folder), "--task", task]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder: Path, task: str) -> None:
    process = start(folder, task)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"a run failed:\n{errors}")


def kill(folder: Path, task: str, chance: random.Random) -> bool:
    """Start or resume the run and kill it; False if it ended first."""
    process = start(folder, task)
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


def main(kills: int, seed: int, task: str) -> None:
    chance, done, runs = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        finish(Path(scratch) / "alone", task)
        expected = results(Path(scratch) / "alone")
        while done < kills:
            folder = Path(scratch) / f"run-{runs}"
            while done < kills and kill(folder, task, chance):
                done += 1
            finish(folder, task)
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
    parser.add_argument("--task", choices=("images", "words"), default="images")
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.task)
    else:
        main(arguments.kills, arguments.seed, arguments.task)
