#!/usr/bin/env bash
# torch-uncertainty 0.13.0 with torch 2.13.0: the mean that its `SWA` takes
#
# Guess:   `SWA(model, cycle_start, cycle_length)` holds the mean of the weights at the end of its cycles, as the paper
#          that it names defines it: all snapshots count alike.
# Reality: The first snapshot counts twice. `update_wrapper` sets its counter to 1 when it copies the first weights,
#          adds 1 at the end of the same call, and divides by counter + 1: of two snapshots the first weighs 2/3 and the
#          second 1/3, of n the first weighs 2 / (n + 1).
# Matters: The first snapshot is the oldest, often taken while the rate is still falling. With the usual handful of cycles
#          the average leans on it (of five, by a third instead of a fifth), loses part of what SWA is for, and no
#          error shows: it is a plausible set of weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/pip" install --quiet --no-deps torch-uncertainty==0.13.0
# The one file that holds SWA needs nothing but torch; the package around it asks for a dozen others.
"$folder/env/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import runpy
from importlib.metadata import distribution

import torch

file = distribution("torch-uncertainty").locate_file("torch_uncertainty/methods/swa.py")
SWA = runpy.run_path(str(file))["SWA"]


def average(snapshots):
    model = torch.nn.Linear(1, 1, bias=False)
    swa = SWA(model, cycle_start=0, cycle_length=1)
    for epoch, weight in enumerate(snapshots):
        torch.nn.init.constant_(model.weight, weight)
        swa.update_wrapper(epoch)
    return swa.swa_model.weight.item()


for n in (2, 3, 5, 10):
    first = average([1.0] + [0.0] * (n - 1))
    last = average([0.0] * (n - 1) + [1.0])
    print(f"{n} snapshots: the first weighs {first:.4f}, the last {last:.4f}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
2 snapshots: the first weighs 0.6667, the last 0.3333
3 snapshots: the first weighs 0.5000, the last 0.2500
5 snapshots: the first weighs 0.3333, the last 0.1667
10 snapshots: the first weighs 0.1818, the last 0.0909
SEEN
