#!/usr/bin/env bash
# schedulefree 1.4.1 with torch 2.13.0: which optimizers can its wrapper wrap?
#
# Guess:   `ScheduleFreeWrapper(optimizer, momentum=0.9)` makes any torch optimizer schedule-free. Its README
#          shows it around RMSprop.
# Reality: The wrapper keeps its `z` in the state of the optimizer that it wraps. Most of torch's optimizers
#          make their own state "if the state is empty", which it no longer is: RMSprop and AdamW raise a
#          KeyError at their first step. SGD, which looks up each key with get, and Adagrad, which makes its
#          state when it is built, work.
# Matters: Who wants schedule-free Adam takes `AdamWScheduleFree`; any other pairing has to be tried for one
#          step. The rule holds for everything that writes into another optimizer's state.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet schedulefree==1.4.1 torch==2.13.0 numpy
"$folder/env/bin/python" - > "$folder/seen" <<'PYTHON'
import schedulefree
import torch

for name in ("SGD", "Adagrad", "RMSprop", "AdamW"):
    weight = torch.nn.Parameter(torch.ones(2))
    base = getattr(torch.optim, name)([weight], lr=0.1)
    optimizer = schedulefree.ScheduleFreeWrapper(base, momentum=0.9)
    optimizer.train()
    weight.square().sum().backward()
    try:
        optimizer.step()
        print(name, "stepped")
    except KeyError as error:
        print(name, "KeyError", error)
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
SGD stepped
Adagrad stepped
RMSprop KeyError 'square_avg'
AdamW KeyError 'exp_avg'
SEEN
