"""The hook: what counts as a step, and what does not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import polyak
from polyak import EMA, SWA, Average, Averages, Window
from polyak.averaging.hook import Attachment, Customer
from polyak.errors import ArgumentError, PolyakWarning, UsageError


def problem(**sgd):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, **sgd)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()


def train(model, optimizer, n_steps):
    """Step, and give the weights after each."""
    seen = []
    for _ in range(n_steps):
        step(model, optimizer)
        seen.append(model.weight.detach().clone())
    return seen


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_it_averages_after_every_kth_step(make):
    model, _ = problem()
    optimizer = make(model.parameters())
    average = Average(model, SWA())
    average.attach(optimizer, every=3)
    seen = train(model, optimizer, 10)
    expected = torch.stack([seen[2], seen[5], seen[8]]).mean(0)
    torch.testing.assert_close(average.averaged_tensors()["weight"], expected)
    assert (average.time, average.count, average.unit) == (9, 3, "steps")


def test_every_k_never_changes_the_horizon():
    model, optimizer = problem()
    each, third = Average(model, EMA(decay=0.99)), Average(model, EMA(decay=0.99))
    each.attach(optimizer)
    third.attach(optimizer, every=3)
    train(model, optimizer, 30)
    assert each.time == third.time == 30
    assert third.metrics()["mean_age"] == each.metrics()["mean_age"]
    assert third.metrics()["next_share"] == pytest.approx(
        EMA(decay=0.99).share(now=33, dt=3), rel=1e-12
    )


def test_lbfgs_updates_once_per_step_whatever_the_closures():
    model, _ = problem()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    average = Average(model, SWA())
    average.attach(optimizer)
    closures = []

    def closure():
        closures.append(1)
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert len(closures) > 3
    assert average.count == 3


def test_gradient_accumulation_updates_once_per_real_step():
    model, optimizer = problem()
    average = Average(model, SWA())
    average.attach(optimizer)
    for micro in range(8):
        model(torch.randn(2, 3)).square().mean().backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert average.count == 2


class TestScaler:
    """Steps that a GradScaler skips weigh nothing, fused optimizers included."""

    @staticmethod
    def run(profile, *, fused, skip, every=1, n_steps=8, constant=False):
        torch.manual_seed(1)
        model = nn.Linear(3, 1)
        nn.init.constant_(model.weight, 3.0)
        lr = 0.0 if constant else 0.1
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=fused, weight_decay=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        average = Average(model, profile)
        average.attach(optimizer, every=every)
        seen = []
        for index in range(n_steps):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(4, 3)).square().mean()).backward()
            if index in skip:
                model.weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            if index not in skip:
                seen.append(model.weight.detach().clone())
        return average, seen

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize(
        "profile",
        [SWA(), EMA(decay=0.5), EMA(decay=0.5, keep_initial=True), polyak.PowerEMA(gamma=3)],
    )
    def test_two_skipped_first_steps_leave_a_constant_a_constant(self, profile, fused):
        average, seen = self.run(profile, fused=fused, skip={0, 1}, n_steps=6, constant=True)
        assert torch.equal(average.averaged_tensors()["weight"], torch.full((1, 3), 3.0))
        assert average.count == len(seen) == 4

    @pytest.mark.parametrize(
        "profile",
        [
            SWA(),
            EMA(decay=0.9),
            EMA(decay=0.99999, keep_initial=True),
            polyak.After(2, SWA()),
            Window(length=3),
        ],
    )
    @pytest.mark.parametrize("skip", [{0, 1}, {3}, {2, 5, 6}, set()])
    def test_fused_and_unfused_agree(self, profile, skip):
        fused, _ = self.run(profile, fused=True, skip=skip)
        plain, _ = self.run(profile, fused=False, skip=skip)
        assert (fused.time, fused.count) == (plain.time, plain.count)
        torch.testing.assert_close(fused.averaged_tensors(), plain.averaged_tensors())

    def test_time_lives_on_the_device_only_where_steps_may_be_skipped(self):
        fused, _ = self.run(SWA(), fused=True, skip={0})
        plain, _ = self.run(SWA(), fused=False, skip={0})
        assert fused._member.clock.on_device
        assert not plain._member.clock.on_device

    def test_every_k_counts_the_real_steps_among_k(self):
        average, _ = self.run(EMA(decay=0.9), fused=True, skip={0, 1, 2, 4}, every=3, n_steps=9)
        assert (average.time, average.count) == (5, 2)

    def test_a_state_in_between_goes_on_bitwise(self):
        torch.manual_seed(0)
        average, _ = self.run(EMA(decay=0.99999, keep_initial=True), fused=True, skip={1})
        state = copy.deepcopy(average.state_dict())
        other = Average(nn.Linear(3, 1), EMA(decay=0.99999, keep_initial=True))
        other.load_state_dict(state)
        assert other.state_dict()["tensors"].keys() == state["tensors"].keys()
        assert torch.equal(other.averaged_tensors()["weight"], average.averaged_tensors()["weight"])


class TestAtSchedule:
    def schedule(self):
        return polyak.schedules.chain(
            (4, polyak.schedules.Constant(0.1)),
            (6, polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=3)),
        )

    def test_it_takes_the_weights_at_the_averaging_points(self):
        model, optimizer = problem()
        lr = polyak.LRSchedule(optimizer, self.schedule())
        average = Average(model, SWA())
        average.attach(optimizer, at=lr)
        taken = []
        for completed in range(1, 11):
            step(model, optimizer)
            if completed in (4, 7, 10):  # 4: the weights that enter the cyclic phase
                taken.append(model.weight.detach().clone())
            lr.step()
        assert lr.schedule.averaging_points() == (4, 7, 10)
        torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(taken).mean(0))
        assert (average.unit, average.time, average.count) == ("captures", 3, 3)

    def test_a_schedule_in_epochs_takes_the_weights_once_at_the_ends_of_epochs(self):
        model, optimizer = problem()
        lr = polyak.LRSchedule(optimizer, self.schedule())
        average = Average(model, SWA())
        average.attach(optimizer, at=lr)
        taken = []
        for epoch in range(1, 11):
            weights = train(model, optimizer, 5)[-1]
            lr.step()
            if epoch in (4, 7, 10):
                taken.append(weights)
        torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(taken).mean(0))

    def test_a_schedule_that_averages_from_the_start_takes_the_first_weights(self):
        model, optimizer = problem()
        lr = polyak.LRSchedule(
            optimizer, polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=2)
        )
        average = Average(model, SWA())
        average.attach(optimizer, at=lr)
        taken = [model.weight.detach().clone()]
        for completed in range(1, 5):
            step(model, optimizer)
            lr.step()
            if completed % 2 == 0:
                taken.append(model.weight.detach().clone())
        torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(taken).mean(0))

    def test_a_resumed_schedule_takes_no_first_weights(self):
        model, optimizer = problem()
        lr = polyak.LRSchedule(
            optimizer, polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=2)
        )
        average = Average(model, SWA())
        average.attach(optimizer, at=lr)
        lr.load_state_dict({"step": 1, "scales": [1.0]})
        step(model, optimizer)
        assert average.count == 0

    def test_a_horizon_in_captures_must_be_meant(self):
        model, optimizer = problem()
        lr = polyak.LRSchedule(optimizer, self.schedule())
        with pytest.raises(ArgumentError, match=r"half_life=500 is in no unit.*unit='captures'"):
            Average(model, EMA.from_half_life(500)).attach(optimizer, at=lr)
        with pytest.raises(ArgumentError, match="captures"):
            Average(model, SWA(), unit="steps").attach(optimizer, at=lr)
        Average(model, EMA.from_half_life(5), unit="captures").attach(optimizer, at=lr)

    def test_both_ways_at_once_are_refused(self):
        model, optimizer = problem()
        lr = polyak.LRSchedule(optimizer, self.schedule())
        with pytest.raises(ArgumentError, match="not both"):
            Average(model, SWA()).attach(optimizer, every=2, at=lr)

    def test_another_scheduler_is_refused(self):
        model, optimizer = problem()
        lr = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        with pytest.raises(ArgumentError, match="StepLR"):
            Average(model, SWA()).attach(optimizer, at=lr)


def test_every_with_captures_counts_each_as_one():
    model, optimizer = problem()
    average = Average(model, EMA.from_half_life(3), unit="captures")
    average.attach(optimizer, every=5)
    train(model, optimizer, 20)
    assert (average.time, average.count) == (4, 4)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_a_number_of_steps(every):
    model, optimizer = problem()
    with pytest.raises(ArgumentError, match="every is"):
        Average(model, SWA()).attach(optimizer, every=every)


def test_a_unit_that_the_hook_cannot_count_is_refused():
    model, optimizer = problem()
    with pytest.raises(ArgumentError, match="samples"):
        Average(model, SWA(), unit="samples").attach(optimizer)


def test_detached_cleanly():
    model, optimizer = problem()
    average = Average(model, SWA())
    before = dict(optimizer.__dict__)
    handle = average.attach(optimizer)
    train(model, optimizer, 2)
    handle.remove()
    handle.remove()
    train(model, optimizer, 2)
    assert average.count == 2
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert optimizer.__dict__.keys() == before.keys()
    pickle.dumps(optimizer)  # without a warning
    with average.attach(optimizer):
        train(model, optimizer, 1)
    assert average.count == 3


def test_attaching_twice_is_refused():
    model, optimizer = problem()
    average = Average(model, SWA())
    average.attach(optimizer)
    with pytest.raises(UsageError, match="attached already"):
        average.attach(optimizer)
    with pytest.raises(UsageError, match="attached already"):
        average.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_named_primary_of_several_optimizers_counts():
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 1)
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    slow = torch.optim.SGD(generator.parameters(), lr=0.1)
    fast = torch.optim.SGD(critic.parameters(), lr=0.1)
    average = Average(both, SWA())
    with pytest.warns(PolyakWarning, match=r"not critic\.weight, critic\.bias"):
        average.attach(slow)
    for _ in range(3):
        for _ in range(5):
            critic(generator(torch.randn(4, 2)).detach()).mean().backward()
            fast.step()
        critic(generator(torch.randn(4, 2))).mean().backward()
        slow.step()
    assert average.count == 3


def test_an_optimizer_of_other_parameters_is_refused():
    model, _ = problem()
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=r"None of the 2 parameters.*weight, bias"):
        Average(model, SWA()).attach(other)
    with pytest.raises(ArgumentError, match="found str"):
        Average(model, SWA()).attach("sgd")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_a_copied_or_pickled_optimizer_is_noticed(copied):
    model, optimizer = problem()
    average = Average(model, SWA())
    average.attach(optimizer)
    with pytest.warns(PolyakWarning, match="copied or pickled"):
        copied(optimizer)
    step(model, optimizer)
    assert average.count == 1


def test_optimizer_state_and_averages_are_apart():
    model, optimizer = problem(momentum=0.9)
    Average(model, SWA()).attach(optimizer)
    step(model, optimizer)
    assert set(optimizer.state[model.weight]) == {"momentum_buffer"}
    optimizer.load_state_dict(optimizer.state_dict())


def test_accelerates_wrapper_is_unwrapped():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.GradientState._reset_state()  # a run of another test that failed may be in it
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer = problem()
    model, optimizer = accelerator.prepare(model, optimizer)
    average = Average(model, SWA())
    average.attach(optimizer)
    for _ in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(2, 3)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert average.count == 2


def test_schedule_free_optimizers_average_their_training_weights():
    schedulefree = pytest.importorskip("schedulefree")
    model, _ = problem()
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    average = Average(model, SWA())
    average.attach(optimizer)
    seen = train(model, optimizer, 5)
    optimizer.eval()  # converts the weights in place: no step, so nothing is averaged
    assert average.count == 5
    torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(seen).mean(0))


def test_steps_between_updates_survive_a_resume():
    model, optimizer = problem()
    average = Average(model, SWA())
    average.attach(optimizer, every=10)
    train(model, optimizer, 25)
    state = average.state_dict()
    other = Average(model, SWA())
    other.attach(torch.optim.SGD(model.parameters(), lr=0.1), every=10)
    other.load_state_dict(state)
    assert other.count == 2
    other_optimizer = other._member.attachment._optimizers[0]
    train(model, other_optimizer, 5)
    assert other.count == 3


def test_several_averages_attach_together():
    model, optimizer = problem()
    averages = Averages(model, {"a": SWA(), "b": Window(2)})
    averages.attach(optimizer)
    seen = train(model, optimizer, 4)
    torch.testing.assert_close(
        averages["a"].averaged_tensors()["weight"], torch.stack(seen).mean(0)
    )
    torch.testing.assert_close(
        averages["b"].averaged_tensors()["weight"], torch.stack(seen[2:]).mean(0)
    )
    with pytest.raises(UsageError, match="member of Averages"):
        averages["a"].update()


class TestSeveralOptimizers:
    """A step is complete once each of them has stepped since the last one."""

    def gan(self):
        torch.manual_seed(0)
        model = nn.ModuleDict({"generator": nn.Linear(2, 2), "critic": nn.Linear(2, 1)})
        return model, [torch.optim.SGD(model[n].parameters(), lr=0.1) for n in model]

    def step(self, model, optimizer):
        model["critic"](model["generator"](torch.randn(4, 2))).mean().backward()
        optimizer.step()

    def test_five_critic_steps_and_one_generator_step_make_one(self):
        model, (generator, critic) = self.gan()
        average = Average(model, SWA())
        average.attach([generator, critic])
        taken = []
        for _ in range(3):
            for _ in range(5):
                self.step(model, critic)
            self.step(model, generator)
            taken.append(model["generator"].weight.detach().clone())
        assert (average.count, average.time, average.unit) == (3, 3, "steps")
        found = average.averaged_tensors()["generator.weight"]
        torch.testing.assert_close(found, torch.stack(taken).mean(0))

    def test_every_counts_complete_steps_and_resumes_within_one(self):
        model, (generator, critic) = self.gan()
        average = Average(model, SWA())
        average.attach([generator, critic], every=2)
        for optimizer in (critic, generator, critic, critic):
            self.step(model, optimizer)
        state = average.state_dict()
        again = Average(model, SWA())
        again.load_state_dict(state)  # before attaching: what it counted continues all the same
        average.detach()
        again.attach([generator, critic], every=2)
        assert again.state_dict()["pending"] == state["pending"] == [1, 1.0, [1]]
        self.step(model, generator)
        assert (again.count, average.count) == (1, 0)

    def test_a_step_that_all_have_skipped_does_not_count(self):
        model, _ = self.gan()
        optimizers = [torch.optim.AdamW(model[n].parameters(), fused=True) for n in model]
        average = Average(model, SWA())
        average.attach(optimizers)
        for skipped in ((1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)):
            for optimizer, found_inf in zip(optimizers, skipped, strict=True):
                optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found_inf)
                self.step(model, optimizer)
        assert (average.count, average.time) == (2, 2)

    def test_a_list_of_none_or_of_twice_the_same_is_refused(self):
        model, (generator, _) = self.gan()
        for optimizers in ([], [generator, generator]):
            with pytest.raises(ArgumentError, match="several different ones"):
                Average(model, SWA()).attach(optimizers)
        other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        with pytest.raises(ArgumentError, match="None of the 2 parameters"):
            Average(model, SWA()).attach([generator, other])
        assert not generator._optimizer_step_pre_hooks


class TestTimingOfMembers:
    """Members of Averages with a timing of their own."""

    @pytest.mark.parametrize("general_first", [True, False])
    def test_an_average_of_steps_beside_one_of_captures(self, general_first):
        model, optimizer = problem()
        lr = polyak.LRSchedule(
            optimizer, polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=2)
        )
        averages = Averages(model, {"ema": EMA.from_half_life(3), "swa": SWA()})
        calls = [
            lambda: averages.attach(optimizer),
            lambda: averages["swa"].attach(optimizer, at=lr),
        ]
        for call in calls if general_first else reversed(calls):
            call()
        entering = model.weight.detach().clone()
        alone = {"ema": Average(model, EMA.from_half_life(3)), "swa": Average(model, SWA())}
        alone["ema"].attach(optimizer)
        taken = [entering]
        for index in range(4):
            step(model, optimizer)
            if index % 2:
                taken.append(model.weight.detach().clone())
            lr.step()
        assert (averages["ema"].unit, averages["swa"].unit) == ("steps", "captures")
        assert (averages["ema"].count, averages["swa"].count) == (4, 3)
        found = averages["swa"].averaged_tensors()["weight"]
        torch.testing.assert_close(found, torch.stack(taken).mean(0))
        assert torch.equal(
            averages["ema"].averaged_tensors()["weight"],
            alone["ema"].averaged_tensors()["weight"],
        )

    def test_each_resumes_where_it_was(self):
        def build():
            model, optimizer = problem()
            averages = Averages(model, {"often": SWA(), "seldom": SWA()})
            averages["seldom"].attach(optimizer, every=5)
            averages.attach(optimizer, every=2)
            return model, optimizer, averages

        model, optimizer, averages = build()
        train(model, optimizer, 8)
        state = copy.deepcopy(averages.state_dict())
        assert [state[n]["pending"][0] for n in ("often", "seldom")] == [0, 3]
        train(model, optimizer, 3)
        again_model, again_optimizer, again = build()
        again.load_state_dict(state)
        train(again_model, again_optimizer, 3)
        assert {n: a.count for n, a in again.items()} == {n: a.count for n, a in averages.items()}

    def test_detach_removes_every_attachment(self):
        model, optimizer = problem()
        averages = Averages(model, {"a": SWA(), "b": SWA()})
        averages.attach(optimizer)
        averages["b"].attach(optimizer, every=2)
        averages["b"].detach()  # back to the timing of the others
        train(model, optimizer, 2)
        assert {n: a.count for n, a in averages.items()} == {"a": 2, "b": 2}
        averages["b"].attach(optimizer, every=2)
        averages.detach()
        averages.detach()
        train(model, optimizer, 2)
        assert {n: a.count for n, a in averages.items()} == {"a": 2, "b": 2}
        assert not optimizer._optimizer_step_post_hooks
        average = Average(model, SWA())
        average.attach(optimizer)
        average.detach()
        average.attach(optimizer)


class TestAnyCustomer:
    """The hook updates whatever has an `update`, several on one optimizer."""

    def test_a_customer_of_another_kind_beside_two_averages(self):
        class Recorder(Customer):
            def __init__(self, model):
                self.model = model
                self.seen = []

            def update(self, dt, real=True):
                self.seen.append((dt, real, self.model.weight[0, 0].item()))

        model, optimizer = problem()
        recorder = Recorder(model)
        attachment = Attachment(recorder, optimizer, every=2)
        averages = [Average(model, SWA()), Average(model, EMA(decay=0.5))]
        for average in averages:
            average.attach(optimizer)
        weights = [float(w[0, 0]) for w in train(model, optimizer, 4)]
        assert recorder.seen == [(2.0, True, weights[1]), (2.0, True, weights[3])]
        assert [a.count for a in averages] == [4, 4]
        averages[0].detach()  # in any order: the others stay
        with pytest.warns(PolyakWarning, match="copied or pickled") as caught:
            copy.deepcopy(optimizer)
        assert len(caught) == 1
        train(model, optimizer, 2)
        assert ([a.count for a in averages], len(recorder.seen)) == ([4, 6], 3)
        attachment.remove()
        averages[1].detach()
        copy.deepcopy(optimizer)


class TestReal:
    """`update(real=)`: for whoever knows that a step was skipped."""

    @pytest.mark.parametrize("profile", [SWA(), EMA(decay=0.5), Window(length=2)])
    def test_a_skipped_step_changes_nothing(self, profile):
        model = nn.Linear(3, 1)
        host, device, expected = (Average(model, profile) for _ in range(3))
        for index in range(8):
            nn.init.constant_(model.weight, float(index))
            real = index not in (0, 1, 4, 7)
            host.update(real=real)
            device.update(real=torch.tensor(float(real)))
            if real:
                expected.update()
        assert (host.time, host.count) == (expected.time, expected.count) == (4, 4)
        assert (device.time, device.count) == (4, 4)
        for average in (host, device):
            torch.testing.assert_close(average.averaged_tensors(), expected.averaged_tensors())

    @pytest.mark.parametrize("real", [None, 1, 0.5, "yes", torch.ones(2)])
    def test_what_says_neither_is_refused(self, real):
        average = Average(nn.Linear(3, 1), SWA())
        with pytest.raises(ArgumentError, match="real is"):
            average.update(real=real)
        assert average.empty


def test_weights_enter_at_whatever_step_the_schedule_is_attached_at():
    """An empty average takes them wherever the schedule averages; a resumed one holds them already."""
    model, optimizer = problem()
    lr = polyak.LRSchedule(optimizer, TestAtSchedule().schedule())
    for _ in range(4):
        step(model, optimizer)
        lr.step()
    entering = model.weight.detach().clone()
    fresh, resumed = Average(model, SWA()), Average(model, SWA())
    fresh.attach(optimizer, at=lr)
    resumed.attach(optimizer, at=lr)
    resumed.load_state_dict(Average(model, SWA()).state_dict())
    held = Average(model, SWA(), unit="captures")
    held.update()
    held.attach(optimizer, at=lr)
    step(model, optimizer)
    assert (fresh.count, held.count) == (1, 1)
    assert torch.equal(fresh.averaged_tensors()["weight"], entering)


@pytest.mark.parametrize("profile", ["ema:decay=0.9", "swa", "window:length=3"])
def test_profiles_as_text(profile):
    model, _ = problem()
    assert Average(model, profile).profile == polyak.maths.parse_profile(profile)
    assert Averages(model, {"a": profile})["a"].profile == polyak.maths.parse_profile(profile)


@pytest.mark.parametrize(
    ("profile", "message"),
    [(SWA, r"Call it: SWA\("), (EMA, "Call it"), (0.999, "0.999"), (None, "None"), ("ema", "ema")],
)
def test_what_is_not_a_profile_is_refused(profile, message):
    model, _ = problem()
    with pytest.raises(ArgumentError, match=message):
        Average(model, profile)
    with pytest.raises(ArgumentError, match=message):
        Averages(model, {"a": profile})


@pytest.mark.parametrize("frozen", [True, False])
def test_attached_by_hand_only_the_caller_updates(frozen):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(not frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = Average(model, polyak.SWA(), unit="epochs")
    average.attach(optimizer, by_hand=True)
    first = model[0].weight.detach().clone()
    for epoch in range(3):
        model[0].requires_grad_(True if epoch else not frozen)
        for _ in range(4):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        average.update()
        if epoch == 0:
            first = model[0].weight.detach().clone()
        if epoch == 1:
            second = model[0].weight.detach().clone()
    assert (average.count, average.unit) == (3, "epochs")
    expected = (first + second + model[0].weight) / 3
    torch.testing.assert_close(average.averaged_tensors()["0.weight"], expected)
    with average.applied(), pytest.raises(UsageError):
        optimizer.step()
    for options in ({"every": 2}, {"at": object()}):
        with pytest.raises(ArgumentError, match="by_hand"):
            Average(model, polyak.SWA()).attach(optimizer, by_hand=True, **options)


def _averages(model, optimizer, folder):
    averages = Averages(model, {"swa": "swa", "ema": "ema:decay=0.9"})
    averages.attach(optimizer)
    averages.update()
    return averages


def _lent(model, optimizer, folder):
    average = _averages(model, optimizer, folder)["ema"]
    average.applied().__enter__()
    return average


def _recorded(model, optimizer, folder):
    recorder = polyak.Recorder(model, folder, interval=2, captures=2)
    recorder.attach(optimizer)
    return recorder


def _feeding(model, optimizer, folder):
    average = Average(model, "swa")
    average.attach(optimizer)
    average.follower(copy.deepcopy(model))
    average.write_back(every=2)
    return average


@pytest.mark.parametrize("attached", [_averages, _lent, _recorded, _feeding])
def test_what_was_never_detached_keeps_no_model_alive(attached, tmp_path):
    # A sweep makes many models in one process; torch keeps hooks of all optimizers for good.

    def train():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        average = attached(model, optimizer, tmp_path / "record")
        if attached is not _lent:
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
        kept = [model, optimizer, average, *model.parameters()]
        return [weakref.ref(one) for one in kept]

    left = train()
    gc.collect()
    assert [one() for one in left] == [None] * len(left)
    assert len(_global_optimizer_pre_hooks) <= 1


def test_a_copy_of_an_attached_average_detaches_too():
    model, optimizer = problem()
    average = Average(model, SWA())
    average.attach(optimizer)
    with pytest.warns(PolyakWarning, match="hooks are not"):
        twin = copy.deepcopy(average)
    average.detach()
    twin.detach()
    step(model, optimizer)
    assert average.empty
