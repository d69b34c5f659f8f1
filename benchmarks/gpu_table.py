"""The table of what an update on a GPU was asked to cost, from the figures of `update.py --device cuda`.

python benchmarks/gpu_table.py figures.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# What one H100 took before there was a kernel (November 2026, torch 2.11), and what was asked for:
# float32, then bfloat16 weights.
BEFORE = {
    "language model": "1.17 / 2.22",
    "64 x 1M": "1.8 / 2.6",
    "mixed": "42 / 50",
    "1000 x 4k": "71 / 122",
}
ASKED = {
    "language model": "1.05 / 1.25",
    "64 x 1M": "1.4 / 1.6",
    "mixed": "4 / 4",
    "1000 x 4k": "10 / 12",
}
PEERS = ["torch default SWA", "torch multi EMA", "ema-pytorch", "torch-ema", "diffusers"]


def both(found: dict, model: str, key: str) -> str:
    """One figure for float32 and bfloat16 weights."""
    values = [found.get((model, dtype), {}).get(key) for dtype in ("float32", "bfloat16")]
    return " / ".join("-" if value is None else f"{value:.3g}" for value in values)


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def main() -> None:
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    figures = [json.loads(line) for line in lines if line.startswith("{")]
    updates = [f for f in figures if f["figure"] == "update / fewest bytes"]
    others = {f["figure"]: f for f in figures}
    found = {(f["model"], f["dtype"]): f for f in updates}
    if updates:
        print(f"{updates[0]['card']}, torch {updates[0]['torch']}, ", end="")
        print(f"copy {updates[0]['copy_TBps']:.3g} TB/s; float32 / bfloat16 weights\n")
    row("multiple of the fewest bytes", "before", "asked for", "now", "in blocks", *PEERS)
    row(*["---"] * (5 + len(PEERS)))
    for model, asked in ASKED.items():
        keys = ["polyak", "polyak in blocks", *PEERS]
        row(model, BEFORE[model], asked, *(both(found, model, key) for key in keys))
    four = both(found, "language model", "four averages")
    row("four averages of the language model", "1.52 / 1.83", "1.15 / 1.17", four)
    for model in ASKED:
        times = [both(found, model, key) for key in ("host_ms", "host_ms_four")]
        row(f"host's ms per update, {model}", "0.3 to 6", "0.3", f"{times[0]}; four: {times[1]}")
    step = others.get("training step", {})
    added = [
        f"{name} {step[key]:+.1%}" for key in step if (name := key.removesuffix(", added")) != key
    ]
    row("added to a training step", "host: 23 ms of 28", "host: 3%", "; ".join(added) or "-")
    if step:
        alone = f"{step['copy_to_host_ms']:.3g} of {step['no average, ms']:.3g}"
        row("copying the weights to the host, ms of a step", "", "less than a step", alone)
    lent = others.get("applied(), bfloat16", {})
    memory = f"{lent['memory_MB']:.0f} MB, {lent['of_one_copy']:.2g} of a copy" if lent else "-"
    row("applied() of a bfloat16 model: memory", "one copy", "64 MB", memory)
    first = others.get("first update", {})
    compiling = f"{first['seconds']:.2g} s, {first['compiling']:.2g} compiling" if first else "-"
    row("first update of a process", "", "", compiling)


if __name__ == "__main__":
    main()
