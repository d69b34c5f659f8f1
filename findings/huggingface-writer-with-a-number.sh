#!/usr/bin/env bash
# torch 2.13.0 with safetensors 0.8.0: `HuggingFaceStorageWriter` of torch.distributed.checkpoint
#
# Guess:   `dcp.save(state, storage_writer=HuggingFaceStorageWriter(folder))` takes what `dcp.save` takes, or says what it
#          does not take. A state that it wrote can be read.
# Reality: One value that is no tensor (a step, a rate, a name, None, the `param_groups` of an optimizer) destroys the
#          file. It is pickled in front of the header of the safetensors file; the index lists it as a weight. Saving
#          succeeds and warns of nothing, wherever the value stands in the state. Neither `dcp.load`, nor safetensors, nor
#          whatever reads the folder from then on can open the file, and the tensors are in it. Without such a
#          value all works.
# Matters: The loss shows when a run is to go on from the checkpoint, or at publication, when the run is over.
#          (The tensors can be cut out: the file behind the pickles is whole.) Save tensors only, or read back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 numpy
"$folder/env/bin/python" - "$folder" > "$folder/seen" <<'PYTHON'
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

warnings.filterwarnings("error")
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
states = {
    "tensors": model.state_dict(),
    "tensors and a step": {**model.state_dict(), "step": 5},
    "a step as a tensor": {**model.state_dict(), "step": torch.tensor(5)},
    "model and optimizer": {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    },
}
for name, state in states.items():
    folder = Path(sys.argv[1]) / name.replace(" ", "-")
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(folder)))
    (file,) = folder.glob("*.safetensors")
    try:
        print(f"{name}: saved, read:", sorted(load_file(file)))
    except SafetensorError as error:
        print(f"{name}: saved, not read: {error}")
    try:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except dcp.api.CheckpointException as error:
        print("  dcp.load raises", type(error).__name__)

folder = Path(sys.argv[1]) / "tensors-and-a-step"
(file,) = folder.glob("*.safetensors")
content = file.read_bytes()
header = content.index(b'{"__metadata__"')
index = json.loads((folder / "model.safetensors.index.json").read_text())
print("the file begins with", content[:4], "and has its header behind 1,000 bytes:", header > 1000)
print("what the index calls weights:", sorted(index["weight_map"]))
print("behind the pickle:", sorted(load(content[header - 8 :])))
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
tensors: saved, read: ['bias', 'weight']
tensors and a step: saved, not read: Error while deserializing header: header too large
  dcp.load raises CheckpointException
a step as a tensor: saved, read: ['bias', 'step', 'weight']
model and optimizer: saved, not read: Error while deserializing header: header too large
  dcp.load raises CheckpointException
the file begins with b'PK\x03\x04' and has its header behind 1,000 bytes: True
what the index calls weights: ['bias', 'step', 'weight']
behind the pickle: ['bias', 'weight']
SEEN
