#!/usr/bin/env bash
# diffusers 0.42.1 with torch 2.13.0: `EMAModel.save_pretrained` of the autoencoder of FLUX.2
#
# Guess:   `EMAModel(model.parameters(), model_cls=..., model_config=...)` follows a model; `save_pretrained` writes that
#          model with averaged weights.
# Reality: It holds parameters only. `save_pretrained` builds a new model from the configuration, copies the averaged
#          parameters into it and writes that, with every buffer as it was initialised. `AutoencoderKLFlux2` keeps the
#          statistics by which its latents are normalised in the buffers of a BatchNorm without parameters: the
#          folder says mean 0 and variance 1. Neither saving nor loading says anything of it.
# Matters: Encoding and decoding still work, so reconstructions look right. Latents that a pipeline normalises by
#          `vae.bn`, or those that a transformer was trained on, are then shifted and scaled by another amount. What has
#          buffers must be saved as `ema.copy_to(model.parameters())` and `model.save_pretrained`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 numpy
"$folder/env/bin/python" -W ignore - "$folder" > "$folder/seen" <<'PYTHON'
import sys

import torch
from diffusers import AutoencoderKLFlux2
from diffusers.training_utils import EMAModel

torch.set_num_threads(1)
torch.manual_seed(0)
model = AutoencoderKLFlux2(
    block_out_channels=(8, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=2,
    norm_num_groups=4,
    sample_size=16,
)
model.bn.running_mean.fill_(3)
model.bn.running_var.fill_(4)
model.save_pretrained(sys.argv[1] + "/model")

ema = EMAModel(model.parameters(), model_cls=AutoencoderKLFlux2, model_config=model.config)
ema.step(model.parameters())
ema.save_pretrained(sys.argv[1] + "/average")

for name in ("model", "average"):
    found = AutoencoderKLFlux2.from_pretrained(f"{sys.argv[1]}/{name}")
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters()))
    mean, variance = found.bn.running_mean.unique().item(), found.bn.running_var.unique().item()
    print(f"{name}: same parameters {same}, mean of the latents {mean}, variance {variance}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
model: same parameters True, mean of the latents 3.0, variance 4.0
average: same parameters True, mean of the latents 0.0, variance 1.0
SEEN
