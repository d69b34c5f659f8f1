"""What several models predict together, how far they disagree, and how good that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyak.errors import ArgumentError
from polyak.study.metrics import brier, ece, entropy, error, nll

Outputs = Literal["logits", "probabilities", "values"]


@dataclass(frozen=True, eq=False)
class Prediction:
    r"""The mean of the members' probabilities, for each example in the order of the batches.

    logits: $\log \frac1M \sum_m p_m$, shape `(..., k)` with k classes, float64 on the CPU: their softmax is
    the mean probability, so that every function of logits takes them. expected_entropy: the mean over the
    members of the entropy of each, shape `(...)`, in nats. members: how many, draws included.
    """

    logits: Tensor
    expected_entropy: Tensor
    members: int

    @property
    def probabilities(self) -> Tensor:
        """The mean probabilities, shape `(..., k)`."""
        return self.logits.softmax(dim=-1)

    @property
    def entropy(self) -> Tensor:
        """The entropy of the mean, in nats: all of the uncertainty, shape `(...)`."""
        return entropy(self.logits)

    @property
    def mutual_information(self) -> Tensor:
        """Between prediction and weights, in nats, shape `(...)`: the part that comes from disagreement.

        The entropy of the mean minus the mean of the entropies; never negative.
        """
        return (self.entropy - self.expected_entropy).clamp(min=0)

    def scores(self, labels: Tensor, *, n_bins: int = 15) -> dict[str, float]:
        """`error`, `nll` (in nats), `brier` and `ece` (with bins of equal width) beside the true classes.

        `labels` has the shape of `entropy`. Raises ArgumentError if it does not.
        """
        logits = self.logits.flatten(0, -2)
        labels = _like(labels, self.expected_entropy, "labels").flatten()
        return {
            "error": error(logits, labels),
            "nll": nll(logits, labels),
            "brier": brier(logits, labels),
            "ece": ece(logits, labels, n_bins=n_bins),
        }


@dataclass(frozen=True, eq=False)
class GaussianPrediction:
    r"""The mean and the variance of the members' predictions of real numbers.

    With $\mu_m$ and $\sigma_m^2$ the mean and variance that member m predicts, the mixture has

    $$\mu = \frac1M \sum_m \mu_m, \qquad
    \sigma^2 = \frac1M \sum_m \sigma_m^2 + \frac1M \sum_m (\mu_m - \mu)^2.$$

    mean: $\mu$. within: the first term, noise in the data as the members see it, 0 where they predict
    means only. between: the second, their disagreement. All float64 on the CPU. members: how many.
    """

    mean: Tensor
    within: Tensor
    between: Tensor
    members: int

    @property
    def variance(self) -> Tensor:
        """All of it: within and between."""
        return self.within + self.between

    def scores(self, targets: Tensor) -> dict[str, float]:
        """`rmse`, and `nll` (in nats) under a Gaussian of this mean and variance; infinite for variance 0.

        `targets` has the shape of `mean`. Raises ArgumentError if it does not.
        """
        targets = _like(targets, self.mean, "targets").double()
        squares = (targets - self.mean) ** 2
        variance = self.variance
        each = 0.5 * (squares / variance + (2 * math.pi * variance).log())
        certain = variance <= 0
        return {
            "rmse": float(squares.mean().sqrt()),
            "nll": math.inf if bool(certain.any()) else float(each.mean()),
        }


def _like(given: Tensor, expected: Tensor, what: str) -> Tensor:
    given = torch.as_tensor(given).detach().cpu()
    if given.shape != expected.shape:
        raise ArgumentError(
            f"{what} have shape {tuple(given.shape)}, and the prediction is of shape "
            f"{tuple(expected.shape)}."
        )
    return given
