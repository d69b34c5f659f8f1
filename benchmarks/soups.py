"""Soups and merges of deltas: how often a greedy soup reads its files, and what each method costs beside mergekit.

Every arm runs in its own process. Figures are seconds of all its threads on the processors, without imports:
mergekit's start-up is that of a merge of a tiny model. Both compute in float32 and write bfloat16.

    python benchmarks/soups.py greedy --gigabytes 1 --files 8
    MERGEKIT=.../mergekit-yaml python benchmarks/soups.py methods --gigabytes 1
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from merge_inputs import HIDDEN, INNER, MODEL_CONFIG, WORDS, shapes
from timing import figure

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {"weight": 1.0}),
    "ties:density=0.2": ("ties", {"weight": 1.0, "density": 0.2}),
    "dare:density=0.1": ("dare_linear", {"weight": 1 / 3, "density": 0.1}),
    "dare:density=0.1,elect=true": ("dare_ties", {"weight": 1 / 3, "density": 0.1}),
    "model-stock": ("model_stock", {}),
    "slerp:t=0.3": ("slerp", {}),
}


def make_runs(folder: Path, count: int, gigabytes: float) -> int:
    """A base and fine-tunes of it as folders of Transformers; the bytes of one."""
    import torch
    from safetensors.torch import save_file

    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    layers = max(1, round((gigabytes * 1e9 - 4 * WORDS * HIDDEN) / per_layer))
    for number in range(count + 1):
        place = folder / ("base" if number == 0 else f"run-{'abcdefghijkl'[number - 1]}")
        place.mkdir()
        noise = torch.Generator().manual_seed(number)
        state = {}
        for at, (name, shape) in enumerate(shapes(layers).items()):
            start = torch.Generator().manual_seed(1000 + at)
            weights = 0.02 * torch.randn(shape, generator=start)
            if number:
                weights += 0.002 * torch.randn(shape, generator=noise)
            state[name] = weights.bfloat16()
        save_file(state, place / "model.safetensors", {"format": "pt"})
        config = {**MODEL_CONFIG, "num_hidden_layers": layers}
        (place / "config.json").write_text(json.dumps(config))
    return (folder / "base" / "model.safetensors").stat().st_size


def runs_of(folder: Path, method: str) -> list[Path]:
    return sorted(folder.glob("run-*"))[: 2 if method.startswith("slerp") else 3]


def ours(folder: Path, method: str, out: Path) -> None:
    from polyak.checkpoints import average_checkpoints

    runs = runs_of(folder, method)
    how: Any = [1 / len(runs)] * len(runs) if method == "linear" else method
    base = None if method in ("linear", "slerp:t=0.3") else folder / "base"
    average_checkpoints(runs, out / "merged", method=how, base=base)


def mergekit(folder: Path, method: str, out: Path) -> None:
    name, each = METHODS[method]
    runs = runs_of(folder, method)
    recipe: dict[str, Any] = {
        "merge_method": name,
        "models": [{"model": str(run), "parameters": each} for run in runs],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if name == "slerp":
        recipe |= {"base_model": str(runs[0]), "parameters": {"t": 0.3}}
    elif name != "linear":
        recipe["base_model"] = str(folder / "base")
    (out / "recipe.yml").write_text(json.dumps(recipe))
    command = [os.environ["MERGEKIT"], f"{out}/recipe.yml", f"{out}/merged", "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True)


def greedy(folder: Path, out: Path) -> dict[str, float]:
    """How often each file was read, counted where files are read."""
    from polyak.checkpoints.reading import storage
    from polyak.study import make_soup

    read: collections.Counter[str] = collections.Counter()
    original = storage.LocalFile.read_into

    def counting(self: Any, offset: int, buffer: memoryview) -> None:
        read[self.path] += len(buffer)
        original(self, offset, buffer)

    storage.LocalFile.read_into = counting  # type: ignore[method-assign]
    runs = sorted(folder.glob("run-*"))
    files = {str(run / "model.safetensors"): run for run in runs}

    class Evaluation:
        """Reads all of a file; the smaller the noise of one tensor, the better."""

        takes_file, minimize = True, True

        def __call__(self, place: Path) -> float:
            from polyak import open_checkpoint

            with open_checkpoint(place) as opened:
                for tensor in opened.tensors.values():
                    for start in range(0, tensor.nbytes, 1 << 20):
                        room = memoryview(bytearray(min(1 << 20, tensor.nbytes - start)))
                        tensor.read_into(start, room)
                return float(opened.tensors["model.norm.weight"].load().float().std())

    soup = make_soup(runs, out / "soup", Evaluation(), cache=False)
    times = [read[path] / Path(path).stat().st_size for path in files]
    return {
        "reads_most": max(times),
        "reads_counted": soup.reads,
        "taken": sum(one.coefficient > 0 for one in soup.ingredients),
    }


def run_arm(arm: str, folder: Path, method: str) -> None:
    """In its own process: import, do it once, print seconds of processors and peak memory."""
    import safetensors.torch
    import torch

    import polyak.checkpoints.merging.average
    import polyak.study.soup

    assert safetensors.torch, (polyak.checkpoints.merging.average, polyak.study.soup)
    torch.set_num_threads(1)
    who = resource.RUSAGE_CHILDREN if arm == "mergekit" else resource.RUSAGE_SELF
    before, said = processor(who), {}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        if arm == "greedy":
            said = greedy(folder, Path(out))
        else:
            {"ours": ours, "mergekit": mergekit}[arm](folder, method, Path(out))
    seconds = processor(who) - before
    most = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    if arm == "mergekit":
        most = resource.getrusage(who).ru_maxrss / 1024
    print(json.dumps({"processor": seconds, "peak_mb": most, **said}))


def processor(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def measured(arm: str, folder: Path, method: str = "") -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "arm",
        "--arm",
        arm,
        "--folder",
        str(folder),
        "--method",
        method,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def compare(folder: Path, tiny: Path, rounds: int, **about: Any) -> None:
    """One line per method: against ours of the linear merge, and against mergekit in the same round."""
    arms = ["ours", "mergekit"] if "MERGEKIT" in os.environ else ["ours"]
    found: dict[tuple[str, str], list[dict[str, float]]] = collections.defaultdict(list)
    for _ in range(rounds):
        starting = measured("mergekit", tiny, "linear")["processor"] if "mergekit" in arms else 0.0
        for method in METHODS:
            for arm in arms:
                result = measured(arm, folder, method)
                result["processor"] -= starting if arm == "mergekit" else 0
                found[arm, method].append(result)
    for method in METHODS:
        mine = found["ours", method]
        said = {"of_linear": ratio(mine, found["ours", "linear"]), "peak_mb": peak(mine)}
        if "mergekit" in arms:
            theirs = found["mergekit", method]
            said |= {"mergekit_of_ours": ratio(theirs, mine), "mergekit_peak_mb": peak(theirs)}
        seconds = statistics.median(one["processor"] for one in mine)
        figure("soups", method=method, processor_seconds=round(seconds, 3), **said, **about)


def ratio(ones: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    pairs = zip(ones, others, strict=True)
    return round(statistics.median(a["processor"] / b["processor"] for a, b in pairs), 2)


def peak(ones: list[dict[str, float]]) -> float:
    return round(max(one["peak_mb"] for one in ones), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["greedy", "methods", "arm"])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what the figures should say of the machine")
    parser.add_argument("--arm")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--method", default="")
    given = parser.parse_args()
    if given.what == "arm":
        run_arm(given.arm, given.folder, given.method)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, tiny = Path(scratch, "runs"), Path(scratch, "tiny")
        folder.mkdir()
        size = make_runs(folder, given.files if given.what == "greedy" else 3, given.gigabytes)
        about = {"gigabytes_each": round(size / 1e9, 3), "command": shown(), "note": given.note}
        if given.what == "greedy":
            found = {name: round(value, 3) for name, value in measured("greedy", folder).items()}
            figure("soups", method="greedy", files=given.files, **found, **about)
            return
        tiny.mkdir()
        shrink(folder, tiny)
        compare(folder, tiny, given.rounds, **about)


def shrink(folder: Path, tiny: Path) -> None:
    """The same runs with the norms alone: what is left is mergekit's start-up."""
    from safetensors.torch import load_file, save_file

    for place in folder.iterdir():
        shutil.copytree(place, tiny / place.name)
        state = load_file(place / "model.safetensors")
        small = {name: tensor[..., :8].contiguous()[:8] for name, tensor in state.items()}
        save_file(
            {n: t.contiguous() for n, t in small.items()},
            tiny / place.name / "model.safetensors",
            {"format": "pt"},
        )


def shown() -> str:
    return " ".join(["python benchmarks/soups.py", *sys.argv[1:]])


if __name__ == "__main__":
    main()
