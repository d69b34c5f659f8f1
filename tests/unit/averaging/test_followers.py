"""An average that feeds another module, and one that is written back into its own."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from reference.models import Tied
from torch import nn

from polyak import EMA, SWA, After, Average, Averages, PowerEMA, Window
from polyak.errors import ArgumentError, MismatchError, NonFiniteError, UsageError

# These networks have BatchNorm layers whose statistics nobody refreshes.
pytestmark = pytest.mark.filterwarnings("ignore::polyak.errors.StaleStatistics")

PROFILES = {
    "swa": SWA(),
    "ema": EMA(0.9),
    "keeping the first": EMA(0.9, keep_initial=True),
    "in blocks": EMA(0.9999, keep_initial=True),
    "power": PowerEMA(6.94),
    "window": Window(3),
}
every_profile = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())


class Online(nn.Module):
    """BYOL's: the target has no predictor."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.predictor = nn.Linear(4, 4)


class Target(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def shake(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(model, optimizer, seeds):
    for seed in seeds:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@every_profile
@pytest.mark.parametrize("make", [net, Online, lambda: nn.Linear(3, 2).double()])
def test_it_is_what_copy_to_would_write(profile, make):
    model, follower, copied = make(), make(), make()
    average = Average(model, profile)
    average.follower(follower, buffers=True)
    for seed in range(70):  # beyond the fold of a block
        shake(model, seed)
        average.update()
        if seed % 23 == 0 or seed > 62:
            average.copy_to(copied)
            assert equal(follower.state_dict(), copied.state_dict()), seed


@every_profile
def test_members_have_followers_of_their_own(profile):
    model = net()
    averages = Averages(model, {"other": SWA(), "this": profile})
    alone = Average(model, profile)
    followers = {"other": net(), "this": net()}
    for name, module in followers.items():
        averages[name].follower(module)
    for seed in range(5):
        shake(model, seed)
        averages.update()
        alone.update()
    own = alone.averaged_tensors()
    assert all(torch.equal(own[n], p) for n, p in followers["this"].named_parameters())


def test_an_empty_average_leaves_it_as_it_is():
    model = net()
    for profile in (SWA(), After(5, EMA(0.9))):
        teacher = net()
        before = copy.deepcopy(teacher.state_dict())
        average = Average(model, profile)
        average.follower(teacher, buffers=True)
        if profile != SWA():
            average.update()
        assert average.empty
        assert equal(before, teacher.state_dict())


def test_steps_that_only_the_device_knows_to_be_skipped_feed_nothing():
    model, teacher = net(), net()
    before = copy.deepcopy(teacher.state_dict())
    average = Average(model, EMA(0.9999))
    average.follower(teacher, buffers=True)
    average.write_back(every=1)
    own = copy.deepcopy(model.state_dict())
    average.update(real=torch.tensor(0.0))
    assert equal(before, teacher.state_dict())
    assert equal(own, model.state_dict())
    for _ in range(3):
        average.update(real=torch.tensor(1.0))
        average.update(real=torch.tensor(0.0))
    assert torch.equal(teacher[0].weight, average.averaged_tensors()["0.weight"])


def test_one_that_comes_later_is_set_at_once_and_ends_with_remove():
    model, teacher = net(), net()
    average = Average(model, SWA())
    average.update()
    with average.follower(teacher) as follower:
        assert torch.equal(teacher[0].weight, model[0].weight)
        assert follower.module is teacher
    before = copy.deepcopy(teacher.state_dict())
    shake(model, 1)
    average.update()
    follower.remove()
    assert equal(before, teacher.state_dict())


def test_freezing_and_evaluation_mode_on_request():
    model = net()
    plain, asked = net(), net()
    average = Average(model, SWA())
    average.follower(plain)
    average.follower(asked, freeze=True, evaluation=True)
    assert all(p.requires_grad for p in plain.parameters())
    assert plain.training
    assert not any(p.requires_grad for p in asked.parameters())
    assert not asked.training
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_buffers_only_on_request():
    model, plain, asked = net(), net(), net()
    average = Average(model, SWA())
    average.follower(plain)
    average.follower(asked, buffers=True)
    shake(model, 0)
    model[1].num_batches_tracked.fill_(7)
    average.update()
    assert plain[1].running_mean.count_nonzero() == 0
    assert torch.equal(asked[1].running_mean, model[1].running_mean)
    assert int(asked[1].num_batches_tracked) == 7


def test_a_part_by_its_own_names_or_by_the_name_of_the_part():
    model, target, encoder = Online(), Target(), copy.deepcopy(Online().encoder)
    average = Average(model, SWA())
    average.follower(target)
    average.follower(encoder, part="encoder")
    shake(model, 0)
    average.update()
    for other in (target.encoder, encoder):
        assert torch.equal(other[0].weight, model.encoder[0].weight)
    for part in ("decoder", "", 3, "encoder."):
        with pytest.raises(ArgumentError, match="expected the name of a module in the model"):
            average.follower(encoder, part=part)
    with pytest.raises(ArgumentError, match=r"part='encoder'"):
        average.follower(encoder)


def test_a_teacher_that_is_a_part_of_the_model():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(2, 1)
            self.teacher = nn.Linear(2, 1)

    model = Both()
    with pytest.raises(ArgumentError, match="averaged parameters of the model itself"):
        Average(model, SWA()).follower(model.teacher, part="student")
    average = Average(model, SWA(), exclude="teacher*")
    average.follower(model.teacher, part="student", freeze=True)
    for seed in range(3):
        shake(model, seed)
        average.update()
    assert torch.equal(model.teacher.weight, average.averaged_tensors()["student.weight"])


def test_another_dtype_gets_the_average_in_its_own_precision():
    model = nn.Linear(3, 2).bfloat16()
    wide, narrow = nn.Linear(3, 2), nn.Linear(3, 2).half()
    average = Average(model, SWA())
    average.follower(wide)
    average.follower(narrow)
    seen = []
    for seed in range(3):
        shake(model, seed)
        seen.append(model.weight.detach().double())
        average.update()
    exact = torch.stack(seen).mean(0)
    assert (wide.weight.double() - exact).abs().max() < 1e-6
    assert torch.equal(narrow.weight, wide.weight.half())


@pytest.mark.parametrize("late", ["created", "begun"])
def test_a_module_that_is_converted_or_moved_later_is_still_followed(late):
    model, teacher = net(), net()
    average = Average(model, SWA())
    average.follower(teacher, buffers=True)
    if late == "begun":
        average.update()
    teacher.double()  # parameters stay the same objects, buffers do not
    teacher[2].weight = nn.Parameter(torch.zeros(1, 4))
    shake(model, 1)
    average.update()
    own = average.averaged_tensors()
    assert teacher[0].weight.dtype == torch.float64
    assert all(torch.equal(own[n].double(), t.double()) for n, t in teacher.state_dict().items())


def test_ties_and_frozen_parameters_are_the_models():
    model, teacher = Tied(), Tied()
    average = Average(model, SWA())
    average.follower(teacher)
    average.update()
    assert torch.equal(teacher.head.weight, model.head.weight)
    head = nn.Linear(4, 5, bias=False)  # an alias alone
    average.follower(head, part="head")
    assert torch.equal(head.weight, model.head.weight)
    untied, tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential()
    tied.append(nn.Linear(2, 2)).append(nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(MismatchError, match=r"1\.weight: is tied to 0\.weight here"):
        Average(untied, SWA()).follower(tied)
    partly, other = net(), net()
    partly[0].requires_grad_(requires_grad=False)
    average = Average(partly, SWA())
    average.follower(other)
    average.update()
    assert torch.equal(other[0].weight, partly[0].weight)


def test_what_does_not_fit_is_named_and_nothing_is_changed():
    model = net()
    average = Average(model, SWA())
    average.update()
    wrong = nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(4, 1))
    wrong.add_module("extra", nn.Linear(1, 1))
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(MismatchError, match=r"(?s)extra\.bias, extra\.weight.*0\.weight: shape"):
        average.follower(wrong, freeze=True)
    assert equal(before, wrong.state_dict())
    assert all(p.requires_grad for p in wrong.parameters())
    with pytest.raises(ArgumentError, match="averaged parameters of the model itself"):
        average.follower(model)
    with pytest.raises(ArgumentError, match="needs a torch module"):
        average.follower(model.state_dict())
    with pytest.raises(ArgumentError, match="freeze is 1"):
        average.follower(net(), freeze=1)


def test_a_resumed_average_sets_its_follower_from_the_state():
    model, teacher = net(), net()
    average = Average(model, EMA(0.9999))
    average.follower(teacher, buffers=True)
    for seed in range(70):
        shake(model, seed)
        average.update()
    state = io.BytesIO()
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, state)
    state.seek(0)
    loaded = torch.load(state, weights_only=True)
    fresh, resumed = net(), net()
    fresh.load_state_dict(loaded["model"])
    again = Average(fresh, EMA(0.9999))
    again.follower(resumed, buffers=True)
    again.load_state_dict(loaded["average"])
    assert equal(resumed.state_dict(), teacher.state_dict())
    for seed in range(70, 75):
        shake(model, seed), shake(fresh, seed)
        average.update(), again.update()
        assert equal(resumed.state_dict(), teacher.state_dict())


def test_a_parameter_that_is_unfrozen_is_followed_from_then_on():
    model, teacher = net(), net()
    model[0].requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = Average(model, SWA())
    average.follower(teacher)
    average.attach(optimizer)
    train(model, optimizer, range(2))
    model[0].requires_grad_(requires_grad=True)
    train(model, optimizer, range(2, 5))
    assert torch.equal(teacher[0].weight, average.averaged_tensors()["0.weight"])
    assert not torch.equal(teacher[0].weight, model[0].weight)


def test_a_follower_that_holds_another_average_is_not_written_to():
    model, teacher = net(), net()
    average, of_teacher = Average(model, SWA()), Average(teacher, SWA())
    of_teacher.update()
    average.follower(teacher)
    with of_teacher.applied(), pytest.raises(UsageError, match="holds the weights of"):
        average.update()


# --- write_back -------------------------------------------------------------------------------------


def lookahead(parameters, steps, k, alpha):
    """arXiv 1907.08610 by hand, around SGD with momentum: slow += alpha (fast - slow), fast <- slow."""
    model, seeds = parameters, steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    slow = [p.detach().clone() for p in model.parameters()]
    for n, seed in enumerate(seeds, 1):
        train(model, optimizer, [seed])
        if n % k == 0:
            with torch.no_grad():
                for s, p in zip(slow, model.parameters(), strict=True):
                    s += alpha * (p - s)
                    p.copy_(s)


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (3, 0.8)])
def test_it_is_lookahead_with_the_profile_to_match(k, alpha):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    average = Average(model, EMA((1 - alpha) ** (1 / k), keep_initial=True))
    average.update()  # the slow weights begin where training does
    average.attach(optimizer, every=k)
    average.write_back(every=k)
    x = torch.randn(8, 3, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        train(model, optimizer, range(17))
        lookahead(twin, range(17), k, alpha)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stop", [1, 5, 6, 7])
@pytest.mark.parametrize("profile", [EMA(0.7), EMA(0.9999, keep_initial=True), Window(4)], ids=repr)
def test_a_resumed_run_is_bitwise_the_run_without_a_pause(profile, stop):
    def made():
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        average = Average(model, profile)
        average.attach(optimizer, every=2)
        average.write_back(every=6)
        return model, optimizer, average

    whole, parts = made(), made()
    train(*whole[:2], range(20))
    train(*parts[:2], range(stop))
    saved = copy.deepcopy([one.state_dict() for one in parts])
    resumed = made()
    for one, state in zip(resumed, saved, strict=True):
        one.load_state_dict(state)
    train(*resumed[:2], range(stop, 20))
    assert equal(whole[0].state_dict(), resumed[0].state_dict())


def test_it_is_switch_ema_and_leaves_all_but_the_weights_alone():
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    average = Average(model, EMA(0.8))
    average.attach(optimizer)
    handle = average.write_back(every=4)
    train(model, optimizer, range(3))
    raw = model[0].weight.detach().clone()
    with average.applied():
        assert not torch.equal(model[0].weight, raw)
    momenta = copy.deepcopy(optimizer.state_dict()["state"])
    train(model, optimizer, [3])
    own = average.averaged_tensors()
    assert all(torch.equal(own[n], p) for n, p in model.named_parameters())
    assert (average.time, average.count) == (4, 4)
    assert torch.equal(own["1.running_mean"], model[1].running_mean)
    assert len(momenta) == len(optimizer.state_dict()["state"])
    handle.remove()
    train(model, optimizer, range(4, 8))
    assert not torch.equal(average.averaged_tensors()["0.weight"], model[0].weight)


def test_captures_and_samples_are_counted_in_their_own_unit():
    for dt, writes in ((1, [3, 6]), (100, [1, 2, 3, 4, 5, 6]), (0.5, [6])):
        model = nn.Linear(1, 1, bias=False)
        average = Average(model, SWA())
        average.write_back(every=3)
        written = []
        for n in range(1, 7):
            nn.init.constant_(model.weight, 10.0**n)
            average.update(dt)
            same = torch.equal(average.averaged_tensors()["weight"], model.weight)
            if same and model.weight.item() != 10.0**n:
                written.append(n)
        assert written == [n for n in writes if n > 1]


def test_followers_and_write_back_together():
    model, teacher = net(), net()
    average = Average(model, SWA())
    average.follower(teacher)
    average.write_back(every=2)
    for seed in range(2):
        shake(model, seed)
        average.update()
    assert torch.equal(teacher[0].weight, model[0].weight)


def test_bad_moments_are_refused_and_nothing_is_written():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages = Averages(model, {"a": SWA(), "b": EMA(0.9)})
    handle = averages["a"].write_back(every=1)
    with pytest.raises(UsageError, match="written back already"):
        averages["b"].write_back(every=1)
    handle.remove()
    for every in (0, -1, float("nan"), float("inf"), "5", True):
        with pytest.raises(ArgumentError, match="every is"):
            averages["b"].write_back(every=every)
    late = Average(model, SWA())
    late.write_back(every=1)
    late.attach(optimizer, before_next_step=True)
    train(model, optimizer, [0])
    with pytest.raises(UsageError, match="before_next_step"):
        train(model, optimizer, [1])
    late.detach()
    spoilt = Average(model, SWA())
    spoilt.write_back(every=2)
    spoilt.update()
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    before = model[2].weight.detach().clone()
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        spoilt.update()
    assert torch.equal(before, model[2].weight)
