"""What a task measures: the loss that trains, and the records of a validation and of a final test.

The last dimension of a network's output is the classes, whatever is before it: images, or the bytes of
windows. Each of those is one prediction.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polyak.reference_run.data import Data, Split
from polyak.reference_run.hardware import Hardware
from polyak.reference_run.recipe import Recipe
from polyak.study.metrics import best_temperature, error, nll, reliability
from polyak.tensors.modes import restored_modes

_FEW_WINDOWS = 32  # of a text without gradients: their logits stay in the cache
BATCH = 250  # examples without gradients: a batch stays in the cache
CURVE_EXAMPLES = 1000  # the first of training: enough for the statistics of a point of a curve


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """The cross-entropy of a model's predictions, in nats."""
    logits = model(inputs)
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def logits_of(model: nn.Module, split: Split, hardware: Hardware) -> Tensor:
    """Logits (predictions, classes), float32 on the CPU, in evaluation mode; all modes are restored."""
    with restored_modes(model), torch.no_grad(), hardware.precision():
        model.eval()
        batches = [
            model(hardware.inputs(batch)).flatten(0, -2).float().cpu()
            for batch in split.batches(BATCH)
        ]
    return torch.cat(batches)


class WindowLoss:
    """The evaluation of a language model for questions to a record: one loss for each window, in nats per byte.

    The bytes of a window depend on each other, so windows are what an interval is taken over.
    """

    minimize = True

    def __init__(self, split: Split) -> None:
        self._split = split

    @property
    def identity(self) -> str:
        """What tells these windows from others."""
        labels = self._split.labels.contiguous()
        return (
            f"window loss {hashlib.sha256(labels.numpy().data).hexdigest()} {tuple(labels.shape)}"
        )

    def __call__(self, model: nn.Module) -> Tensor:
        """One loss per window, float64."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        losses, _ = scores_of(model, self._split, Hardware(device))
        return losses.view(self._split.labels.shape).mean(1)


def scores_of(model: nn.Module, split: Split, hardware: Hardware) -> tuple[Tensor, Tensor]:
    """The loss of each prediction, float64, and whether it is wrong; in evaluation mode.

    A text has more predictions, of more classes, than there are images: their logits are not kept.
    """
    losses, wrong = [], []
    with restored_modes(model), torch.no_grad(), hardware.precision():
        model.eval()
        for inputs, labels in zip(
            split.inputs.split(_FEW_WINDOWS),  # type: ignore[no-untyped-call]
            split.labels.long().split(_FEW_WINDOWS),  # type: ignore[no-untyped-call]
            strict=True,
        ):
            logits = model(hardware.inputs(inputs)).flatten(0, -2).float().cpu()
            losses.append(cross_entropy(logits.double(), labels.flatten(), reduction="none"))
            wrong.append(logits.argmax(1) != labels.flatten())
    return torch.cat(losses), torch.cat(wrong)


@dataclass(frozen=True)
class Evaluation:
    """What is measured of weights after an epoch, and at the end of an arm."""

    validation: Callable[[nn.Module, Data, Hardware], dict[str, float]]
    final: Callable[[nn.Module, Data, Hardware], dict[str, Any]]


def evaluation_of(recipe: Recipe) -> Evaluation:
    """The evaluation of a recipe's task."""
    if recipe.task == "words":
        return Evaluation(words_record, final_words_record)
    return Evaluation(validation_record, final_record)


def validation_record(model: nn.Module, data: Data, hardware: Hardware) -> dict[str, float]:
    """Error in percent and NLL in nats on the validation images."""
    logits = logits_of(model, data.validation, hardware)
    labels = data.validation.labels
    return {"error": 100 * error(logits, labels), "nll": nll(logits, labels)}


def final_record(model: nn.Module, data: Data, hardware: Hardware) -> dict[str, Any]:
    """Error and calibration error in percent and NLL on the test images.

    The temperature is fitted on the validation images.
    """
    logits, labels = logits_of(model, data.test, hardware), data.test.labels
    validation = logits_of(model, data.validation, hardware)
    temperature = best_temperature(validation, data.validation.labels)
    bins = reliability(logits, labels)
    return {
        "error": 100 * error(logits, labels),
        "nll": nll(logits, labels),
        "ece": 100 * bins.ece,
        "temperature": temperature,
        "nll_scaled": nll(logits, labels, temperature=temperature),
        "reliability": {name: list(values) for name, values in asdict(bins).items()},
    }


def words_record(model: nn.Module, data: Data, hardware: Hardware) -> dict[str, float]:
    """Error in percent and NLL in nats for each byte of the validation windows."""
    return _mean_scores(model, data.validation, hardware)


def _mean_scores(model: nn.Module, split: Split, hardware: Hardware) -> dict[str, float]:
    losses, wrong = scores_of(model, split, hardware)
    return {"error": 100 * float(wrong.double().mean()), "nll": float(losses.mean())}


def final_words_record(model: nn.Module, data: Data, hardware: Hardware) -> dict[str, Any]:
    """NLL in nats and error in percent for each byte of the test windows.

    And by how many thousandths of a nat 8 and 4 bits a weight raise the NLL.
    """
    found = _mean_scores(model, data.test, hardware)
    of_bits = {
        bits: _mean_scores(rounded(model, bits), data.test, hardware)["nll"] for bits in (8, 4)
    }
    rises = {f"int{bits}_rise": 1000 * (nll - found["nll"]) for bits, nll in of_bits.items()}
    return found | rises


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy whose matrices hold what so many bits keep: evenly spaced values, to the largest of each row.

    Rounded to the nearest, without data: symmetric, `2 ** bits - 1` values for each row (absmax).

    >>> net = nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.tensor([[127.0, 0.6]]))
    >>> rounded(net, 8).weight.tolist(), rounded(net, 4).weight.tolist()
    ([[127.0, 1.0]], [[127.0, 0.0]])
    """
    found = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() > 1:
                largest = parameter.flatten(1).abs().amax(1)
                step = largest / (2 ** (bits - 1) - 1)
                step = step.clamp_min(torch.finfo(parameter.dtype).tiny)
                step = step.view(-1, *(1,) * (parameter.dim() - 1))
                parameter.copy_((parameter / step).round() * step)
    return found
