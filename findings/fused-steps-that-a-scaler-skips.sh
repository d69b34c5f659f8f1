#!/usr/bin/env bash
# torch 2.13.0: hooks of an optimizer whose step `GradScaler` skips
#
# Guess:   With an infinite gradient `scaler.step(optimizer)` does not call the optimizer, so hooks registered by
#          `register_step_post_hook` run once for each change of the weights.
# Reality: That holds until the optimizer is made with `fused=True`. A fused optimizer is called always and decides in
#          its kernel whether to write: its hooks run although no weight moved, and none of their arguments says so. Only a
#          tensor `optimizer.found_inf` does, which is there while hooks run and gone afterwards. The scheduler, which
#          otherwise warns that it steps before the optimizer did, is silent too. (accelerate's issue 4242 says the same
#          of its own test for a skipped step.)
# Matters: `fused=True` is meant to change nothing but the speed. What counts steps by hooks (averages, schedules, logs)
#          counts more of them, most at the start, where the scale is being found: here one step moved the weights
#          and the hooks say eight. An average takes the initial weights seven times.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - > "$folder/seen" <<'PYTHON'
import warnings

import torch

for fused in (False, True):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu")
    seen = []
    optimizer.register_step_post_hook(
        lambda optimizer, args, kwargs: seen.append(
            (round(weight[0].item(), 2), getattr(optimizer, "found_inf", None))
        )
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while weight[0] == 1:
            optimizer.zero_grad()
            loss = (100 * weight.half()).sum()  # in float16 its gradient, 100 times the scale, overflows at first
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    moved = int(optimizer.state[weight]["step"])
    print(f"fused {fused}: steps {moved}, hooks ran {len(seen)}, warnings {len(caught)}")
    print("  weights that the hooks saw:", [value for value, _ in seen])
    print("  found_inf that the hooks saw:", [None if inf is None else inf.item() for _, inf in seen])
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
fused False: steps 1, hooks ran 1, warnings 1
  weights that the hooks saw: [0.95]
  found_inf that the hooks saw: [None]
fused True: steps 1, hooks ran 8, warnings 0
  weights that the hooks saw: [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.95]
  found_inf that the hooks saw: [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
SEEN
