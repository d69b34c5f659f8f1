"""Each metric against a twin of a few obvious float64 lines, and against torchmetrics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.errors import ArgumentError, NonFiniteError, PolyakWarning
from polyak.study.metrics import (
    auroc,
    best_temperature,
    brier,
    ece,
    entropy,
    error,
    nll,
    reliability,
)


def predictions(seed, n=400, k=10, sharpness=3.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k)) * sharpness
    logits[np.arange(n), labels] += sharpness
    return torch.from_numpy(logits).float(), torch.from_numpy(labels)


def probabilities(logits, temperature=1.0):
    z = logits.double().numpy() / temperature
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def slow_nll(logits, labels, temperature=1.0):
    p = probabilities(logits, temperature)
    return -np.mean([math.log(p[i, y]) for i, y in enumerate(labels.tolist())])


def slow_ece(logits, labels, n_bins=15):
    p = probabilities(logits)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels.numpy()
    total = 0.0
    for b in range(n_bins):
        inside = (confidence > b / n_bins) & (confidence <= (b + 1) / n_bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@given(st.integers(0, 10_000), st.floats(0.1, 20.0))
@settings(max_examples=30, deadline=None)
def test_metrics_equal_their_slow_twins(seed, sharpness):
    logits, labels = predictions(seed, n=100, k=5, sharpness=sharpness)
    assert error(logits, labels) == pytest.approx(
        np.mean(probabilities(logits).argmax(1) != labels.numpy()), abs=1e-15
    )
    assert nll(logits, labels) == pytest.approx(slow_nll(logits, labels), rel=1e-10)
    assert nll(logits, labels, temperature=2.5) == pytest.approx(
        slow_nll(logits, labels, 2.5), rel=1e-10
    )
    assert ece(logits, labels) == pytest.approx(slow_ece(logits, labels), abs=1e-12)


def test_calibration_error_is_that_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = predictions(3)
    theirs = functional.multiclass_calibration_error(
        logits.double().softmax(1), labels, num_classes=10, n_bins=15
    )
    assert ece(logits, labels) == pytest.approx(float(theirs), abs=1e-6)


def test_reliability_of_known_predictions():
    # Four examples at confidence 0.75, three right; two at 0.55, none right.
    logits = torch.tensor([[0.75, 0.25]] * 4 + [[0.55, 0.45]] * 2).double().log()
    bins = reliability(logits, torch.tensor([0, 0, 0, 1, 1, 1]), n_bins=10)
    assert bins.count == (0, 0, 0, 0, 0, 2, 0, 4, 0, 0)
    assert bins.accuracy[7] == 0.75
    assert bins.accuracy[5] == 0
    assert bins.confidence[7] == pytest.approx(0.75, abs=1e-12)
    assert bins.ece == pytest.approx((4 * 0 + 2 * 0.55) / 6, abs=1e-7)


def test_the_best_temperature_is_where_the_likelihood_is_flat():
    logits, labels = predictions(1, sharpness=6.0)
    best = best_temperature(logits, labels)
    here = slow_nll(logits, labels, best)
    assert best > 1  # these logits are far too sure
    assert all(here <= slow_nll(logits, labels, best * f) for f in (0.9, 0.999, 1.001, 1.1))


def test_temperature_undoes_a_scale():
    logits, labels = predictions(2)
    assert best_temperature(3 * logits, labels) == pytest.approx(
        3 * best_temperature(logits, labels), rel=1e-6
    )


def test_a_classifier_that_is_right_everywhere_is_sharpened_until_nothing_is_gained():
    labels, logits = torch.tensor([0, 1, 2]), 5 * torch.eye(3)
    temperature = best_temperature(logits, labels)
    assert 1e-3 <= temperature < 0.2
    assert nll(logits, labels, temperature=temperature) < 1e-15


def test_what_does_not_fit_is_refused():
    logits = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"expected \(n, k\) and \(n,\)"):
        nll(logits, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ArgumentError, match="labels range from 0 to 4"):
        error(logits, torch.tensor([0, 1, 4]))
    with pytest.raises(ArgumentError, match="temperature is 0"):
        nll(logits, torch.tensor([0, 1, 2]), temperature=0.0)
    with pytest.raises(NonFiniteError, match="diverged"):
        ece(torch.full((1, 2), math.nan), torch.tensor([0]))


READ_OUTS = [error, nll, brier, ece, reliability, best_temperature]


@pytest.mark.parametrize("read_out", READ_OUTS)
@pytest.mark.parametrize("form", [np.asarray, lambda x: x.tolist()])
def test_arrays_and_lists_are_what_tensors_are(read_out, form):
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 3).double(), torch.randint(0, 3, (20,))
    assert read_out(form(logits), form(labels)) == read_out(logits, labels)
    assert auroc(form(logits[0]), form(logits[1])) == auroc(logits[0], logits[1])


@pytest.mark.parametrize("read_out", [*READ_OUTS, lambda logits, labels: entropy(logits)])
def test_probabilities_are_told_from_logits(read_out):
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 3), torch.randint(0, 3, (20,))
    with pytest.warns(PolyakWarning, match="look like probabilities"):
        read_out(logits.softmax(1).half(), labels)
    read_out(logits, labels)  # where a warning would be an error
    read_out(logits.softmax(1).log(), labels)


@pytest.mark.parametrize("wrong", ["abc", [[1.0, 2.0], [3.0]], None, {}])
def test_what_is_no_tensor_is_refused(wrong):
    with pytest.raises(ArgumentError, match="expected a tensor, or what one can be made of"):
        nll(wrong, torch.tensor([0]))


def test_entropy_has_a_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    entropy(logits).sum().backward()
    assert logits.grad.abs().sum() > 0
