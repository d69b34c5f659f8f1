#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0: the start of `EMAWeightAveraging`
#
# Guess:   `EMAWeightAveraging(update_starting_at_epoch=n)` leaves the first n epochs out of the average, as
#          `update_starting_at_step` leaves out the first steps, and then updates after each step.
# Reality: The steps do not ask for the epoch: all of them are averaged, from the first on. From epoch n on there is a
#          second update at the end of each epoch, with weights that the last step has already given. With both arguments the
#          average starts at whichever comes first; with a step that is never reached it sees the ends of epochs only.
# Matters: Waiting for the end of a warm-up is what the argument is for; instead the warm-up is in the average, and with
#          the last weights of each epoch counted twice the window is not what the decay says. Nothing warns, and the
#          average looks like one. Count the steps of n epochs and give `update_starting_at_step`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet lightning==2.6.6 torch==2.13.0 numpy
"$folder/env/bin/python" -W ignore - > "$folder/seen" 2> /dev/null <<'PYTHON'
import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

STEPS, EPOCHS = 3, 4


class Climb(lightning.LightningModule):
    """The gradient is -1 always, so the weight after n steps of SGD is n."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        return -self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def watched(should_update, trainer, taken):
    """Notes the weight, which is the number of steps, whenever an update is asked for."""

    def decide(**when):
        answer = should_update(**when)
        if answer:
            taken.append(trainer.global_step)
        return answer

    return decide


for start in (
    {"update_starting_at_step": 6},
    {"update_starting_at_epoch": 2},
    {"update_starting_at_epoch": 2, "update_starting_at_step": 1000},
):
    average = EMAWeightAveraging(decay=0.5, **start)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[average],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    taken = []
    average.should_update = watched(average.should_update, trainer, taken)
    model = Climb()
    trainer.fit(model, torch.utils.data.DataLoader(range(STEPS)))
    print(start)
    print("  weights averaged:", taken, "average:", model.weight.item())
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
{'update_starting_at_step': 6}
  weights averaged: [7, 8, 9, 10, 11, 12] average: 11.03125
{'update_starting_at_epoch': 2}
  weights averaged: [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 11, 12, 12] average: 11.5313720703125
{'update_starting_at_epoch': 2, 'update_starting_at_step': 1000}
  weights averaged: [9, 12] average: 10.5
SEEN
