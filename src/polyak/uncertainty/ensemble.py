"""`predict`: what several models, or the draws of a SWAG, predict together."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.nn import Module

from polyak.batchnorm.batches import Forward, checked, feed
from polyak.errors import ArgumentError, NonFiniteError
from polyak.maths.arguments import at_least_one
from polyak.tensors.modes import evaluation_mode
from polyak.uncertainty.members import lenders
from polyak.uncertainty.prediction import GaussianPrediction, Outputs, Prediction

if TYPE_CHECKING:
    from polyak.averaging.average import Average
    from polyak.study.trajectory import Trajectory
    from polyak.uncertainty.swag import SWAG

    Member = SWAG | Average | Module | str | os.PathLike[str] | Mapping[str, Tensor]

_SMALLEST = torch.finfo(torch.float64).tiny  # a probability of 0 counts as this


def predict(  # noqa: PLR0913 - keyword-only
    members: Member | Trajectory | Iterable[Member],
    batches: Iterable[Any],
    *,
    draws: int = 30,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    update_bn: Iterable[Any] | None = None,
    limit: int | None = None,
    forward: Forward | None = None,
    outputs: Outputs = "logits",
    model: Module | None = None,
) -> Prediction | GaussianPrediction:
    r"""Predict with several models and average what they say, never their weights.

    Probabilities are averaged, $\frac1M \sum_m p_m(y \mid x)$, or the moments of real numbers. A `SWAG` is
    `draws` models; several of them are MultiSWAG, models of separate runs a deep ensemble, files of one
    run's averaging points a snapshot ensemble. Members count the same; the draws of a SWAG share its part.

    Each is run over all batches, in evaluation mode and without gradients, before the next one: only
    sums are kept. Every model has its own weights and modes again afterwards, also after an error.

    Args:
        members: one of these, or several: a `SWAG`; an `Average`, of which the average is used; a
            `torch.nn.Module` as it is; a path of any checkpoint that polyak reads, or of what `SWAG.save`
            wrote; a state dict. Or a `Trajectory`, for the models of all its intervals.
        batches: what to predict, in the same order each time it is read: a list, or a DataLoader that
            does not shuffle. An entry is what it is for `polyak.update_bn`: a tensor, a tuple or list
            whose first entry is the input, or a mapping of keyword arguments.
        draws: how many models to draw from each SWAG.
        scale: of a SWAG's covariance; see `SWAG`.
        generator: for reproducible draws.
        update_bn: batches of training data, on which BatchNorm statistics are measured for each draw, and
            for averages whose statistics are stale. Read once per draw.
        limit: use at most this many of these batches.
        forward: `forward(model, batch)` runs the model and returns its output: for other batches, and
            for models that return a dict: `lambda model, batch: model(**batch)["logits"]`.
        outputs: what that is. "logits" or "probabilities" of classes, in the last dimension; or "values",
            real numbers: a tensor of means, or a pair (means, variances) of one shape.
        model: what files and state dicts are loaded into, for the time of their prediction.

    Returns:
        A `Prediction`, or a `GaussianPrediction` of "values".

    Raises:
        ArgumentError: no members, no batches, batches that differ from one pass to the next, outputs of
            another kind than said, files or state dicts without `model`.
        UsageError: a SWAG with fewer than two captures; inside `applied()` or another block of this kind.
        MismatchError: a file that does not fit the model; every tensor is named.
        NonFiniteError: a NaN or an infinity in what a member predicts.

    Source: Wilson and Izmailov 2020, arXiv 2002.08791; Huang et al. 2017, arXiv 1704.00109;
    Lakshminarayanan et al. 2017, arXiv 1612.01474, section 2.4.

    >>> import torch, polyak
    >>> models = [torch.nn.Linear(1, 2, bias=False) for _ in range(2)]
    >>> for model, logit in zip(models, (3.0, -3.0)):
    ...     _ = torch.nn.init.constant_(model.weight[:1], logit), torch.nn.init.zeros_(model.weight[1:])
    >>> prediction = polyak.predict(models, [torch.ones(1, 1)])
    >>> prediction.probabilities
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    >>> prediction.mutual_information  # the two are certain, and disagree
    tensor([0.5023], dtype=torch.float64)

    """
    batches = checked(batches, forward=forward, limit=None, passes=1)
    at_least_one("draws", draws)
    if outputs not in get_args(Outputs):
        raise ArgumentError(
            f"outputs is {outputs!r}; expected 'logits', 'probabilities' or 'values'."
        )
    options = {"scale": scale, "generator": generator, "update_bn": update_bn, "limit": limit}
    lent = lenders(members, model, draws, {**options, "forward": forward})
    _refuse_iterators(len(lent), batches=batches)
    _refuse_iterators(len(lent), update_bn=update_bn)
    sums = _Values() if outputs == "values" else _Classes(outputs)
    passes = _Passes(batches, forward)
    for lender, weight in lent:
        with lender() as lent_model, evaluation_mode(lent_model), torch.no_grad():
            for index, output in enumerate(passes.outputs(lent_model)):
                sums.add(index, output, weight)
        sums.weight += weight
    return sums.result(len(lent))


class _Passes:
    """Runs over the same batches, one model after the other."""

    def __init__(self, batches: Iterable[Any], forward: Forward | None) -> None:
        self._batches, self._forward = batches, forward
        self._seen: list[int] | None = None  # a checksum of each batch

    def outputs(self, model: Module) -> Iterator[Any]:
        """What the model returns for each of the batches; refuses others than those of the first pass."""
        seen: list[int] = []
        for batch in self._batches:
            seen.append(_checksum(batch))
            if self._seen is not None and seen != self._seen[: len(seen)]:
                raise ArgumentError(_OTHERS.format(len(seen)))
            yield feed(model, batch, self._forward)
        if not seen:
            raise ArgumentError(
                "There are no batches to predict; check that batches is not used up."
            )
        if self._seen is not None and len(seen) < len(self._seen):
            raise ArgumentError(_OTHERS.format(len(seen) + 1))
        self._seen = seen


_OTHERS = (
    "Batch {} is not what it was for the first member, so their predictions cannot be averaged. Pass a "
    "DataLoader with shuffle=False and without random augmentation, or a list of batches."
)


class _Classes:
    """Sums of probabilities, as logarithms, and of entropies."""

    def __init__(self, outputs: str) -> None:
        self._outputs = outputs
        self._log_sums: list[Tensor] = []
        self._entropies: list[Tensor] = []
        self.weight = 0.0

    def add(self, index: int, output: Any, weight: float) -> None:
        log_p = self._log_probabilities(_tensor(output))
        entropy = -(log_p.exp() * log_p).sum(dim=-1) * weight
        log_p = log_p + math.log(weight)
        if index == len(self._log_sums):
            self._log_sums.append(log_p)
            self._entropies.append(entropy)
            return
        _refuse_other_shape(log_p, self._log_sums[index])
        self._log_sums[index] = torch.logaddexp(self._log_sums[index], log_p)
        self._entropies[index] += entropy

    def result(self, members: int) -> Prediction:
        logits = torch.cat(self._log_sums) - math.log(self.weight)
        return Prediction(logits, torch.cat(self._entropies) / self.weight, members)

    def _log_probabilities(self, output: Tensor) -> Tensor:
        if output.ndim < 2 or output.shape[-1] < 2:
            raise ArgumentError(
                f"The output has shape {tuple(output.shape)}; expected (n, k) with k >= 2 classes. Of one "
                "probability p return torch.stack([1 - p, p], -1) from forward=, with "
                "outputs='probabilities'; for real numbers pass outputs='values'."
            )
        if self._outputs == "logits":
            return output.log_softmax(dim=-1)
        totals = output.sum(dim=-1)
        if bool((output < 0).any()) or not torch.allclose(
            totals, torch.ones_like(totals), atol=1e-2
        ):
            raise ArgumentError(
                "The outputs are not probabilities: some are negative, or do not add up to 1. Pass "
                "outputs='logits' if that is what the model returns."
            )
        logs: Tensor = (output / totals[..., None]).clamp(min=_SMALLEST).log()
        return logs


class _Values:
    """Running moments of means, and the mean of variances."""

    def __init__(self) -> None:
        self._moments: list[tuple[Tensor, Tensor, Tensor]] = []
        self.weight = 0.0

    def add(self, index: int, output: Any, weight: float) -> None:
        pair = isinstance(output, (tuple, list)) and len(output) == 2
        mean, variance = map(_tensor, output) if pair else (_tensor(output), None)
        variance = torch.zeros_like(mean) if variance is None else variance
        _refuse_other_shape(variance, mean)
        if bool((variance < 0).any()):
            raise ArgumentError(
                "A variance is negative; return (means, variances), not logarithms."
            )
        if index == len(self._moments):
            self._moments.append((mean, variance, torch.zeros_like(mean)))
            return
        before, within, between = self._moments[index]
        _refuse_other_shape(mean, before)
        share = weight / (self.weight + weight)
        off = mean - before
        self._moments[index] = (
            before + share * off,
            within + share * (variance - within),
            (1 - share) * (between + share * off * off),
        )

    def result(self, members: int) -> GaussianPrediction:
        mean, within, between = map(torch.cat, zip(*self._moments, strict=True))
        return GaussianPrediction(mean, within, between, members)


def _tensor(output: Any) -> Tensor:
    """An output in float64 on the CPU, where the figures of all members add up."""
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim == 0:
        entries = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        found = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
        raise ArgumentError(
            f"The model returned a {found}{entries}; expected a floating tensor with one row per example. "
            "Pass forward=, a function of the model and a batch that returns it: "
            "lambda model, batch: model(**batch)['logits']."
        )
    values: Tensor = output.detach().cpu().double()
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            "A member predicts NaN or infinity: it has diverged, or BatchNorm statistics do not fit "
            "its weights (update_bn=), or the scale is too large."
        )
    return values


def _refuse_other_shape(found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise ArgumentError(
            f"An output has shape {tuple(found.shape)}, and one that belongs to it "
            f"{tuple(expected.shape)}: only models of the same outputs are averaged."
        )


def _refuse_iterators(n_passes: int, **given: Any) -> None:
    for name, batches in given.items():
        if n_passes > 1 and isinstance(batches, Iterator):
            raise ArgumentError(
                f"{name} is an iterator, which can be read only once, and there are {n_passes} models to "
                "run. Pass a list or a DataLoader."
            )


def _checksum(batch: Any) -> int:
    """Of the values of all tensors in a batch."""
    if isinstance(batch, Tensor):
        values = batch.detach().cpu().contiguous().reshape(-1)
        return zlib.crc32(values.view(torch.uint8).numpy().data) if values.numel() else 0
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return zlib.crc32(str([_checksum(one) for one in batch]).encode())
    return 0
