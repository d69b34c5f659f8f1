r"""Error, likelihood, calibration and uncertainty of predictions, from logits and labels.

Everything here is computed in float64 from logits `(n, k)` (n examples, k classes) and labels `(n,)`, so
that the figures of two models differ only if the models do. Log-probabilities are logits too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from polyak.errors import ArgumentError, NonFiniteError, warn
from polyak.maths.arguments import at_least_one

N_BINS = 15
"""Equal-width bins of confidence, as Guo et al. 2017 use them."""

_LARGEST_LOG_SCALE = math.log(1e3)


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in bins; empty bins hold 0.

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
    logits, labels = _checked(logits, labels)
    return float((logits.argmax(dim=1) != labels).double().mean())


def nll(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> float:
    r"""Mean negative log-likelihood in nats, $-\frac1n \sum_i \log softmax(z_i / T)_{y_i}$.

    `temperature` is $T > 0$. Raises ArgumentError otherwise, NonFiniteError for logits that are not
    finite.

    >>> round(nll(torch.zeros(3, 10), torch.tensor([0, 1, 2])), 6)  # log 10
    2.302585
    """
    logits, labels = _checked(logits, labels)
    if not 0 < temperature < math.inf:
        raise ArgumentError(f"temperature is {temperature}; expected a positive, finite number.")
    return float(cross_entropy(logits / temperature, labels))


def brier(logits: Tensor, labels: Tensor) -> float:
    r"""Mean Brier score, $\frac1n \sum_i \sum_k (p_{ik} - [y_i = k])^2$: from 0 to 2.

    Source: Brier 1950.

    >>> brier(torch.zeros(1, 2), torch.tensor([0]))
    0.5
    """
    logits, labels = _checked(logits, labels)
    p = logits.softmax(dim=1)
    right = p.gather(1, labels[:, None]).squeeze(1)
    return float((p.square().sum(dim=1) - 2 * right + 1).mean())


def entropy(logits: Tensor) -> Tensor:
    r"""Entropy of each prediction in nats, $-\sum_k p_k \log p_k$: `(..., k)` to `(...)`, float64.

    >>> entropy(torch.zeros(1, 2))  # log 2
    tensor([0.6931], dtype=torch.float64)
    """
    log_p = _logits(logits).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def auroc(inside: Tensor, outside: Tensor) -> float:
    r"""How well a score tells examples from outside the training distribution from those inside.

    The area under the ROC curve: the probability that a score outside is larger than one inside, ties
    counted half. `inside` and `outside` are scores of uncertainty, such as the entropy, of any number
    of examples each. Raises ArgumentError for none, NonFiniteError for a NaN.

    >>> auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.9]))
    0.875
    """
    inside, outside = (_given(one, "scores").double().flatten() for one in (inside, outside))
    if not len(inside) or not len(outside):
        raise ArgumentError(
            f"There are {len(inside)} scores inside and {len(outside)} outside; expected some of each."
        )
    if bool(inside.isnan().any()) or bool(outside.isnan().any()):
        raise NonFiniteError(
            "The scores hold NaN, which is neither larger nor smaller than others."
        )
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside).double()
    not_above = torch.searchsorted(ordered, outside, right=True).double()
    return float(((below + not_above) / 2).mean() / len(inside))


def reliability(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = N_BINS,
    binning: Literal["width", "mass"] = "width",
) -> Reliability:
    r"""Confidence, the largest probability, against accuracy, in bins.

    With `binning="width"` bins have equal width, $(b/B, (b+1)/B]$ (Guo et al. 2017, arXiv 1706.04599); with
    "mass" they begin at the quantiles of the confidence, so that about as many examples are in each; equal
    confidences are in one bin. Figures of the two are not comparable.

    >>> r = reliability(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]), n_bins=2)
    >>> r.count, r.accuracy, round(r.ece, 4)
    ((0, 2), (0.0, 0.5), 0.4999)
    """
    logits, labels = _checked(logits, labels)
    at_least_one("n_bins", n_bins)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    bins = _bins(confidence, n_bins, binning)
    count = torch.bincount(bins, minlength=n_bins)
    filled = count.clamp(min=1)
    right = torch.bincount(bins, (predicted == labels).double(), minlength=n_bins) / filled
    mean = torch.bincount(bins, confidence, minlength=n_bins) / filled
    return Reliability(tuple(mean.tolist()), tuple(right.tolist()), tuple(count.tolist()))


def ece(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = N_BINS,
    binning: Literal["width", "mass"] = "width",
) -> float:
    """Expected calibration error, a fraction of 1; see `Reliability.ece` and `reliability`."""
    return reliability(logits, labels, n_bins=n_bins, binning=binning).ece


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
    logits, labels = _checked(logits, labels)
    z = logits
    target = z.gather(1, labels[:, None]).mean()
    low, high = -_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE
    for _ in range(60):
        middle = (low + high) / 2
        expected = (z * (math.exp(middle) * z).softmax(dim=1)).sum(dim=1).mean()
        low, high = (middle, high) if target > expected else (low, middle)
    return math.exp(-(low + high) / 2)


def _bins(confidence: Tensor, n_bins: int, binning: str) -> Tensor:
    if binning == "width":
        return (confidence * n_bins).ceil().long().sub_(1).clamp_(0, n_bins - 1)
    if binning != "mass":
        raise ArgumentError(f"binning is {binning!r}; expected 'width' or 'mass'.")
    ordered = confidence.sort().values
    starts = torch.arange(1, n_bins, device=ordered.device) * len(ordered) // n_bins
    return torch.searchsorted(ordered[starts].contiguous(), confidence, right=True)


def _given(values: Any, what: str) -> Tensor:
    """As a tensor; lists and arrays will do."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(
            f"{what} are a {type(values).__name__}; expected a tensor, or what one can be made of."
        ) from None


def _logits(values: Any) -> Tensor:
    """Such; a warning where they are probabilities, of which all figures would be wrong."""
    logits = _given(values, "logits").double()
    if logits.ndim and logits.shape[-1] > 1 and logits.numel():
        sums = logits.sum(dim=-1)
        if bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all()):
            warn(
                "The logits look like probabilities: none is negative, and those of each example sum to 1. Their "
                "softmax is taken again. Pass logits, or probabilities.log()."
            )
    return logits


def _checked(given: Any, classes: Any) -> tuple[Tensor, Tensor]:
    """Logits in float64, and the labels that belong to them."""
    logits, labels = _logits(given), _given(classes, "labels")
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ArgumentError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected "
            "(n, k) and (n,), with n at least 1."
        )
    if labels.is_floating_point():
        raise ArgumentError(
            f"labels are {labels.dtype}; expected the numbers of classes as integers."
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
    return logits, labels.long()
