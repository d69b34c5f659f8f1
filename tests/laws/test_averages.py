"""Every average of every kind of model goes through the same laws."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from reference import averages as reference
from reference.models import MODELS
from torch import nn

import polyak
from polyak import EMA, SWA, After, Average, Averages, PolynomialEMA, PowerEMA, Window
from polyak.errors import PolyakError
from polyak.tensors.rounding import rounded_for

PROFILES = {
    "swa": SWA(),
    "ema": EMA(decay=0.9),
    "ema keeping the first": EMA(decay=0.9, keep_initial=True),
    "slow ema, in blocks": EMA(decay=0.99999, keep_initial=True),
    "power": PowerEMA(gamma=6.94),
    "polynomial": PolynomialEMA(c=1, k=0.5),
    "slow polynomial, in blocks": PolynomialEMA(c=1e-4, k=0.3),
    "window": Window(length=7),
    "after": After(5, SWA()),
    "window after": After(4, Window(length=6)),
}


cases = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())

STEPS = [1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 0.5, 2.5, 1.0, 1.0, 4.0, 1.0]


def shake(model, seed):
    """New weights, as a step of training would make them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            kind = {"dtype": torch.float64, "device": "cpu"}  # wherever the model is
            noise = torch.randn(parameter.shape, generator=generator, **kind)
            parameter.copy_(noise.to(parameter.dtype))


def first(model):
    return next(model.parameters())


def run(model, average, steps=STEPS, offset=0):
    """Update after each step; give the times and the weights that were seen."""
    seen = []
    for index, dt in enumerate(steps):
        shake(model, offset + index)
        average.update(dt)
        seen.append(first(model).detach().clone())
    return seen


def times_of(profile, steps=STEPS):
    start = -steps[0] if profile.initial_mass(0.0) == 1 else 0.0
    times = []
    for dt in steps:
        start += dt
        times.append(start)
    return times


def tolerance(dtype):
    exact = {torch.float64: 1e-12, torch.float32: 1e-6, torch.complex64: 1e-6}
    return exact.get(dtype, 2 * torch.finfo(dtype).eps)


def bits(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
        assert a[name].dtype == b[name].dtype


def assert_same_state(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


@cases
@models
def test_it_is_the_weighted_sum_of_what_was_seen(profile, make):
    model = make()
    average = Average(model, profile)
    seen = run(model, average)
    expected = reference.average(profile, seen, times_of(profile))
    name = next(n for n, _ in model.named_parameters())
    found = average.averaged_tensors()[name]
    limit = tolerance(found.dtype)
    assert (found.to(expected.dtype) - expected).abs().max() <= limit * expected.abs().max().clamp(
        min=1
    )


@cases
@models
def test_constant_weights_are_a_fixed_point(profile, make):
    model = make()
    average = Average(model, profile)
    for dt in STEPS:
        shake(model, 0)
        average.update(dt)
    assert_same_bits(
        {n: p.detach() for n, p in model.named_parameters()},
        {n: average.averaged_tensors()[n] for n, _ in model.named_parameters()},
    )


@cases
@models
def test_applied_gives_everything_back_to_the_bit(profile, make):
    model = make()
    average = Average(model, profile)
    run(model, average)
    before, pointers = bits(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    own = average.averaged_tensors()
    for in_place in (False, True):
        with pytest.raises(ZeroDivisionError), average.applied(in_place=in_place):
            assert_same_bits(bits(model.state_dict()), own)
            assert_same_bits(average.averaged_tensors(), own)
            raise ZeroDivisionError
        assert_same_bits(before, bits(model.state_dict()))
        assert pointers == [p.data_ptr() for p in model.parameters()]
        assert_same_bits(average.averaged_tensors(), own)


@cases
@models
def test_saved_loaded_and_continued_is_bitwise_the_run_without_a_pause(profile, make):
    model = make()
    average = Average(model, profile)
    run(model, average)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    again = make()
    other = Average(again, profile)
    other.load_state_dict(torch.load(file, weights_only=True))
    run(model, average, offset=100)
    run(again, other, offset=100)
    assert_same_bits(average.averaged_tensors(), other.averaged_tensors())
    assert (average.time, average.count) == (other.time, other.count)


@cases
def test_splitting_a_step_of_time_in_two_changes_nothing(profile):
    model = nn.Linear(3, 4)
    whole, split = Average(model, profile), Average(model, profile)
    for index, dt in enumerate(STEPS):
        shake(model, index)
        whole.update(dt)
        split.update(dt / 2)
        if index or profile.initial_mass(0.0) == 0:  # the first of those is a moment, no interval
            split.update(dt / 2)
    for a, b in zip(
        whole.averaged_tensors().values(), split.averaged_tensors().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@cases
def test_it_commutes_with_affine_maps(profile):
    models = [nn.Linear(3, 4).double() for _ in range(2)]
    pair = [Average(model, profile) for model in models]
    for index, dt in enumerate(STEPS):
        shake(models[0], index)
        with torch.no_grad():
            for a, b in zip(*(m.parameters() for m in models), strict=True):
                b.copy_(3 * a - 2)
        for average in pair:
            average.update(dt)
    for a, b in zip(*(x.averaged_tensors().values() for x in pair), strict=True):
        torch.testing.assert_close(3 * a - 2, b, rtol=0, atol=1e-12)


@models
def test_several_together_are_each_the_one_alone(make):
    model = make()
    together = Averages(model, PROFILES)
    alone = {name: Average(model, profile) for name, profile in PROFILES.items()}
    for index, dt in enumerate(STEPS):
        shake(model, index)
        together.update(dt)
        for average in alone.values():
            average.update(dt)
    for name, average in together.items():
        assert_same_bits(average.averaged_tensors(), alone[name].averaged_tensors())


@cases
def test_reading_an_average_never_changes_it(profile):
    model = nn.Linear(3, 4)
    quiet, read = Average(model, profile), Average(model, profile)
    for index, dt in enumerate(STEPS):
        shake(model, index)
        for average in (quiet, read):
            average.update(dt)
        if read.count:
            read.averaged_tensors()
            read.metrics()
            with read.applied(check=True):
                pass
    assert_same_bits(quiet.averaged_tensors(), read.averaged_tensors())


@cases
def test_a_refused_update_changes_nothing(profile):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    average = Average(model, profile, nonfinite="raise")
    run(model, average)
    before = copy.deepcopy(average.state_dict())
    kept = model[1]
    bad_dts = [0.0, -1.0, float("nan"), float("inf")]
    for dt in bad_dts:
        with pytest.raises(polyak.PolyakError, match="dt is"):
            average.update(dt)
    model[1] = nn.Linear(5, 2)
    with pytest.raises(PolyakError, match=r"1\.weight: 2x5"):
        average.update()
    model[1] = kept
    with torch.no_grad():
        saved = kept.bias.clone()
        kept.bias[0] = float("nan")
    with pytest.raises(polyak.PolyakError, match=r"1\.bias"):
        average.update()
    with torch.no_grad():
        kept.bias.copy_(saved)
    assert_same_state(before, average.state_dict())


def test_agrees_with_torchs_own_where_both_exist():
    from torch.optim import swa_utils

    model = nn.Linear(3, 4)
    theirs = {
        "swa": swa_utils.AveragedModel(model),
        "ema": swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)),
    }
    ours = Averages(model, {"swa": SWA(), "ema": EMA(decay=0.9, keep_initial=True)})
    for index in range(20):
        shake(model, index)
        ours.update()
        for average in theirs.values():
            average.update_parameters(model)
    for name, average in theirs.items():
        for key, value in average.module.state_dict().items():
            torch.testing.assert_close(ours[name].averaged_tensors()[key], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(
    "profile", [EMA(decay=0.9999, keep_initial=True), Window(3), SWA()], ids=str
)
def test_large_tensors_are_computed_in_pieces_to_the_same_bits(profile, dtype):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            shapes = [(600, 700), (1, 3, 500, 300), (2, 200_000), (300_001,)]
            self.p = nn.ParameterList(torch.randn(*shape, dtype=dtype) for shape in shapes)
            last = torch.randn(64, 64, 10, 10, dtype=dtype)
            self.p.append(last.to(memory_format=torch.channels_last))

    model = Large()
    average = Average(model, profile)
    for seed in range(4):
        shake(model, seed)
        average.update()
    member = average._member
    found = average.averaged_tensors()
    for index, name in enumerate(member.tracker.tensors.names):
        whole = member.accumulator.value(index, member.clock)
        expected = rounded_for(member.tracker.tensors.live[index], whole).to(found[name])
        assert torch.equal(found[name], expected), name
        assert found[name].stride() == member.tracker.tensors.live[index].stride()
    with average.applied():
        assert all(torch.equal(p, found[n]) for n, p in model.named_parameters())
