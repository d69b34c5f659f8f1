#!/usr/bin/env bash
# mergekit 0.1.5 with torch 2.13.0: what `multislerp` interpolates
#
# Guess:   Multi-SLERP is SLERP for several models: of two it gives their SLERP (a quarter of the weight, a quarter of the
#          angle), of more the mean on the sphere, by way of the tangent space at their mean, as it describes.
# Reality: It is the weighted mean of the directions, scaled to the mean length, and nothing else. What it takes for the
#          vectors in the tangent space are projections, not logarithms, and projections of points onto the tangent space
#          at their own weighted mean have the weighted mean 0: the step that should turn is 0 always. Of two models
#          at right angles, as differences from a base are, a weight of 0.1 turns by 6.3 degrees instead of 9.
#          (`nuslerp` turns by 9. With equal weights of two both are the same, so that the usual test shows nothing.)
# Matters: Who weighs a small share of a model by SLERP gets a third less of its direction than asked for, and the more
#          the models differ the less. A comparison of "linear" with "multislerp" compares lengths only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet mergekit==0.1.5 torch==2.13.0 numpy
"$folder/env/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import math

import torch
from mergekit.merge_methods.api import merge_tensors

torch.set_num_threads(1)
torch.manual_seed(0)


def angle(of, seen_from):
    """In degrees."""
    return math.degrees(torch.arccos(torch.nn.functional.cosine_similarity(of, seen_from, dim=0)).item())


first, second = torch.eye(2, dtype=torch.float64)
for weight in (0.1, 0.25, 0.5):
    found = [
        angle(merge_tensors([first, second], method, parameters={"weight": [1 - weight, weight]}), first)
        for method in ("multislerp", "nuslerp")
    ]
    print(f"a weight of {weight} at 90 degrees: multislerp turns by {found[0]:.1f}, nuslerp by {found[1]:.1f}")

farthest = 0.0
for _ in range(100):
    base, *models = torch.randn(6, 50, dtype=torch.float64)
    weights = torch.rand(5, dtype=torch.float64)
    weights /= weights.sum()
    found = merge_tensors([base, *models], "multislerp", parameters={"weight": weights.tolist()}, base_index=0)
    differences = torch.stack(models) - base
    lengths = differences.norm(dim=1)
    mean = weights @ (differences / lengths[:, None])
    scaled = base + mean / mean.norm() * (weights @ lengths)
    farthest = max(farthest, (found - scaled).abs().max().item())
print("five models, from the scaled mean of their directions no more than 1e-6:", farthest < 1e-6)
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
a weight of 0.1 at 90 degrees: multislerp turns by 6.3, nuslerp by 9.0
a weight of 0.25 at 90 degrees: multislerp turns by 18.4, nuslerp by 22.5
a weight of 0.5 at 90 degrees: multislerp turns by 45.0, nuslerp by 45.0
five models, from the scaled mean of their directions no more than 1e-6: True
SEEN
