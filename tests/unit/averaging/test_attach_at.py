"""`attach(at=)`: an LRSchedule inside other schedulers, and schedules that never average."""

from __future__ import annotations

import pytest
import torch
from reference.optimizers import gradients, problem
from torch import nn
from torch.optim import SGD

import polyak
from polyak import SWA, Average
from polyak.errors import ArgumentError

CYCLES = polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=2)
LATE = polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=2, include_start=False)


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
class TestSchedulers:
    """An LRSchedule inside another scheduler, and schedules that never average."""

    def run(self, build, place, *, attach_first, schedule=CYCLES):
        model = nn.Linear(1, 1, bias=False)
        optimizer = SGD(model.parameters(), lr=1.0)
        nn.init.constant_(model.weight, 50.0)  # never trained with: loaded over before the run
        lr = polyak.LRSchedule(optimizer, schedule)
        average = Average(model, SWA())
        if attach_first:
            average.attach(optimizer, at=lr)
            scheduler = build(optimizer, lr)
        else:
            scheduler = build(optimizer, lr)
            average.attach(optimizer, at=scheduler if place == "outer" else lr)
        nn.init.zeros_(model.weight)
        for step in range(1, 11):
            model.weight.grad = torch.zeros(1, 1)
            optimizer.step()
            model.weight.data.fill_(float(step))
            scheduler.step()
        return average.count, average.averaged_tensors()["weight"].item()

    @staticmethod
    def after_a_constant(optimizer, lr):
        base = polyak.LRSchedule(optimizer, polyak.schedules.Constant(0.1))
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [base, lr], milestones=[4])

    @staticmethod
    def after_torch_s_own(optimizer, lr):
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=3)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, lr], milestones=[4])

    @pytest.mark.parametrize("build", [after_a_constant, after_torch_s_own])
    @pytest.mark.parametrize("place", ["inner", "outer"])
    @pytest.mark.parametrize("attach_first", [True, False])
    def test_one_that_waits_for_its_turn(self, build, place, attach_first):
        found = self.run(build.__func__, place, attach_first=attach_first)
        assert found == (4, 7.0)  # after 4, 6, 8, 10
        found = self.run(build.__func__, place, attach_first=attach_first, schedule=LATE)
        assert found == (3, 8.0)

    @pytest.mark.parametrize("attach_first", [True, False])
    @pytest.mark.parametrize("place", ["inner", "outer"])
    def test_one_that_comes_first(self, place, attach_first):
        """The weights it begins with enter once, and not while the schedulers are being built."""

        def build(optimizer, lr):
            rest = polyak.LRSchedule(optimizer, polyak.schedules.Constant(0.1))
            return torch.optim.lr_scheduler.SequentialLR(optimizer, [lr, rest], milestones=[5])

        found = self.run(build, place, attach_first=attach_first)
        assert found == (3, 2.0)  # the weights that it begins with, and those after 2 and 4

    @pytest.mark.parametrize("attach_first", [True, False])
    def test_chained(self, attach_first):
        build = lambda optimizer, lr: torch.optim.lr_scheduler.ChainedScheduler([lr])  # noqa: E731
        assert self.run(build, "outer", attach_first=attach_first) == (6, 5.0)

    def test_accelerates_scheduler(self):
        accelerate = pytest.importorskip("accelerate")
        model = problem()
        optimizer = SGD(model.parameters(), lr=0.1)
        lr = polyak.LRSchedule(optimizer, CYCLES)
        model, optimizer, wrapped = accelerate.Accelerator(cpu=True).prepare(model, optimizer, lr)
        average = Average(model, SWA())
        average.attach(optimizer, at=wrapped)
        for _ in range(4):
            gradients(model)
            optimizer.step()
            wrapped.step()
        assert average.count == 3

    @pytest.mark.parametrize(
        "schedule",
        [
            polyak.schedules.Constant(0.1),
            polyak.schedules.chain((5, polyak.schedules.Constant(0.1))),
            polyak.schedules.Cosine(0.1, 0.01, steps=10),
            polyak.schedules.Cosine(0.1, 0.01, steps=10).per_epoch(3),
            polyak.schedules.chain(
                (5, polyak.schedules.Constant(0.1)),
                (5, polyak.schedules.CyclicLinear(high=1, low=0, cycle=9, include_start=False)),
            ),
        ],
    )
    def test_a_schedule_that_never_averages_is_refused(self, schedule):
        model = problem()
        optimizer = SGD(model.parameters(), lr=0.1)
        lr = polyak.LRSchedule(optimizer, schedule)
        both = torch.optim.lr_scheduler.ChainedScheduler([lr])
        for at in (lr, both):
            with pytest.raises(ArgumentError, match=r"at= never averages: .*every="):
                Average(model, SWA()).attach(optimizer, at=at)
        assert not optimizer._optimizer_step_pre_hooks

    def test_several_that_average_are_refused(self):
        model = problem()
        optimizer = SGD(model.parameters(), lr=0.1)
        pieces = [polyak.LRSchedule(optimizer, s) for s in (CYCLES, LATE)]
        both = torch.optim.lr_scheduler.SequentialLR(optimizer, pieces, milestones=[4])
        with pytest.raises(ArgumentError, match="SequentialLR of 2 schedules that average"):
            Average(model, SWA()).attach(optimizer, at=both)

    def test_a_schedule_that_says_only_where_it_averages(self):
        class Thirds(polyak.schedules.Schedule):
            def _rate(self, step):
                return 0.1

            def averages_after(self, completed):
                return completed % 3 == 0

        model = problem()
        optimizer = SGD(model.parameters(), lr=0.1)
        average = Average(model, SWA())
        average.attach(optimizer, at=polyak.LRSchedule(optimizer, Thirds()))

    @pytest.mark.parametrize("at", [None.__class__, 5, "lr", nn.Linear(1, 1), object()])
    def test_what_is_no_scheduler_is_refused(self, at):
        model = problem()
        with pytest.raises(ArgumentError, match="at= takes a polyak"):
            Average(model, SWA()).attach(SGD(model.parameters(), lr=0.1), at=at)
