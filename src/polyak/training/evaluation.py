"""What weights are worth on the validation and test images, as records."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from polyak.study.metrics import best_temperature, error, nll, reliability
from polyak.tensors.modes import lent_modes
from polyak.training.data import Data, Split
from polyak.training.hardware import Hardware

_BATCH = 250  # stays in the cache


def logits_of(model: nn.Module, split: Split, hardware: Hardware) -> Tensor:
    """Logits `(n, k)`, float32 on the CPU, in evaluation mode; each module's mode comes back."""
    with lent_modes(model), torch.no_grad(), hardware.precision():
        model.eval()
        batches = [model(hardware.images(batch)) for batch in split.batches(_BATCH)]
    return torch.cat(batches).float().cpu()


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
