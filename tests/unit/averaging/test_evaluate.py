"""The raw weights and every average on one function."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from polyak import EMA, SWA, After, Average, Averages, evaluate_averages
from polyak.errors import ArgumentError

# These networks have BatchNorm layers whose statistics nobody refreshes.
pytestmark = pytest.mark.filterwarnings("ignore::polyak.errors.StaleStatistics")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def averaged(profiles):
    model = net()
    averages = Averages(model, profiles)
    for seed in range(4):
        torch.manual_seed(seed)
        model(torch.randn(8, 3))
        for p in model.parameters():
            nn.init.normal_(p)
        averages.update()
    return model, averages


X = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


def test_each_is_what_evaluating_it_by_hand_gives():
    model, averages = averaged({"swa": SWA(), "ema": EMA(0.5), "late": After(99, SWA())})

    def evaluate(model):
        model.eval()
        return {"loss": model(X).square().mean(), "first": model[0].weight[0, 0]}

    result = evaluate_averages(averages, evaluate)
    assert model.training
    assert list(result.scores) == ["raw", "swa", "ema", "late"]
    assert result["late"] == {}
    for name in ("swa", "ema"):
        with averages[name].applied():
            by_hand = {k: v.item() for k, v in evaluate(model).items()}
            model.train()
        assert result[name] == by_hand
    assert result["raw"]["first"] == model[0].weight[0, 0].item()
    assert result.values["ema/loss"] == result["ema"]["loss"]
    assert "late/loss" not in result.values
    lines = str(result).splitlines()
    assert lines[0].split() == ["loss", "first"]
    assert lines[-1].split() == ["late", "empty"]


def test_all_see_the_same_noise_and_it_is_given_back():
    model, averages = averaged({"swa": SWA(), "ema": EMA(0.5)})
    drawn = []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    evaluate_averages(averages, lambda: drawn.append(torch.rand(3)) or model(X).mean())
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(drawn[0], one) for one in drawn)
    assert len(drawn) == 3
    with pytest.raises(ZeroDivisionError):
        evaluate_averages(averages, lambda m: (m.eval(), torch.rand(1), 1 / 0))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_statistics_are_refreshed_on_the_loader_for_each():
    batches = [torch.randn(8, 3, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    model, averages = averaged({"swa": SWA(), "ema": EMA(0.5)})
    own = model[1].running_mean.clone()
    seen = []
    evaluate_averages(
        averages,
        lambda m: seen.append(m[1].running_mean.clone()) or 0.0,
        update_bn=[{"x": batch} for batch in batches],
        batches=2,
        forward=lambda m, batch: m(batch["x"]),
    )
    assert torch.equal(seen[0], own)
    assert torch.equal(model[1].running_mean, own)
    for name, found in zip(("swa", "ema"), seen[1:], strict=True):
        first = averages[name].averaged_tensors()
        expected = torch.cat(batches[:2]) @ first["0.weight"].T + first["0.bias"]
        torch.testing.assert_close(found, expected.mean(0), rtol=1e-5, atol=1e-6)


def test_one_average_a_list_and_a_dict():
    model = nn.Linear(2, 1)
    one, other = Average(model, SWA()), Average(model, EMA(0.9))
    one.update()
    other.update()
    for given, names in (
        (one, ["raw", "swa"]),
        ([one, other], ["raw", "swa", "ema:decay=0.9"]),
        ([one, one], ["raw", "swa (1)", "swa (2)"]),
        ({"mine": one}, ["raw", "mine"]),
    ):
        assert list(evaluate_averages(given, lambda: 1).values) == names
    assert list(evaluate_averages({"raw": one}, lambda m: 1, raw="weights").values) == [
        "weights",
        "raw",
    ]
    assert math.isnan(evaluate_averages(one, lambda: math.nan).values["swa"])


def test_bad_input_is_refused_by_what_it_is():
    model = nn.Linear(2, 1)
    one = Average(model, SWA())
    one.update()
    for arguments, message in (
        (({}, lambda: 1), "takes an Average, Averages"),
        ((model, lambda: 1), "takes an Average, Averages"),
        (([SWA()], lambda: 1), "takes an Average, Averages"),
        (({"raw": one}, lambda: 1), "pass raw="),
        (([one, Average(nn.Linear(2, 1), SWA())], lambda: 1), "different models"),
        ((one, model), "expected a function"),
        ((one, 3), "expected a function"),
        ((one, lambda: "good"), "expected a number"),
        ((one, lambda: None), "expected a number"),
        ((one, lambda: {"a": [1, 2]}), "expected a number"),
    ):
        with pytest.raises(ArgumentError, match=message):
            evaluate_averages(*arguments)
    with pytest.raises(ArgumentError, match="read only once"):
        evaluate_averages(one, lambda: 1, update_bn=iter([X]))
