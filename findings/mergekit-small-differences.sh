#!/usr/bin/env bash
# mergekit 0.1.5 with torch 2.13.0: `sce` and `model_stock` of models that differ by little
#
# Guess:   Both find their ratios from the differences between models: SCE weighs each model by its mean square, Model
#          Stock goes towards the mean by the angle between them. Both are ratios, so half of all differences give half of
#          the change, and 1e-3 is no special size.
# Reality: 1e-6 is: the square of 1e-3. SCE compares its sum of mean squares with it and, below, weighs all alike
#          (a model that moved five times as far gets 1/2 instead of 25/26). Model Stock divides by no less than it, so
#          where the norms of the differences of a tensor are below 1e-3 the angle goes to 90 degrees and the base comes
#          back: of 1,024 values at 1e-5 a value, of each row with `filter_wise` too. In either case nothing is said.
# Matters: Weights move by 1e-3 in few fine-tunes and by 1e-5 in those by reinforcement. There SCE is a plain mean
#          after its selection, and Model Stock drops what was learned, first in norms and biases, whose tensors are
#          small: the model is merged in part. Multiplying all models by 1,000 and dividing the merge by it helps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet mergekit==0.1.5 torch==2.13.0 numpy
"$folder/env/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import torch
from mergekit.merge_methods.api import merge_tensors

torch.set_num_threads(1)
N = 1024


def merge(method, base, differences, scale=1.0):
    """The merge less the base, all models being multiplied by `scale` before, and it divided by it after."""
    models = [scale * base] + [scale * (base + difference) for difference in differences]
    return merge_tensors(models, method, base_index=0) / scale - base


for moves in (1e-3, 1e-4):
    base = torch.ones(N, dtype=torch.float64)
    # Two models that agree in all signs, one of them five times as far away.
    differences = [5 * moves * base, moves * base]
    for scale in (1, 1000):
        change = merge("sce", base, differences, scale).mean() / moves
        print(f"sce, moves of {moves}, scale {scale}: the far model weighs {(change.item() - 1) / 4:.3f}")

for moves in (1e-4, 1e-5, 1e-6):
    torch.manual_seed(0)
    base = torch.ones(N, dtype=torch.float64)
    common = torch.randn(N, dtype=torch.float64)
    # Three models, 60 degrees from each other: three quarters of the way to their mean.
    differences = [moves * (common + torch.randn(N, dtype=torch.float64)) / 2**0.5 for _ in range(3)]
    mean = sum(differences) / 3
    for scale in (1, 1000):
        change = merge("model_stock", base, differences, scale)
        print(f"model_stock, moves of {moves}, scale {scale}: {(change @ mean / (mean @ mean)).item():.2f} of the way")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
sce, moves of 0.001, scale 1: the far model weighs 0.962
sce, moves of 0.001, scale 1000: the far model weighs 0.962
sce, moves of 0.0001, scale 1: the far model weighs 0.500
sce, moves of 0.0001, scale 1000: the far model weighs 0.962
model_stock, moves of 0.0001, scale 1: 0.76 of the way
model_stock, moves of 0.0001, scale 1000: 0.76 of the way
model_stock, moves of 1e-05, scale 1: 0.14 of the way
model_stock, moves of 1e-05, scale 1000: 0.76 of the way
model_stock, moves of 1e-06, scale 1: 0.00 of the way
model_stock, moves of 1e-06, scale 1000: 0.76 of the way
SEEN
