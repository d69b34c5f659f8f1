#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: `load_state` before `prepare`
#
# Guess:   `accelerator.load_state(folder)` restores what the folder holds, or says that it could not.
# Reality: It restores the objects that were prepared so far. Called before `prepare` it restores the random
#          states, leaves model and optimizer as they were initialised, and raises and warns of nothing.
# Matters: A resumed run trains on from scratch, with a progress bar that says otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet accelerate==1.15.0 torch==2.13.0
"$folder/env/bin/python" - "$folder" > "$folder/seen" <<'PYTHON'
import sys
import warnings

import torch
from accelerate import Accelerator

state = sys.argv[1] + "/state"
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(2, 1, bias=False))
torch.nn.init.constant_(model.weight, 7)
accelerator.save_state(state)

for order in ("prepare, load_state", "load_state, prepare"):
    accelerator.free_memory()
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in order.split(", "):
            if call == "prepare":
                model = accelerator.prepare(model)
            else:
                accelerator.load_state(state)
    print(order, model.weight.tolist())
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
prepare, load_state [[7.0, 7.0]]
load_state, prepare [[1.0, 1.0]]
SEEN
