"""The evaluation of a classifier: temperature-scaled NLL, example by example."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from polyak.batchnorm.batches import Forward
from polyak.errors import ArgumentError, require
from polyak.study.evaluations import digest_of
from polyak.study.metrics import best_temperature


class ScaledNLL:
    r"""The evaluation of a classifier: one temperature-scaled NLL per example, lower is better.

    An average is better calibrated than its iterates, so raw NLL mostly rewards calibration, which a single
    temperature would give as well; error is too coarse to choose by on a few thousand examples (all of the
    gain on validation was winner's curse in our experiments). What is left is
    $-\log softmax(z_i / T)_{y_i}$, with $T$ fitted on the half of the examples that $i$ is not in.

    Args:
        batches: pairs of inputs and labels, in the same order every time: no shuffling.
        forward: ``forward(model, inputs)`` returns the logits, (n, classes); by default ``model(inputs)``.

    Called with a model in evaluation mode it returns the scores, (n,) in float64. Raises ArgumentError where
    labels come in another order than before, or are not classes of the logits.

    >>> model = torch.nn.Linear(2, 3)
    >>> ScaledNLL([(torch.randn(8, 2), torch.arange(8) % 3)])(model).shape
    torch.Size([8])

    """

    minimize = True

    def __init__(self, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
        found: Any = batches
        require(
            isinstance(found, Iterable) and not isinstance(found, Iterator | Tensor),
            f"batches is a {type(batches).__name__}; expected pairs of inputs and labels that can be read again "
            "for every average: a list or a DataLoader.",
        )
        self._batches = batches
        self._forward: Callable[..., Any] = forward or (lambda model, inputs: model(inputs))
        self._labels: Tensor | None = None

    @torch.no_grad()
    def __call__(self, model: Module) -> Tensor:
        """One score per example."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        logits, labels = [], []
        for batch in self._batches:
            inputs, target = self._pair(batch)
            inputs = inputs.to(device) if isinstance(inputs, Tensor) else inputs
            logits.append(self._forward(model, inputs).double().cpu())
            labels.append(target.cpu())
        require(bool(labels), "The data has no batches; expected pairs of inputs and labels.")
        return self._scores(torch.cat(logits), torch.cat(labels))

    @property
    def identity(self) -> str:
        """What tells these data from others: a digest of all inputs and labels."""
        digest = hashlib.sha256()
        for batch in self._batches:
            digest.update(digest_of(self._pair(batch)).encode())
        return f"scaled nll {digest.hexdigest()}"

    def _pair(self, batch: Any) -> tuple[Any, Tensor]:
        if not (isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor)):
            raise ArgumentError(
                f"A batch is a {type(batch).__name__}; expected a pair of inputs and labels (a tensor)."
            )
        return batch[0], batch[1]

    def _scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self._labels is not None and not torch.equal(labels, self._labels):
            raise ArgumentError(
                "The labels came in another order than before, so that examples cannot be compared one by one. "
                "Do not shuffle the data (DataLoader(shuffle=False))."
            )
        self._labels = labels
        scores = torch.empty(len(labels), dtype=torch.float64)
        for one in (slice(0, None, 2), slice(1, None, 2)):
            other = slice(1 - (one.start or 0), None, 2)
            fitted = other if len(labels[other]) else one
            scale = best_temperature(logits[fitted], labels[fitted])
            scores[one] = cross_entropy(logits[one] / scale, labels[one], reduction="none")
        return scores
