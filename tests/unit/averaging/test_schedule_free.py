"""Schedule-free optimizers convert the weights in place: which ones the model holds is theirs to know."""

from __future__ import annotations

import pytest
import torch
from reference.optimizers import Delegating, Modes, gradients, problem
from torch.optim import SGD

import polyak
from polyak import SWA, Average
from polyak.errors import PolyakWarning, UsageError

CYCLES = polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=2)


class TestScheduleFree:
    """`optimizer.eval()` and `train()` convert the weights in place: whose they are must be theirs."""

    def kinds(self, name, model):
        schedulefree = pytest.importorskip("schedulefree")
        sgd = SGD(model.parameters(), lr=0.1, momentum=0.5)
        made = {
            "sgd": lambda: schedulefree.SGDScheduleFree(model.parameters(), lr=0.1),
            "adamw": lambda: schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1),
            "wrapper": lambda: schedulefree.ScheduleFreeWrapper(sgd),
            "attribute": lambda: Modes(sgd),
            "wrapped": lambda: Delegating(schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)),
        }
        return made[name]()

    NAMES = ("sgd", "adamw", "wrapper", "attribute", "wrapped")

    def steps(self, model, optimizer, n_steps=5):
        optimizer.train()
        for _ in range(n_steps):
            gradients(model)
            optimizer.step()

    @pytest.mark.parametrize("name", NAMES)
    def test_converting_lent_weights_is_refused_and_undone(self, name):
        model = problem()
        optimizer = self.kinds(name, model)
        average = Average(model, SWA())
        average.attach(optimizer)
        self.steps(model, optimizer)
        live = model.weight.detach().clone()
        held = average.averaged_tensors()["weight"]
        with average.applied():
            for _ in range(2):
                with pytest.raises(UsageError, match=r"eval\(\) inside applied\(\): it converts"):
                    optimizer.eval()
            optimizer.train()  # which it is: nothing to convert
            torch.testing.assert_close(model.weight.detach(), held)
        optimizer.train()
        assert torch.equal(model.weight, live)
        assert torch.equal(average.averaged_tensors()["weight"], held)
        optimizer.eval()
        with average.applied(), pytest.raises(UsageError, match=r"train\(\) inside applied"):
            optimizer.train()
        optimizer.train()
        torch.testing.assert_close(model.weight.detach(), live)

    def test_wrappers_that_have_modes_for_others_may_be_called(self):
        accelerate = pytest.importorskip("accelerate")
        model = problem()
        optimizer = SGD(model.parameters(), lr=0.1)
        wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
        average = Average(model, SWA())
        average.attach(wrapped)
        gradients(model)
        wrapped.step()
        with average.applied():
            wrapped.eval()
            wrapped.train()

    @pytest.mark.parametrize("name", NAMES)
    def test_attaching_in_evaluation_mode_is_said(self, name):
        model = problem()
        optimizer = self.kinds(name, model)
        Average(model, SWA()).attach(optimizer)  # not begun: its first step needs train() anyway
        self.steps(model, optimizer)
        optimizer.eval()
        with pytest.warns(PolyakWarning, match="is in its evaluation mode") as caught:
            Average(model, SWA()).attach(optimizer)
        assert len(caught) == 1

    def test_taking_weights_in_evaluation_mode_is_said(self):
        model = problem()
        optimizer = self.kinds("sgd", model)
        lr = polyak.LRSchedule(optimizer, CYCLES)
        average = Average(model, SWA())
        average.attach(optimizer, at=lr)
        self.steps(model, optimizer, 1)
        lr.step()
        self.steps(model, optimizer, 1)
        optimizer.eval()
        with pytest.warns(PolyakWarning, match="is in its evaluation mode"):
            lr.step()

    def test_detaching_gives_the_methods_back(self):
        model = problem()
        optimizer = self.kinds("sgd", model)
        average = Average(model, SWA())
        before = set(vars(optimizer))
        with average.attach(optimizer):
            self.steps(model, optimizer)
        assert set(vars(optimizer)) == before
