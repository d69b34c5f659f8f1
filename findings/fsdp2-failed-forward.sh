#!/usr/bin/env bash
# torch 2.13.0: FSDP2's `reshard()` after a forward pass that raised
#
# Guess:   After an exception in `forward` (a batch that does not fit, caught and skipped) the parameters are
#          sharded again, or `model.reshard()` makes them so.
# Reality: What was gathered stays gathered, and `reshard()` returns without doing anything: `parameters()`
#          gives full plain tensors beside DTensors until a forward pass succeeds. What is written into
#          them in between (clipping, averaging, loading) is lost without a word.
# Matters: Code that touches weights after a failed batch must look whether each is a DTensor; it can neither
#          trust `reshard()` nor that a write arrives.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/ranks.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.last = torch.nn.Linear(4, 4)

    def forward(self, batch):
        if len(batch) > 2:
            raise RuntimeError("does not fit")
        return self.last(self.first(batch))


def say(what):
    weight = model.last.weight
    if dist.get_rank() == 0:
        print(what, type(weight).__name__)


dist.init_process_group("gloo")
model = Network()
fully_shard(model.first)
fully_shard(model)
say("before:")
try:
    model(torch.ones(3, 4))
except RuntimeError:
    say("after the exception:")
model.reshard()
say("after reshard():")
with torch.no_grad():
    model.last.weight.fill_(5)
model(torch.ones(2, 4)).sum().backward()
say("after the next pass:")
kept = (model.last.weight.full_tensor() == 5).all().item()
if dist.get_rank() == 0:
    print("what was written is kept:", kept)
dist.destroy_process_group()
PYTHON
"$folder/env/bin/torchrun" --nproc-per-node 2 --master-port 29533 "$folder/ranks.py" > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
before: DTensor
after the exception: Parameter
after reshard(): Parameter
after the next pass: DTensor
what was written is kept: False
SEEN
