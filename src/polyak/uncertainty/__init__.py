"""Many models for the price of a few: Gaussians of weights, ensembles, and read-outs of uncertainty."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyak.objects import lazy_names

_HOME_OF = {
    "GaussianPrediction": "polyak.uncertainty.prediction",
    "Prediction": "polyak.uncertainty.prediction",
    "Reliability": "polyak.study.metrics",
    "SWAG": "polyak.uncertainty.swag",
    "auroc": "polyak.study.metrics",
    "best_temperature": "polyak.study.metrics",
    "brier": "polyak.study.metrics",
    "ece": "polyak.study.metrics",
    "entropy": "polyak.study.metrics",
    "error": "polyak.study.metrics",
    "nll": "polyak.study.metrics",
    "predict": "polyak.uncertainty.ensemble",
    "reliability": "polyak.study.metrics",
}

if TYPE_CHECKING:
    from polyak.study.metrics import Reliability as Reliability
    from polyak.study.metrics import auroc as auroc
    from polyak.study.metrics import best_temperature as best_temperature
    from polyak.study.metrics import brier as brier
    from polyak.study.metrics import ece as ece
    from polyak.study.metrics import entropy as entropy
    from polyak.study.metrics import error as error
    from polyak.study.metrics import nll as nll
    from polyak.study.metrics import reliability as reliability
    from polyak.uncertainty.ensemble import predict as predict
    from polyak.uncertainty.prediction import GaussianPrediction as GaussianPrediction
    from polyak.uncertainty.prediction import Prediction as Prediction
    from polyak.uncertainty.swag import SWAG as SWAG

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME_OF)
