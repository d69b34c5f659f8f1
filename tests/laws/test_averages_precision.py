"""However small the share gets, float32 accumulators agree with float64: asked for is 1e-5 relative, held is 2e-6."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polyak import EMA, SWA, Average, Averages

N_VALUES = 16

RUNS = [(EMA(decay=0.9999), 20_000), (EMA(decay=0.99999), 100_000), (SWA(), 200_000)]
ids = ["ema 0.9999", "ema 0.99999", "mean of 200,000"]


class Weights(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(N_VALUES, dtype=dtype))


def smooth_drift(n_steps):
    """Weights that drift slowly, each at its own pace: what stalls a float32 accumulator."""
    pace = torch.linspace(0.005, 0.02, N_VALUES, dtype=torch.float64)
    return (1 + torch.linspace(0, 1, n_steps, dtype=torch.float64)[:, None] * pace).float()


def noisy_bfloat16(n_steps):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n_steps, N_VALUES, generator=generator)
    return (torch.linspace(1, 2, N_VALUES) + 0.1 * noise).bfloat16()


def twin(profile, series):
    """The same average in float64: every weight kept, each with its share."""
    first = 0 if profile.initial_mass(0.0) == 1 else 1
    shares = torch.from_numpy(profile.weights(range(first, len(series) + first)))
    return shares @ series.double()


@pytest.mark.parametrize(("profile", "n_steps"), RUNS, ids=ids)
def test_smooth_drift(profile, n_steps):
    assert relative_error(profile, n_steps, smooth_drift, torch.float32) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_drift(dtype):
    """Few enough updates for an interpreter, and six folds."""
    series = {torch.float32: smooth_drift, torch.bfloat16: noisy_bfloat16}[dtype]
    profile = EMA(decay=0.9999, keep_initial=True)  # in blocks from the second update on
    assert relative_error(profile, 400, series, dtype) < 1e-6


def test_noisy_bfloat16():
    assert relative_error(EMA(decay=0.9999), 20_000, noisy_bfloat16, torch.bfloat16) < 2e-6


def relative_error(profile, n_steps, series, dtype):
    model = Weights(dtype)
    average = Average(model, profile)
    values = series(n_steps)
    with torch.no_grad():
        for value in values:
            model.w.copy_(value)
            average.update()
    (accumulated,) = (average._member.accumulator.value(i, average._member.clock) for i in range(1))
    expected = twin(profile, values)
    return float(((accumulated - expected).abs() / expected.abs()).max())


def test_a_profile_that_crosses_into_blocks_and_irregular_steps():
    model = Weights(torch.float32)
    together = Averages(model, {"float32": SWA()}), Average(model, SWA(), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for step in range(9000):  # equal steps reach a share of 2^-12 after 4,096
        model.w.detach().fill_(1 + step / 9000)
        dt = float(torch.rand((), generator=generator)) * 2 + 0.01
        for average in together:
            average.update(dt)
    ours, exact = (
        together[0]["float32"].averaged_tensors()["w"],
        together[1].averaged_tensors()["w"],
    )
    torch.testing.assert_close(ours, exact, rtol=2e-6, atol=0)


def test_blocks_are_needed(monkeypatch):
    """Without them the same run is off by far more: the law above can fail."""
    from polyak.averaging import accumulators

    monkeypatch.setattr(accumulators, "SMALLEST_SHARE", 0.0)
    assert relative_error(EMA(decay=0.9999), 20_000, smooth_drift, torch.float32) > 1e-4


def test_constant_weights_stay_constant_through_many_blocks():
    model = Weights(torch.float32)
    averages = Averages(model, {"ema": EMA(decay=0.9999), "swa": SWA()})
    with torch.no_grad():
        model.w.copy_(torch.linspace(0.1, 3, N_VALUES))
    for _ in range(12_000):
        averages.update()
    for average in averages.values():
        torch.testing.assert_close(
            average.averaged_tensors()["w"], model.w.detach(), rtol=2e-7, atol=0
        )


def test_a_block_is_folded_when_a_long_step_makes_the_share_large():
    model = Weights(torch.float32)
    profile = EMA(decay=0.9999, keep_initial=True)
    pair = Average(model, profile), Average(model, profile, dtype=torch.float64)
    for step, dt in enumerate([1.0] * 50 + [5000.0] + [1.0] * 50 + [1e6, 1.0]):
        with torch.no_grad():
            model.w.fill_(1 + step)
        for average in pair:
            average.update(dt)
        ours, exact = (average.averaged_tensors()["w"] for average in pair)
        torch.testing.assert_close(ours, exact, rtol=3e-7, atol=0)
