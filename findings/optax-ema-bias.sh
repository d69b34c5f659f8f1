#!/usr/bin/env bash
# optax 0.2.8 with jax 0.10.2 (CPU): the bias correction of `ema`
#
# Guess:   `optax.ema(decay, debias=True)` of weights that do not change is these weights, after any number of updates:
#          that is what the correction is for.
# Reality: 1 - decay is taken in Python, decay ** count in float32, where a decay near 1 is another number (0.99999 is
#          0.99998999). What was added and what it is divided by do not fit: with 0.99999 all weights are 0.14% too small,
#          with 0.999999 1.3%, from the first update on and as long as the correction is felt, jitted or not. In
#          bfloat16 the average starts at 0 and stops growing while the correction goes on to 1: with 0.999 equal weights
#          are 3% too large after 100 updates and half their size after 3,000. (`accumulator_dtype` mends the latter.)
# Matters: Long windows are where the correction is needed, since the run ends within the first of them. All weights
#          are scaled alike, in every layer, so outputs shrink layer by layer; with the usual 0.999 in float32, which
#          tests use, nothing shows. Without `debias`, from a copy of the weights, there is no such factor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 numpy
"$folder/env/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def averages(decay, dtype, counts, **options):
    """Of a weight that is 1 always."""
    ema = optax.ema(decay, debias=True, **options)
    weight = jnp.ones((), dtype)
    state = ema.init(weight)
    update = jax.jit(ema.update)
    seen = []
    for count in range(1, max(counts) + 1):
        average, state = update(weight, state)
        if count in counts:
            seen.append(f"{float(average):.3f}")
    return seen


for decay in (0.999, 0.99999, 0.999999):
    print(f"float32, decay {decay}, after 1, 100, 3000 updates: {averages(decay, jnp.float32, (1, 100, 3000))}")
for options in ({}, {"accumulator_dtype": jnp.float32}):
    seen = averages(0.999, jnp.bfloat16, (1, 100, 1000, 3000), **options)
    print(f"bfloat16, decay 0.999, {list(options)}, after 1, 100, 1000, 3000 updates: {seen}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
float32, decay 0.999, after 1, 100, 3000 updates: ['1.000', '1.000', '1.000']
float32, decay 0.99999, after 1, 100, 3000 updates: ['0.999', '0.999', '0.999']
float32, decay 0.999999, after 1, 100, 3000 updates: ['0.987', '0.987', '0.987']
bfloat16, decay 0.999, [], after 1, 100, 1000, 3000 updates: ['1.000', '1.031', '0.789', '0.527']
bfloat16, decay 0.999, ['accumulator_dtype'], after 1, 100, 1000, 3000 updates: ['0.999', '0.999', '0.999', '0.999']
SEEN
