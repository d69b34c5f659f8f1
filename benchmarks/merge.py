"""Merging checkpoints: time, memory, and the peers, in one run: `python benchmarks/merge.py --gb 1`.

Every arm runs in its own process, which prints how long the work took (without imports) and its peak
memory; a round runs every arm once, in rotating order, and ratios are taken within the round. All arms
sync what they write. `plain` reads all inputs and writes one of them, by as many threads as polyak.
The project's bounds hold for 8 files of 1 GB on 2 cores, in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from merge_inputs import MANY, MODEL_CONFIG, holes, make_inputs, many_tensors, remove_inputs
from timing import figure, interleaved

FOUR = {"a": "swa", "b": "ema:half_life=2", "c": "power:gamma=2", "d": "window:length=5"}
THREADS = min(2, os.cpu_count() or 1)


def inputs_of(folder: Path, pattern: str = "step-*.safetensors") -> list[Path]:
    return sorted(folder.glob(pattern))


def plain(folder: Path, out: Path, writes: int = 1) -> None:
    """Read every input, write as many files of one input's size, and nothing else."""
    paths = inputs_of(folder)
    sources = [os.open(path, os.O_RDONLY) for path in paths]
    targets = [os.open(f"{out}/{i}", os.O_RDWR | os.O_CREAT) for i in range(writes)]
    size, chunk = paths[0].stat().st_size, 512 * 1024
    for target in targets:
        os.ftruncate(target, size)
    offsets = iter(range(0, size, chunk))
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(chunk))
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            for source in sources:
                got = os.preadv(source, [buffer], offset)
            for target in targets:
                os.pwrite(target, buffer[:got], offset)

    crew = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    for target in targets:
        os.fsync(target)


def plain_four(folder: Path, out: Path) -> None:
    plain(folder, out, writes=4)


def ours(folder: Path, out: Path) -> None:
    merge(inputs_of(folder), {out / "swa.safetensors": "swa"})


def ours_four(folder: Path, out: Path) -> None:
    merge(inputs_of(folder), {out / f"{name}.safetensors": how for name, how in FOUR.items()})


def ours_torch(folder: Path, out: Path) -> None:
    merge(inputs_of(folder, "step-*.pt"), {out / "swa.safetensors": "swa"})


def ours_dcp(folder: Path, out: Path) -> None:
    merge(inputs_of(folder, "step-*-dcp"), {out / "swa.safetensors": "swa"})


def ours_dcp_out(folder: Path, out: Path) -> None:
    merge(inputs_of(folder, "step-*-dcp"), {out / "swa": "swa"}, format="dcp")


def merge(inputs: list[Path], outputs: dict[Path, str], **options: str) -> None:
    from polyak.checkpoints.merging.average import average_checkpoints

    average_checkpoints(inputs, outputs, threads=THREADS, **options)  # type: ignore[arg-type]


def load_file_loop(folder: Path, out: Path) -> None:
    """What most people write."""
    from safetensors.torch import load_file

    loop([lambda path=path: load_file(path) for path in inputs_of(folder)], out)


def torch_load_loop(folder: Path, out: Path) -> None:
    import torch

    paths = inputs_of(folder, "step-*.pt")
    loop([lambda path=path: torch.load(path, weights_only=True) for path in paths], out)


def loop(loaders: list[Callable[[], dict]], out: Path) -> None:
    from safetensors.torch import save_file

    total: dict = {}
    for load in loaders:
        for name, tensor in load().items():
            total[name] = total[name] + tensor.float() if name in total else tensor.float()
    mean = {name: (tensor / len(loaders)).bfloat16() for name, tensor in total.items()}
    save_file(mean, out / "mean.safetensors")
    sync(out / "mean.safetensors")


def mergekit(folder: Path, out: Path) -> None:
    """mergekit-yaml's linear merge; its start-up is taken off by the caller."""
    models = ""
    for index, path in enumerate(inputs_of(folder)):
        place = out / f"model-{index}"
        place.mkdir()
        (place / "model.safetensors").symlink_to(path)
        shutil.copy(folder / "config.json", place)
        models += f"  - model: {place}\n    parameters: {{weight: 1.0}}\n"
    (out / "recipe.yml").write_text(
        f"models:\n{models}merge_method: linear\nparameters: {{normalize: true}}\ndtype: bfloat16\n"
    )
    command = [os.environ["MERGEKIT"], f"{out}/recipe.yml", f"{out}/merged", "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True)
    for path in (out / "merged").glob("*.safetensors"):
        sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


ARMS = {
    arm.__name__: arm
    for arm in (
        plain,
        plain_four,
        ours,
        ours_four,
        ours_torch,
        ours_dcp,
        ours_dcp_out,
        load_file_loop,
        torch_load_loop,
        mergekit,
    )
}


GROUPS = {
    "safetensors": ["plain", "ours", "plain_four", "ours_four", "load_file_loop", "mergekit"],
    "pt": ["plain", "ours", "ours_torch", "torch_load_loop"],
    "dcp": ["plain", "ours", "ours_dcp", "ours_dcp_out"],
}


def run_arm(name: str, folder: Path) -> None:
    """In its own process: import, do it once, print seconds and peak memory."""
    import safetensors.torch
    import torch

    import polyak.checkpoints.merging.average

    assert safetensors.torch, polyak.checkpoints.merging.average
    if name == "ours_dcp_out":
        import torch.distributed.checkpoint
    torch.set_num_threads(THREADS)
    imported = peak()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        begin = time.perf_counter()
        ARMS[name](folder, Path(out))
        seconds = time.perf_counter() - begin
    most = peak()
    if name == "mergekit":
        most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": most, "imported_mb": imported}))


def peak() -> float:
    """Megabytes at the peak of this program (ru_maxrss would count what started it)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measured(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--arm", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def startup_of_mergekit() -> float:
    begin = time.perf_counter()
    subprocess.run([os.environ["MERGEKIT"], "--help"], check=True, capture_output=True)
    return time.perf_counter() - begin


def rounds_of(arms: list[str], folder: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for index in range(rounds + 1):
        turn = index % len(arms)
        for name in arms[turn:] + arms[:turn]:
            result = measured(name, folder)
            if name == "mergekit":
                result["seconds"] -= startup_of_mergekit()
            if index:
                found[name].append(result)
    return found


def report(found: dict[str, list[dict[str, float]]], gigabytes: float) -> None:
    base = {"ours_four": "plain_four"}
    for name, results in found.items():
        against = found[base.get(name, "plain")]
        ratios = [
            one["seconds"] / other["seconds"] for one, other in zip(results, against, strict=True)
        ]
        mine = [
            one["seconds"] / other["seconds"]
            for one, other in zip(results, found["ours"], strict=True)
        ]
        figure(
            "merge",
            arm=name,
            gigabytes_each=gigabytes,
            seconds=statistics.median(one["seconds"] for one in results),
            of_plain=statistics.median(ratios),
            of_ours=statistics.median(mine),
            peak_mb=max(one["peak_mb"] for one in results),
            above_imports_mb=max(one["peak_mb"] - one["imported_mb"] for one in results),
        )


SMALL_FILES = 64
COMMAND = "import sys; from polyak.cli import main; sys.argv[0] = 'polyak'; main()"


def command_line(source: str, folder: Path) -> float:
    """Seconds of `polyak average folder` from the start of its process, with polyak from `source`."""
    command = [sys.executable, "-c", COMMAND, "average", str(folder), "--overwrite"]
    environment = os.environ | {"PYTHONPATH": source}
    begin = time.perf_counter()
    subprocess.run(
        [*command, "-o", f"{folder}.safetensors"], check=True, capture_output=True, env=environment
    )
    return time.perf_counter() - begin


def small_files(folder: Path, before: str | None, rounds: int) -> None:
    """A folder of many small files by the command line, in turns with another source tree of polyak."""
    run = many_tensors(folder / "run", SMALL_FILES)
    now = os.environ.get("PYTHONPATH", "")
    candidates = {"ours": lambda: command_line(now, run)}
    if before:
        candidates["before"] = lambda: command_line(before, run)
    times = interleaved(candidates, rounds=rounds)
    ratio = {"of_before": times.ratio("ours", "before")} if before else {}
    figure(
        "merge small files", files=SMALL_FILES, tensors=MANY, seconds=times.median("ours"), **ratio
    )


def memory(folder: Path, small: float, large: float) -> None:
    """Peaks with files of holes of two sizes: they must not differ."""
    peaks = {}
    for size in (small, large):
        place = holes(folder / f"holes-{size:g}", 8, size)
        peaks[size] = measured("ours", place)["peak_mb"]
        shutil.rmtree(place)
    figure("merge memory", small_gb=small, large_gb=large, small_mb=peaks[small], large_mb=peaks[large],
           ratio=peaks[large] / peaks[small])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=0.125, help="of each input")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--arms",
        nargs="*",
        default=[name for name in ARMS if name != "mergekit"],
        help="always with plain and ours",
    )
    parser.add_argument(
        "--holes-gb", type=float, default=1.0, help="of each input of holes; 0 leaves it out"
    )
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--mergekit", help="its mergekit-yaml, from its own environment")
    parser.add_argument(
        "--small-files",
        action="store_true",
        help="instead: 64 files of 2000 small tensors each, by the command line, start-up included",
    )
    parser.add_argument("--before", help="with --small-files: the src folder of another polyak")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        run_arm(given.arm, given.folder)
        return
    if given.small_files:
        with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
            small_files(Path(scratch), given.before, given.rounds)
        return
    given.arms += ["plain", "ours"]
    if "ours_four" in given.arms:
        given.arms.append("plain_four")
    if given.mergekit:
        os.environ["MERGEKIT"] = given.mergekit
        given.arms.append("mergekit")
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder = Path(scratch)
        layers = make_inputs(folder, given.files, given.gb, "safetensors")
        (folder / "config.json").write_text(
            json.dumps(MODEL_CONFIG | {"num_hidden_layers": layers})
        )
        for kind, arms in GROUPS.items():
            chosen = [name for name in arms if name in given.arms]
            if not set(chosen) - {"plain", "ours"} and kind != "safetensors":
                continue
            if (
                kind != "safetensors"
            ):  # one format at a time beside it: all must stay in the page cache
                make_inputs(folder, given.files, given.gb, kind)
            report(rounds_of(chosen, folder, given.rounds), given.gb)
            remove_inputs(folder, kind)
        if given.holes_gb:
            memory(folder, given.holes_gb / 8, given.holes_gb)


if __name__ == "__main__":
    main()
