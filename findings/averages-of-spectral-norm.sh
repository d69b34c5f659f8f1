#!/usr/bin/env bash
# torch 2.13.0: the exponential average of a network with `spectral_norm`, buffers included
#
# Guess:   `AveragedModel(model, use_buffers=True)` is what a network with BatchNorm needs, and does no harm to others:
#          what `spectral_norm` keeps as buffers are estimates that an average makes smoother. The averaged layers have
#          spectral norm 1, as the name of the parametrization says, or a little above.
# Reality: The buffers are two unit vectors, and the mean of unit vectors that turn is no unit vector. Each layer is divided
#          by u @ W @ v, so where each mean has length 0.8 its norm is 1 / 0.64 or more, and in eval mode nothing
#          renews or normalises them. A critic of four layers comes out of 1,500 steps with norms of 20, 1.6, 1.6
#          and 1.5, without a warning. With `use_buffers=False`, which copies the newest vectors, they are 1.15 to 1.02.
# Matters: That norm is the bound on how fast a critic or a certified network may change, and the product over layers is
#          what counts: 80 instead of 1. Lightning's `EMAWeightAveraging` averages buffers unless told otherwise, and so
#          does timm's `ModelEmaV3`. (miles-credit met it in an average of its own, its pull request 394.) A forward
#          pass of the average in training mode over some batches sets the vectors right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - > "$folder/seen" <<'PYTHON'
import math

import torch
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

WIDTH, LAYERS, STEPS = 64, 4, 1500
torch.set_num_threads(1)
torch.manual_seed(0)

layers = [
    layer for _ in range(LAYERS) for layer in (spectral_norm(torch.nn.Linear(WIDTH, WIDTH)), torch.nn.LeakyReLU(0.2))
]
critic = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 1))
averages = {
    buffers: AveragedModel(critic, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=buffers)
    for buffers in (False, True)
}
optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
direction = torch.randn(WIDTH)
for _ in range(STEPS):
    false, true = torch.randn(64, WIDTH), 0.7 * torch.randn(64, WIDTH) + 0.3 * direction
    optimizer.zero_grad()
    (torch.relu(1 - critic(true)).mean() + torch.relu(1 + critic(false)).mean()).backward()
    optimizer.step()
    for average in averages.values():
        average.update_parameters(critic)


def describe(name, network):
    network.eval()
    normed = [layer for layer in network if hasattr(layer, "parametrizations")]
    norms = [torch.linalg.matrix_norm(layer.weight, 2).item() for layer in normed]
    lengths = [layer.parametrizations.weight[0]._u.norm().item() for layer in normed]
    product = math.prod(norms)
    bound = next(bound for bound in (1.1, 2, 10, math.inf) if product < bound)
    right = all(abs(length - 1) < 1e-3 for length in lengths)
    print(f"{name}: product of norms below {bound}, vectors of length 1: {right}")


describe("the network", critic)
for buffers, average in averages.items():
    describe(f"use_buffers={buffers}", average.module)
averages[True].train()
with torch.no_grad():
    for _ in range(20):
        averages[True](torch.randn(64, WIDTH))
describe("use_buffers=True, after 20 batches in training mode", averages[True].module)
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
the network: product of norms below 1.1, vectors of length 1: True
use_buffers=False: product of norms below 2, vectors of length 1: True
use_buffers=True: product of norms below inf, vectors of length 1: False
use_buffers=True, after 20 batches in training mode: product of norms below 1.1, vectors of length 1: True
SEEN
