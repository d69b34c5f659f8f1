#!/usr/bin/env bash
# tianshou 2.0.1 with torch 2.13.0: target networks with BatchNorm
#
# Guess:   A target network is what its network was at the last update (`full_parameter_update`, "exact copy", of DQN), or
#          runs after it (`polyak_parameter_update` of DDPG, TD3, SAC). `Net` offers BatchNorm as a `norm_layer`.
# Reality: Only parameters are carried over. Running means and variances are buffers, and the target is held in eval
#          mode, so it normalises by mean 0 and variance 1, as at its making, for ever: neither update ever changes them.
#          Directly after an "exact copy" its outputs are not those of the network. No warning.
# Matters: Its outputs are what the network is trained towards. Observations that are not centred are what a
#          BatchNorm is put in for, and for these the targets are those of another function: here six
#          times too large. The same holds for any buffer, such as a module's own normalisation of observations.
#          LayerNorm has no buffers and is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/pip" install --quiet --no-deps tianshou==2.0.1
# The one file that holds target networks needs nothing but torch; the package around it asks for a dozen others.
"$folder/env/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import runpy
from importlib.metadata import distribution

import torch

file = distribution("tianshou").locate_file("tianshou/utils/lagged_network.py")
LaggedNetworkCollection = runpy.run_path(str(file))["LaggedNetworkCollection"]

torch.manual_seed(0)
observations = 20 + 0.5 * torch.randn(512, 8)
for norm in (torch.nn.BatchNorm1d, torch.nn.LayerNorm):
    network = torch.nn.Sequential(torch.nn.Linear(8, 64), norm(64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    targets = LaggedNetworkCollection()
    target = targets.add_lagged_network(network)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(500):
        optimizer.zero_grad()
        (network(observations) - 1).square().mean().backward()
        optimizer.step()
        targets.polyak_parameter_update(0.05)
    network.eval()
    for update in ("500 soft updates", "a full update"):
        if update == "a full update":
            targets.full_parameter_update()
        with torch.no_grad():
            found = target(observations).abs().mean() / network(observations).abs().mean()
        print(f"{norm.__name__}, {update}: outputs {found.item():.0f} times the network's")
    for name, buffer in target.named_buffers():
        print(f"  {name}: {buffer.float().unique().tolist()}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
BatchNorm1d, 500 soft updates: outputs 6 times the network's
BatchNorm1d, a full update: outputs 6 times the network's
  module.1.running_mean: [0.0]
  module.1.running_var: [1.0]
  module.1.num_batches_tracked: [0.0]
LayerNorm, 500 soft updates: outputs 1 times the network's
LayerNorm, a full update: outputs 1 times the network's
SEEN
