"""What trains without the attached optimizer, or changes after it: said, refused, or taken in time."""

from __future__ import annotations

import copy

import pytest
import torch
from reference.optimizers import (
    Delegating,
    Each,
    HooklessSlowWeights,
    SelfMade,
    SlowWeights,
    gradients,
    problem,
)
from torch import nn
from torch.optim import SGD, Adam

import polyak
from polyak import SWA, Average, Averages
from polyak.errors import MismatchError, PolyakWarning

CYCLES = polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=2)


class TestPartOfTheParameters:
    """What trains, is averaged, and is stepped by nobody who was named."""

    def gan(self):
        model = nn.ModuleDict({"generator": nn.Linear(2, 2), "critic": nn.Linear(2, 1)})
        return model, [SGD(model[name].parameters(), lr=0.1) for name in model]

    def test_one_of_two_optimizers(self):
        model, (generator, critic) = self.gan()
        for options in ({}, {"at": polyak.LRSchedule(generator, CYCLES)}):
            average = Average(model, SWA())
            message = r"SGD steps 2 of the 4 .* not critic\.weight, critic\.bias\. .*list"
            with pytest.warns(PolyakWarning, match=message) as caught:
                average.attach(generator, **options)
            assert len(caught) == 1
            average.detach()
        Average(model, SWA()).attach([generator, critic])
        Average(model, SWA()).attach(Each(generator, critic))

    def test_a_parameter_that_was_forgotten(self):
        model = problem()
        model.register_parameter("scale", nn.Parameter(torch.ones(1)))
        optimizer = SGD([model.weight, model.bias], lr=0.1)
        with pytest.warns(PolyakWarning, match=r"not scale\."):
            Averages(model, {"a": SWA()}).attach(optimizer)

    @pytest.mark.parametrize(
        "options", [{"include": "generator*"}, {"exclude": "critic*"}, {"include": "*.weight"}]
    )
    def test_what_is_not_averaged_needs_no_step(self, options):
        model, (generator, critic) = self.gan()
        average = Average(model, SWA(), **options)
        average.attach(generator if "*.weight" not in options.values() else [generator, critic])

    def test_what_is_frozen_needs_no_step(self):
        model, (generator, _) = self.gan()
        model["critic"].requires_grad_(False)
        average = Average(model, SWA())
        average.update()
        average.attach(generator)

    def test_one_of_the_optimizers_in_the_backward_pass(self):
        model = problem()
        optimizers = {p: SGD([p], lr=0.1) for p in model.parameters()}
        with pytest.warns(PolyakWarning, match=r"steps 1 of the 2 .* not bias\."):
            Average(model, SWA()).attach(optimizers[model.weight])
        Average(model, SWA()).attach(list(optimizers.values()))


class TestUnfrozen:
    """A part that is unfrozen and stepped by an optimizer of its own before the attached one steps."""

    def setting(self, kind=lambda p: SGD(p, lr=1.0)):
        model = nn.ModuleDict(
            {"head": nn.Linear(1, 1, bias=False), "body": nn.Linear(1, 1, bias=False)}
        )
        nn.init.zeros_(model["body"].weight)
        model["body"].requires_grad_(False)
        optimizers = [SGD(model["head"].parameters(), lr=1.0), kind(model["body"].parameters())]
        average = Average(model, SWA())
        average.attach(optimizers[0])
        return model, optimizers, average

    def step(self, model, name, optimizer):
        model[name].weight.grad = -torch.ones(1, 1)
        optimizer.step()

    @pytest.mark.parametrize("first", [1, 3, 8])
    @pytest.mark.parametrize(
        "kind",
        [
            lambda p: Adam(p, lr=1.0),
            lambda p: HooklessSlowWeights(SGD(p, lr=1.0)),
            lambda p: Delegating(SGD(p, lr=1.0)),
        ],
    )
    def test_it_is_averaged_from_before_its_first_step(self, kind, first):
        model, (head, body), average = self.setting(kind)
        had = []
        for index in range(first + 4):
            if index == first:
                model["body"].requires_grad_(True)
                for _ in range(3):
                    self.step(model, "body", body)
            self.step(model, "head", head)
            had.append(model["body"].weight.item())
        found = average.averaged_tensors()["body.weight"].item()
        assert found == pytest.approx(sum(had) / len(had))

    def changed_by_a_hookless_optimizer(self, model, body):
        self.step(model, "body", body)

    def changed_by_a_write(self, model, body):
        with torch.no_grad():
            model["body"].weight.fill_(3.0)

    def replaced(self, model, body):
        model["body"].weight = nn.Parameter(torch.ones(1, 1))

    def loaded(self, model, body):
        model["body"].load_state_dict({"weight": torch.ones(1, 1)})

    @pytest.mark.parametrize(
        "change", [changed_by_a_hookless_optimizer, changed_by_a_write, replaced, loaded]
    )
    def test_what_no_hook_sees_is_refused(self, change):
        class Hookless(SelfMade):
            def step(self, closure=None):
                with torch.no_grad():
                    for p in self.param_groups[0]["params"]:
                        p.sub_(p.grad)

        model, (head, body), average = self.setting(Hookless)
        for _ in range(4):
            self.step(model, "head", head)
        model["body"].requires_grad_(True)
        change(self, model, body)
        with pytest.raises(MismatchError, match=r"body\.weight: was frozen .* attach\(\[first"):
            self.step(model, "head", head)
        with pytest.raises(MismatchError, match="freeze them again to read"):
            average.averaged_tensors()
        model["body"].requires_grad_(False)
        average.averaged_tensors()
        assert average.count == 4

    def test_loans_and_resuming_change_no_frozen_part(self):
        model, (head, body), average = self.setting()
        self.step(model, "head", head)
        with average.applied():
            pass
        state = copy.deepcopy(average.state_dict())
        average.detach()
        again = Average(model, SWA())
        again.load_state_dict(state)
        model.load_state_dict(copy.deepcopy(model.state_dict()))  # as on resuming: in any order
        again.attach(head)
        model["body"].requires_grad_(True)
        self.step(model, "body", body)
        self.step(model, "head", head)
        assert again.averaged_tensors()["body.weight"].item() == pytest.approx(0.5)

    def test_another_model_may_train_while_the_average_is_lent(self):
        model, (head, _), average = self.setting()
        self.step(model, "head", head)
        other = problem()
        optimizer = SGD(other.parameters(), lr=0.1)
        with average.applied():
            gradients(other)
            optimizer.step()


class TestBeforeTheNextStep:
    """For loops that change the weights after `optimizer.step()`."""

    def train(self, model, optimizer, n_steps, change=lambda p: p.clamp_(-0.01, 0.01)):
        seen = []
        for _ in range(n_steps):
            gradients(model)
            optimizer.step()
            for p in model.parameters():
                change(p.data)
            seen.append(model.weight.detach().clone())
        return seen

    @pytest.mark.parametrize(
        "change",
        [lambda p: p.clamp_(-0.01, 0.01), lambda p: p.div_(p.norm()), lambda p: p.add_(1.0)],
    )
    @pytest.mark.parametrize("every", [1, 3])
    @pytest.mark.parametrize("kind", [lambda o: o, SlowWeights, HooklessSlowWeights])
    def test_it_takes_what_the_loop_left(self, kind, every, change):
        model = problem()
        optimizer = kind(SGD(model.parameters(), lr=0.5))
        average = Average(model, SWA())
        average.attach(optimizer, every=every, before_next_step=True)
        seen = self.train(model, optimizer, 6, change)
        expected = torch.stack(seen[every - 1 :: every]).mean(0)
        assert (average.count, average.time) == (6 // every, 6)
        torch.testing.assert_close(average.averaged_tensors()["weight"], expected)
        seen += self.train(model, optimizer, 3, change)
        expected = torch.stack(seen[every - 1 :: every]).mean(0)
        with average.applied():
            torch.testing.assert_close(model.weight.detach(), expected)

    def test_at_a_schedule_that_steps_before_the_change(self):
        model = problem()
        optimizer = SGD(model.parameters(), lr=0.5)
        lr = polyak.LRSchedule(optimizer, CYCLES)
        average = Average(model, SWA())
        average.attach(optimizer, at=lr, before_next_step=True)
        taken = [model.weight.detach().clone()]
        for step in range(1, 9):
            gradients(model)
            optimizer.step()
            lr.step()
            model.weight.data.clamp_(-0.01, 0.01)
            if step % 2 == 0:
                taken.append(model.weight.detach().clone())
        assert average.count == 5
        torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(taken).mean(0))

    @pytest.mark.parametrize("read", ["state_dict", "metrics", "time", "empty", "update", "detach"])
    def test_every_way_of_reading_takes_it(self, read):
        model = problem()
        optimizer = SGD(model.parameters(), lr=0.5)
        average = Average(model, SWA())
        average.attach(optimizer, before_next_step=True)
        seen = self.train(model, optimizer, 1)
        found = getattr(average, read)
        if callable(found):
            found()
        model.weight.data.fill_(7.0)
        if read == "state_dict":
            assert found()["count"] == 1
        expected = (seen[0] + seen[0]) / 2 if read == "update" else seen[0]
        torch.testing.assert_close(average.averaged_tensors()["weight"], expected)

    def test_a_state_that_is_loaded_replaces_what_was_to_come(self):
        model = problem()
        optimizer = SGD(model.parameters(), lr=0.5)
        average = Average(model, SWA())
        average.attach(optimizer, before_next_step=True)
        self.train(model, optimizer, 2)
        state = copy.deepcopy(average.state_dict())
        self.train(model, optimizer, 1)
        average.load_state_dict(state)
        assert average.count == 2

    def test_in_a_block_that_fails_half_a_step_is_not_taken(self):
        model = problem()
        optimizer = SGD(model.parameters(), lr=0.5)
        average = Average(model, SWA())
        with pytest.raises(ZeroDivisionError), average.attach(optimizer, before_next_step=True):
            self.train(model, optimizer, 2)
            gradients(model)
            optimizer.step()
            raise ZeroDivisionError
        assert average.count == 2

    def test_nothing_is_taken_while_another_average_is_lent(self):
        model = problem()
        optimizer = SGD(model.parameters(), lr=0.5)
        other, average = Average(model, SWA()), Average(model, SWA())
        other.attach(optimizer)
        average.attach(optimizer, before_next_step=True)
        seen = self.train(model, optimizer, 3)
        with other.applied():
            assert average.count == 2
        assert average.count == 3
        torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(seen).mean(0))

    def test_skipped_steps_of_a_fused_optimizer(self):
        model = problem()
        optimizer = Adam(model.parameters(), lr=0.1, fused=True)
        average = Average(model, SWA())
        average.attach(optimizer, before_next_step=True)
        seen = []
        for skipped in (1.0, 0.0, 1.0, 0.0):
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(skipped)
            gradients(model)
            optimizer.step()
            model.weight.data.mul_(0.5)
            if not skipped:
                seen.append(model.weight.detach().clone())
        assert average.count == 2
        torch.testing.assert_close(average.averaged_tensors()["weight"], torch.stack(seen).mean(0))
