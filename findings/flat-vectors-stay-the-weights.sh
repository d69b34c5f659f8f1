#!/usr/bin/env bash
# torch 2.13.0: a vector of weights that was written into a network
#
# Guess:   `vector_to_parameters(vector, network.parameters())` writes the values of the vector into the parameters, as
#          `load_state_dict` does: afterwards the vector is a vector, and the parameters have the type they had.
# Reality: Each parameter becomes a view of the vector. Training the network trains the vector; a second network that
#          gets the same vector is the first one from then on. A vector in float64 makes the network float64. Each
#          tensor drags the whole along: `torch.save` of a head of 8 kB writes 4 MB. `parameters_to_vector` copies, so
#          that there and back again leaves a network whose layers are one piece of memory. Nothing is said.
# Matters: Flat vectors are how SWA, task vectors, Laplace and SWAG are written by hand. The average is looked at in the
#          network, training goes on for an epoch, and the average is no longer one: it is the last weights, without
#          any sign but that averaging does not help. Write `average.clone()`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - > "$folder/seen" <<'PYTHON'
import io

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def trained(network):
    """One step of SGD that adds 1 to each weight."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    sum(-parameter.sum() for parameter in network.parameters()).backward()
    optimizer.step()


average = torch.zeros(6, dtype=torch.float64)
networks = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
for network in networks:
    vector_to_parameters(average, network.parameters())
print("the network's type:", networks[0].weight.dtype)
trained(networks[0])
print("the average after a step:", average.tolist())
print("the other network after it:", networks[1].weight.flatten().tolist())
with torch.no_grad():
    networks[1].load_state_dict(torch.nn.Linear(2, 2).state_dict())
print("after loading into the other one, the first is the same:", torch.equal(networks[0].weight, networks[1].weight))

for there_and_back in (False, True):
    network = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 2))
    if there_and_back:
        vector_to_parameters(parameters_to_vector(network.parameters()), network.parameters())
    file = io.BytesIO()
    torch.save(network[1].state_dict(), file)
    print(f"there and back {there_and_back}: the head takes {round(file.tell() / 1000, -1):.0f} kB")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
the network's type: torch.float64
the average after a step: [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
the other network after it: [1.0, 1.0, 1.0, 1.0]
after loading into the other one, the first is the same: True
there and back False: the head takes 10 kB
there and back True: the head takes 4010 kB
SEEN
