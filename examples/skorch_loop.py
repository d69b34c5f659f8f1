"""skorch: a callback of a dozen lines averages, validates on the average, and leaves it in the net.

python examples/skorch_loop.py
"""

from typing import Any

import numpy as np
import torch
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetRegressor
from skorch.callbacks import Callback
from torch import nn

import polyak


class Averaging(Callback):
    """The average of every fit, as `net.average_`; predictions after `fit` are its own."""

    def __init__(self, profile: str) -> None:
        self.profile = profile

    def on_train_begin(self, net: NeuralNetRegressor, **kwargs: Any) -> None:
        self.average_ = polyak.Average(net.module_, self.profile)
        self.average_.attach(net.optimizer_)

    def on_train_end(self, net: NeuralNetRegressor, **kwargs: Any) -> None:
        self.average_.detach()
        self.average_.copy_to(net.module_)


class AveragedRegressor(NeuralNetRegressor):
    """Validates the average: skorch has no event between the training and the validation of an epoch."""

    def run_single_epoch(self, iterator: Any, training: bool, **arguments: Any) -> None:
        if training:
            super().run_single_epoch(iterator, training, **arguments)
            return
        with dict(self.callbacks_)["average"].average_.applied():
            super().run_single_epoch(iterator, training, **arguments)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4).numpy()
    y = x.sum(1, keepdims=True) + torch.randn(200, 1).numpy()
    net = AveragedRegressor(
        nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)),
        optimizer=torch.optim.AdamW,
        lr=0.02,
        max_epochs=5,
        batch_size=16,
        callbacks=[("average", Averaging("ema:half_life=10"))],
        verbose=0,
    )
    net.fit(x, y)
    average = dict(net.callbacks_)["average"].average_
    steps = 5 * sum("train_loss" in batch for batch in net.history[-1]["batches"])
    assert average.count == steps
    _, held_out = net.get_split_datasets(x, y)
    loss = float(np.square(net.predict(held_out) - y[held_out.indices]).mean())
    assert (
        abs(loss - net.history[-1, "valid_loss"]) < 1e-5
    )  # the average was validated, and is kept
    print(f"{average.count} steps averaged, validation loss {net.history[-1, 'valid_loss']:.3f}")

    grid = {"callbacks__average__profile": ["ema:half_life=2", "ema:half_life=50"]}
    search = GridSearchCV(net, grid, cv=2, scoring="neg_mean_squared_error").fit(x, y)
    print("the best horizon:", search.best_params_["callbacks__average__profile"])


if __name__ == "__main__":
    main()
