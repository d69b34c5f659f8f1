"""Read-outs against obvious twins, and against torchmetrics where it has them."""

from __future__ import annotations

import math

import pytest
import torch
import torchmetrics.functional.classification as metrics
from reference import readouts as reference

from polyak import uncertainty
from polyak.errors import ArgumentError, NonFiniteError
from polyak.uncertainty import GaussianPrediction, Prediction


def drawn(seed, n=200, k=5):
    torch.manual_seed(seed)
    labels = torch.randint(0, k, (n,))
    logits = 2 * torch.randn(n, k, dtype=torch.float64)
    logits[torch.arange(n), labels] += 1.5
    return logits, labels


seeds = pytest.mark.parametrize("seed", range(3))


@seeds
def test_brier_and_entropy(seed):
    logits, labels = drawn(seed)
    p = logits.softmax(1)
    assert math.isclose(
        uncertainty.brier(logits, labels),
        reference.brier(p.tolist(), labels.tolist()),
        rel_tol=1e-12,
    )
    expected = torch.tensor([reference.entropy(one) for one in p.tolist()], dtype=torch.float64)
    assert torch.allclose(uncertainty.entropy(logits), expected, rtol=1e-12)
    assert uncertainty.entropy(torch.tensor([[1000.0, 0.0]])).item() == 0


@seeds
def test_auroc(seed):
    torch.manual_seed(seed)
    inside, outside = torch.randn(90).round(decimals=1), (torch.randn(70) + 1).round(decimals=1)
    found = uncertainty.auroc(inside, outside)
    assert math.isclose(found, reference.auroc(inside.tolist(), outside.tolist()), rel_tol=1e-12)
    targets = torch.cat([torch.zeros(90), torch.ones(70)]).long()
    scores = torch.cat([inside, outside]).double().sigmoid()
    assert math.isclose(found, float(metrics.binary_auroc(scores, targets)), abs_tol=1e-6)
    assert math.isclose(uncertainty.auroc(outside, inside), 1 - found, rel_tol=1e-12)


@seeds
@pytest.mark.parametrize("n_bins", [1, 7, 20])
def test_ece_by_width_and_by_mass(seed, n_bins):
    logits, labels = drawn(seed)
    logits = logits.round()  # many equal confidences
    p = logits.softmax(1)
    by_width = uncertainty.ece(logits, labels, n_bins=n_bins)
    theirs = metrics.multiclass_calibration_error(p, labels, num_classes=5, n_bins=n_bins)
    assert math.isclose(by_width, float(theirs), abs_tol=1e-5)
    by_mass = uncertainty.ece(logits, labels, n_bins=n_bins, binning="mass")
    expected = reference.ece_of_equal_mass(p.tolist(), labels.tolist(), n_bins)
    assert math.isclose(by_mass, expected, abs_tol=1e-12)
    counts = uncertainty.reliability(logits, labels, n_bins=n_bins, binning="mass").count
    assert sum(counts) == len(labels)


def test_bins_of_equal_mass_are_of_equal_mass():
    logits, labels = drawn(0)
    counts = uncertainty.reliability(logits, labels, n_bins=8, binning="mass").count
    assert counts == (25,) * 8


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x, y: uncertainty.ece(x, y, binning="size"), "binning"),
        (lambda x, y: uncertainty.ece(x, y, n_bins=0), "n_bins"),
        (lambda x, y: uncertainty.brier(x, y + 3), "labels range"),
        (lambda x, y: uncertainty.brier(x[0], y), "shape"),
        (lambda x, y: uncertainty.auroc(x[:0], x), "0 scores inside"),
    ],
)
def test_what_is_refused(call, match):
    with pytest.raises(ArgumentError, match=match):
        call(*drawn(0))


def test_scores_that_are_nan():
    with pytest.raises(NonFiniteError, match="NaN"):
        uncertainty.auroc(torch.tensor([1.0, math.nan]), torch.ones(2))


def test_scores_of_a_prediction_are_those_of_its_logits():
    logits, labels = drawn(1)
    prediction = Prediction(logits.view(20, 10, 5), torch.zeros(20, 10), 3)
    assert prediction.scores(labels.int().view(20, 10)) == {
        name: getattr(uncertainty, name)(logits, labels)
        for name in ("error", "nll", "brier", "ece")
    }
    with pytest.raises(ArgumentError, match=r"labels have shape \(200,\)"):
        prediction.scores(labels)


def test_scores_of_real_numbers():
    torch.manual_seed(0)
    mean, within, between = torch.randn(3, 50, 2, dtype=torch.float64).unbind()
    prediction = GaussianPrediction(mean, within**2, between**2, 2)
    targets = torch.randn(50, 2)
    normal = torch.distributions.Normal(mean, (within**2 + between**2).sqrt())
    scores = prediction.scores(targets)
    assert math.isclose(scores["nll"], -float(normal.log_prob(targets.double()).mean()))
    assert math.isclose(scores["rmse"], float((targets - mean).square().mean().sqrt()))
    certain = GaussianPrediction(mean, torch.zeros_like(mean), torch.zeros_like(mean), 1)
    assert certain.scores(targets)["nll"] == math.inf
    with pytest.raises(ArgumentError, match="targets"):
        prediction.scores(targets[:, 0])
