r"""Error, likelihood and calibration of predictions, from logits and labels.

Everything here is computed in float64 on the CPU from logits `(n, k)` (n examples, k classes) and
labels `(n,)`, so that the figures of two models differ only if the models do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from polyak.errors import ArgumentError, NonFiniteError

N_BINS = 15
"""Equal-width bins of confidence, as Guo et al. 2017 use them."""

_LARGEST_LOG_SCALE = math.log(1e3)


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in bins of equal width; empty bins hold 0.

    `confidence` and `accuracy` are the means in each bin, `count` the examples.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]

    @property
    def ece(self) -> float:
        r"""Expected calibration error, $\sum_b (n_b / n) |acc_b - conf_b|$, a fraction of 1."""
        gaps = zip(self.count, self.accuracy, self.confidence, strict=True)
        return sum(n * abs(accuracy - confidence) for n, accuracy, confidence in gaps) / max(
            1, sum(self.count)
        )


def error(logits: Tensor, labels: Tensor) -> float:
    """The fraction of examples whose largest logit is not the label's.

    >>> error(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1]))
    0.5
    """
    _check(logits, labels)
    return float((logits.argmax(dim=1) != labels).double().mean())


def nll(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> float:
    r"""Mean negative log-likelihood in nats, $-\frac1n \sum_i \log softmax(z_i / T)_{y_i}$.

    `temperature` is $T > 0$. Raises ArgumentError otherwise, NonFiniteError for logits that are not
    finite.

    >>> round(nll(torch.zeros(3, 10), torch.tensor([0, 1, 2])), 6)  # log 10
    2.302585
    """
    _check(logits, labels)
    if not temperature > 0:
        raise ArgumentError(f"temperature is {temperature}; expected a positive number.")
    return float(cross_entropy(logits.double() / temperature, labels))


def reliability(logits: Tensor, labels: Tensor, *, n_bins: int = N_BINS) -> Reliability:
    r"""Bins of equal width over the confidence, the largest probability: $(b/B, (b+1)/B]$.

    Source: Guo et al. 2017, arXiv 1706.04599.

    >>> r = reliability(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]), n_bins=2)
    >>> r.count, r.accuracy, round(r.ece, 4)
    ((0, 2), (0.0, 0.5), 0.4999)
    """
    _check(logits, labels)
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    bins = (confidence * n_bins).ceil().long().sub_(1).clamp_(0, n_bins - 1)
    count = torch.bincount(bins, minlength=n_bins)
    filled = count.clamp(min=1)
    right = torch.bincount(bins, (predicted == labels).double(), minlength=n_bins) / filled
    mean = torch.bincount(bins, confidence, minlength=n_bins) / filled
    return Reliability(tuple(mean.tolist()), tuple(right.tolist()), tuple(count.tolist()))


def ece(logits: Tensor, labels: Tensor, *, n_bins: int = N_BINS) -> float:
    """Expected calibration error, a fraction of 1; see `Reliability.ece`."""
    return reliability(logits, labels, n_bins=n_bins).ece


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""The temperature $T$ that minimises `nll(logits, labels, temperature=T)`.

    The likelihood is concave in the scale $s = 1 / T$, with the derivative
    $\frac1n \sum_i (z_{i y_i} - E_{p_i(s)}[z_i])$, so its one zero is found by bisection on
    $\log s$ between 1/1000 and 1000. For a classifier without errors the likelihood keeps growing
    with $s$; the result is then the temperature at which float64 shows no further gain.

    Fit it on validation data, never on the test data. Source: Guo et al. 2017, arXiv 1706.04599.

    >>> logits = torch.tensor([[2.0, 0.0]] * 4)
    >>> round(best_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)  # 2 / log 3
    1.8205
    """
    _check(logits, labels)
    z = logits.double()
    target = z.gather(1, labels[:, None]).mean()
    low, high = -_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE
    for _ in range(60):
        middle = (low + high) / 2
        expected = (z * (math.exp(middle) * z).softmax(dim=1)).sum(dim=1).mean()
        low, high = (middle, high) if target > expected else (low, middle)
    return math.exp(-(low + high) / 2)


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ArgumentError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected "
            "(n, k) and (n,), with n at least 1."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ArgumentError(
            f"labels range from {int(labels.min())} to {int(labels.max())}; expected classes from "
            f"0 to {logits.shape[1] - 1}."
        )
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(
            "The logits hold NaN or infinity: the model they come from has diverged."
        )
