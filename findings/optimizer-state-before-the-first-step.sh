#!/usr/bin/env bash
# torch 2.13.0: `get_optimizer_state_dict` of an optimizer that has not stepped yet
#
# Guess:   Reading the state of an optimizer, to save it before training begins, changes nothing.
# Reality: `torch.distributed.checkpoint.state_dict` fills an empty state by one step at a learning rate of 0. The
#          weights stay as they are, but the counter of Adam, AdamW and RAdam stays at 1: all later bias corrections
#          are one step ahead, and the run ends in other weights than the same run that saved nothing.
# Matters: A run that saves "step 0" (to test that the disk is writable, or as a baseline) is another run. What counts steps
#          by hooks of the optimizer counts one that no loop made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def train(save, steps=3):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if save:
        get_optimizer_state_dict(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    (count,) = {int(state["step"]) for state in optimizer.state.values()}
    return count, model.weight.detach()


(plain, weights), (saved, other) = train(False), train(True)
print("steps counted after 3:", plain, "and, saved before the first:", saved)
print("same weights:", torch.equal(weights, other))
print("difference above 1%:", bool(((weights - other).abs() / weights.abs()).max() > 0.01))
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
steps counted after 3: 3 and, saved before the first: 4
same weights: False
difference above 1%: True
SEEN
