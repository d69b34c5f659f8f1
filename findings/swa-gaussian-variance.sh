#!/usr/bin/env bash
# swa-gaussian 0.1.9 (the package of the SWAG paper's authors) with torch 2.13.0: the diagonal of SWAG
#
# Guess:   `sample()` draws each weight with the variance that it had over the collected models.
# Reality: The variance is the mean of squares less the square of the mean, both kept in float32, so it is known to some
#          1e-7 of the squared weight. Weights that move by less than a few 1e-4 of their size are below that: more than
#          half of the differences come out 0 or negative and are clamped to 1e-30 without a word. Those weights are never
#          drawn other than their mean; the rest are rounding, many times too large: at 1e-4 the root of the mean
#          variance is 3 times what it was, at 3e-5 ten times.
# Matters: Fine-tuning, a last phase at a small rate, and the weights near 1 of every normalisation move that little. The
#          noise that is drawn there says nothing of the training, and grows as the weights settle: uncertainty then
#          measures float32. Collecting in float64 or as deviations from the mean (Welford) has no such bound.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy tqdm gpytorch==1.13
"$folder/env/bin/pip" install --quiet --no-deps swa-gaussian==0.1.9
# The packages around the class would import data sets and image models; they are left out.
"$folder/env/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import sys
import types
from importlib.metadata import distribution

import torch

for name in ("swag", "swag.posteriors"):
    package = types.ModuleType(name)
    package.__path__ = [str(distribution("swa-gaussian").locate_file(name.replace(".", "/")))]
    sys.modules[name] = package
from swag.posteriors.swag import SWAG

N, MODELS, DRAWS = 20_000, 20, 100
torch.set_num_threads(1)

for moves in (1e-2, 1e-3, 1e-4, 3e-5):
    torch.manual_seed(0)
    model = torch.nn.Linear(N, 1, bias=False)
    swag = SWAG(torch.nn.Linear, max_num_models=MODELS, in_features=N, out_features=1, bias=False)
    collected, drawn = [], []
    for _ in range(MODELS):
        with torch.no_grad():
            model.weight.copy_(1 + moves * torch.randn(1, N))
        swag.collect_model(model)
        collected.append(model.weight.detach().double())
    for _ in range(DRAWS):
        swag.sample(scale=1.0)
        drawn.append(swag.base.weight.double())
    true = torch.stack(collected).var(0, unbiased=False)
    found = torch.stack(drawn)
    still = (found == found[0]).all(0).double().mean().item()
    ratio = (found.var(0).mean() / true.mean()).sqrt().item()
    print(f"moves of {moves}: drawn at their mean always {still:.0%}, root of the mean variance {ratio:.1f} times")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
moves of 0.01: drawn at their mean always 0%, root of the mean variance 1.0 times
moves of 0.001: drawn at their mean always 0%, root of the mean variance 1.0 times
moves of 0.0001: drawn at their mean always 57%, root of the mean variance 3.1 times
moves of 3e-05: drawn at their mean always 57%, root of the mean variance 10.3 times
SEEN
