#!/usr/bin/env bash
# keras 3.15.1 (jax 0.10.2; the torch and tensorflow backends give the same): an optimizer with `use_ema` and
# `gradient_accumulation_steps`
#
# Guess:   Four batches of which the optimizer makes one step give the run, and the average, of one batch four
#          times as large. The documentation says that the frequency of the average looks at accumulated iterations.
# Reality: The steps are the same, the average is not: it decays with every batch, also with those after which no
#          weight has moved. With momentum m and n batches a step its decay per step is m^n. Only
#          `ema_overwrite_frequency` looks at steps, and then holds for each of the n batches.
# Matters: The default momentum of 0.99 is a window of 100 steps; with 64 batches a step it is two steps, so the
#          average is the last weights. Whoever accumulates because memory is short loses the average without a word,
#          and has to pass momentum^(1/n).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 numpy
KERAS_BACKEND=jax "$folder/env/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import keras
import numpy as np


class Climb(keras.losses.Loss):
    """The gradient is -1 always, so the weight after n steps of SGD is n."""

    def call(self, targets, outputs):
        return -outputs[:, 0]


def train(steps, batches, momentum, average=True):
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.layers.Input((1,)), layer])
    optimizer = keras.optimizers.SGD(
        1.0,
        use_ema=average,
        ema_momentum=momentum,
        gradient_accumulation_steps=batches if batches > 1 else None,
    )
    model.compile(optimizer=optimizer, loss=Climb())
    ones = np.ones((steps * batches, 1), "float32")
    model.fit(ones, ones, batch_size=1, epochs=1, shuffle=False, verbose=0)
    return float(keras.ops.convert_to_numpy(layer.kernel)[0, 0])


for batches in (1, 4):
    weight = train(4, batches, 0.5, average=False)
    print(f"{batches} to a step, after 4 steps: weight {weight}, its average {train(4, batches, 0.5)}")
for batches in (1, 64):
    print(f"{batches} to a step, momentum 0.99, after 100 steps: average {train(100, batches, 0.99):.1f}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
1 to a step, after 4 steps: weight 4.0, its average 3.125
4 to a step, after 4 steps: weight 4.0, its average 3.466796875
1 to a step, momentum 0.99, after 100 steps: average 37.6
64 to a step, momentum 0.99, after 100 steps: average 97.9
SEEN
