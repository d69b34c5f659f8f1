"""SWAD and two-tailed averaging, live, against twins that keep every weight in float64."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from reference import overfit_window as slow
from torch import nn

import polyak
from polyak.errors import ArgumentError, FormatError, MismatchError, NonFiniteError, UsageError
from polyak.study import OverfitWindow

RULES = [(3, 6, 1.3), (1, 1, 1.0), (2, 5, 1.1), (4, 2, 1.2), (3, 1, 1.0), (1, 4, 1.5)]


def random_losses(seed, length=40):
    """A valley with noise; some have no end, some none of a beginning for long."""
    generator = np.random.default_rng(seed)
    time = np.linspace(-1 if seed % 2 else -0.1, 1, length)
    return np.abs(1 + (1 + seed % 3) * time**2 + 0.2 * generator.standard_normal(length)) + 0.01


@pytest.mark.parametrize("rule", RULES)
def test_the_window_is_that_of_the_printed_algorithm(rule):
    ended = 0
    for seed in range(60):
        losses = random_losses(seed).tolist()
        for length in (0, 1, 5, 20, 40):
            begins, ends = slow.swad_window(losses[:length], *rule)
            found = OverfitWindow(*rule).of(losses[:length])
            assert found == (begins and begins - 1, ends and ends - 1)
            ended += ends is not None
    assert ended > 10


def train(model, seed, steps, generator=None):
    """So many weights, one after another."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
                        parameter
                    )
                )
        yield np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])


def averaged(average):
    return np.concatenate([t.double().numpy().ravel() for t in average.averaged_tensors().values()])


def lengths(seed, count):
    return np.random.default_rng(100 + seed).integers(1, 6, count).tolist()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_swad_is_the_mean_of_its_window_after_every_loss(rule, seed):
    model = nn.Linear(3, 2)
    n_start, n_end, tolerance = rule
    swad = polyak.SWAD(model, n_start=n_start, n_end=n_end, tolerance=tolerance)
    losses, segments = random_losses(seed, 25).tolist(), []
    for i, (loss, steps) in enumerate(zip(losses, lengths(seed, 25), strict=True)):
        rows = []
        for row in train(model, 50 * seed + i, steps):
            rows.append(row)
            swad.update()
        segments.append(rows)
        swad.score(loss)
        expected = slow.swad_mean(segments, losses[: i + 1], *rule)
        np.testing.assert_allclose(averaged(swad.average), expected, rtol=2e-5, atol=2e-6)
        begins, ends = slow.swad_window(losses[: i + 1], *rule)
        if begins is not None:
            assert swad.average.count == sum(map(len, segments[begins - 1 : ends or i + 1]))
    assert len(swad._newer) <= max(n_start, n_end)


def test_segments_of_many_updates_are_joined_with_their_open_blocks():
    model = nn.Linear(1, 1, bias=False)
    swad = polyak.SWAD(model, n_start=1, n_end=1, tolerance=9.0)
    for score in range(3):
        for step in range(1500):
            model.weight.data.fill_(1500 * score + step)
            swad.update()
        swad.score(1.0)
        found = swad.average.averaged_tensors()["weight"].item()
        assert found == pytest.approx((1500 * (score + 1) - 1) / 2, rel=1e-5)


class Scorer:
    def __init__(self, target):
        self.target = target

    def of(self, vector):
        return float(((vector - self.target) ** 2).sum())

    def __call__(self, model):
        assert not model.training
        return self.of(np.concatenate([p.double().numpy().ravel() for p in model.parameters()]))


@pytest.mark.parametrize("every", [1, 3, 7])
@pytest.mark.parametrize("minimize", [True, False])
def test_two_tails_begin_where_the_printed_algorithm_has_them(every, minimize):
    model, scorer = nn.Linear(3, 2).double(), Scorer(0.3)
    tails = polyak.TwoTailed(model, minimize=minimize)
    sign = 1 if minimize else -1
    weights, taken = [], 0
    for step in range(1, 61):
        noise = torch.randn(8, generator=torch.Generator().manual_seed(step)).split([6, 2])
        with torch.no_grad():
            for parameter, one in zip(model.parameters(), noise, strict=True):
                parameter.copy_(0.3 + 2 * 0.8**step + 0.2 * one.view_as(parameter))
        weights.append(np.concatenate([p.detach().numpy().ravel() for p in model.parameters()]))
        tails.update()
        if step % every == 0:
            taken += tails.score(lambda m: sign * scorer(m))
            begins = slow.two_tailed_begins(np.array(weights), every, scorer.of)[-1]
            np.testing.assert_allclose(
                averaged(tails.average), np.mean(weights[begins:], axis=0), atol=1e-12
            )
            assert tails.average.count == step - begins
    assert taken > 2
    assert model.training


@pytest.mark.parametrize("kind", ["swad", "two-tailed"])
def test_both_resume_from_a_file(kind):
    def made():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, polyak.SWAD(
            model, n_start=2, n_end=3
        ) if kind == "swad" else polyak.TwoTailed(model)

    def go_on(model, one, epochs):
        for epoch in epochs:
            for _ in train(model, epoch, 4):
                one.update()
            if kind == "swad":
                one.score(random_losses(4, 30)[epoch])
            else:
                one.score(Scorer(0.1))

    for stopped in (1, 5, 12, 25):
        model, whole = made()
        go_on(model, whole, range(stopped))
        file = io.BytesIO()
        torch.save((model.state_dict(), whole.state_dict()), file)
        go_on(model, whole, range(stopped, 30))
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        again, resumed = made()
        again.load_state_dict(weights)
        resumed.load_state_dict(state)
        go_on(again, resumed, range(stopped, 30))
        assert np.array_equal(averaged(resumed.average), averaged(whole.average))
        assert resumed.average.count == whole.average.count


@pytest.mark.parametrize("kind", ["swad", "two-tailed"])
def test_both_follow_an_optimizer_and_bring_their_statistics(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [torch.randn(64, 3)]
    one = polyak.SWAD(model, n_start=1) if kind == "swad" else polyak.TwoTailed(model)
    one.attach(optimizer)
    for step in range(20):
        optimizer.zero_grad()
        model(data[0]).square().mean().backward()
        optimizer.step()
        if step % 5 == 4:
            if kind == "swad":
                one.score(1.0)
            else:
                one.score(lambda m: m(data[0]).square().mean(), data)
    one.average.update_bn(data)
    own = model[1].running_mean.clone()
    with one.average.applied():
        inside = model[0](data[0]).mean(0)
        torch.testing.assert_close(model[1].running_mean, inside)
    assert torch.equal(model[1].running_mean, own)
    one.detach()
    before = one.average.count
    optimizer.step()
    assert one.average.count == before


def test_an_ended_window_takes_no_more_weights():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swad = polyak.SWAD(model, n_start=1, n_end=1, tolerance=1.0)
    swad.attach(optimizer)
    for loss in (1.0, 2.0, 3.0):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        swad.score(loss)
    assert swad.ended
    assert swad.window == (0, 0)
    assert swad.average.count == 1
    assert swad.losses == [1.0, 2.0, 3.0]


def test_a_loss_that_is_not_finite_begins_no_window_and_ends_one():
    nan, inf = float("nan"), float("inf")
    assert OverfitWindow(2, 2).of([nan, nan, 1.0, nan, 1.0, 2.0]) == (4, None)
    assert OverfitWindow(2, 2).of([1.0, 1.0, nan, inf]) == (0, 1)


def test_a_tail_without_a_score_loses():
    tails = updated(polyak.TwoTailed(nn.Linear(1, 1)))
    assert not tails.choose(float("nan"), 1.0)
    assert tails.choose(1.0, float("nan"))


def updated(one):
    one.update()
    return one


MODEL = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: polyak.SWAD(MODEL, n_start=0), ArgumentError, "n_start is 0"),
        (lambda: polyak.SWAD(MODEL, n_end=1.5), ArgumentError, "n_end is 1.5"),
        (lambda: polyak.SWAD(MODEL, tolerance=0.9), ArgumentError, "tolerance is 0.9; expected a factor"),
        (lambda: polyak.SWAD(MODEL, tolerance=float("nan")), ArgumentError, "tolerance is nan"),
        (lambda: polyak.SWAD(MODEL).score(1.0), UsageError, "No weights were taken since the last score"),
        (lambda: updated(polyak.SWAD(MODEL)).score("low"), ArgumentError, "The score is a str"),
        (lambda: updated(polyak.SWAD(MODEL, n_start=1)).score(-1.0), ArgumentError, "The losses -1 are not positive"),
        (lambda: polyak.SWAD(MODEL).load_state_dict({}), FormatError, "not a state of SWAD"),
        (lambda: polyak.SWAD(MODEL).load_state_dict(polyak.SWAD(MODEL, n_end=2).state_dict()), ArgumentError, "n_end=2"),
        (lambda: polyak.SWAD(MODEL).load_state_dict(updated(polyak.SWAD(nn.Linear(2, 2))).state_dict()), MismatchError, "weight"),
        (lambda: polyak.TwoTailed(MODEL).score(lambda m: 0.0), UsageError, "No weights were taken since the short"),
        (lambda: updated(polyak.TwoTailed(MODEL)).score(lambda m: None), ArgumentError, "The score is a NoneType"),
        (lambda: updated(polyak.TwoTailed(MODEL)).score(lambda m: float("nan")), NonFiniteError, "Both averages"),
        (lambda: polyak.TwoTailed(MODEL).load_state_dict([]), FormatError, "not a state of two-tailed"),
        (lambda: polyak.TwoTailed(MODEL).load_state_dict(polyak.TwoTailed(MODEL, minimize=False).state_dict()), ArgumentError, "minimize=False"),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_refused_score_loses_nothing():
    model = nn.Linear(1, 1)
    swad = polyak.SWAD(model, n_start=1)
    swad.update()
    with pytest.raises(ArgumentError, match="not positive"):
        swad.score(-1.0)
    swad.score(1.0)
    assert (swad.losses, swad.average.count) == ([1.0], 1)
