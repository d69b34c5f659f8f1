"""The contract of LRSchedule. The first part has one test for each bug of torch's schedulers."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch.optim import lr_scheduler as torch_lr

from polyak import LRSchedule
from polyak.errors import ArgumentError, FormatError
from polyak.schedules import Constant, Cosine, CyclicLinear, Linear, chain

SCHEDULE = chain(
    (5, Constant(0.1)), (5, Cosine(0.1, 0.01)), (20, CyclicLinear(high=0.05, low=0.01, cycle=5))
)
# SequentialLR starts its pieces with the epoch argument that it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")


def sgd(*rates: float, **options: object) -> torch.optim.SGD:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": r} for r in rates or (1.0,)]
    return torch.optim.SGD(groups, lr=1.0, **options)


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def take(optimizer, scheduler, steps: int) -> list[list[float]]:
    """The rates that these steps use."""
    used = []
    for _ in range(steps):
        used.append(rates_of(optimizer))
        optimizer.step()
        scheduler.step()
    return used


def flat(used: list[list[float]]) -> list[float]:
    return [rate for (rate,) in used]


def saved(state: dict) -> dict:
    """Through a file that only plain values get out of."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def expected(steps: range) -> list[float]:
    return [SCHEDULE(step) for step in steps]


# --- each bug of torch's schedulers (field notes, frameworks, section 4) ---


def test_in_a_sequential_lr_no_value_is_repeated():
    """SWALR there uses its count of calls and gives its first value twice."""
    optimizer = sgd()
    constant = torch_lr.ConstantLR(optimizer, factor=1.0)
    ours = LRSchedule(optimizer, Linear(0.5, 0.0, steps=5))
    both = torch_lr.SequentialLR(optimizer, [constant, ours], milestones=[3])
    assert flat(take(optimizer, both, 9)) == pytest.approx(
        [1, 1, 1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0], abs=1e-12
    )


def test_loading_the_optimizer_brings_no_old_setting_back():
    """SWALR keeps its target in the groups, where the optimizer's state overwrites it."""
    before = sgd()
    take(before, LRSchedule(before, Constant(0.3)), 2)
    after = sgd()
    lr = LRSchedule(after, Constant(0.2))
    after.load_state_dict(before.state_dict())
    assert flat(take(after, lr, 3))[1:] == [0.2, 0.2]


def test_a_group_that_comes_later():
    """LambdaLR and SWALR raise after add_param_group."""
    optimizer = sgd()
    lr = LRSchedule(optimizer, SCHEDULE)
    take(optimizer, lr, 7)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 9.0})
    take(optimizer, lr, 1)
    assert rates_of(optimizer) == [SCHEDULE(8)] * 2
    lr.scales[1] = 0.5
    take(optimizer, lr, 1)
    assert rates_of(optimizer) == [SCHEDULE(9), 0.5 * SCHEDULE(9)]
    assert lr.state_dict() == {"step": 9, "scales": [1.0, 0.5]}


def test_a_schedule_built_after_the_optimizer_was_loaded():
    """torch's chainable schedulers go on from the rate they find, wrong for the rest of the run."""
    first = sgd()
    lr = LRSchedule(first, SCHEDULE)
    take(first, lr, 8)
    second = sgd()
    second.load_state_dict(first.state_dict())
    later = LRSchedule(second, SCHEDULE)
    later.load_state_dict(lr.state_dict())
    assert flat(take(second, later, 22)) == expected(range(8, 30))


def test_another_writer_of_the_rate_is_forgotten_at_the_next_step():
    """SWALR recovers its start from the present rate, so that any other writer corrupts it."""
    optimizer = sgd()
    lr = LRSchedule(optimizer, SCHEDULE)
    take(optimizer, lr, 3)
    optimizer.param_groups[0]["lr"] = 123.0
    optimizer.param_groups[0]["initial_lr"] = 456.0
    take(optimizer, lr, 1)
    assert rates_of(optimizer) == [SCHEDULE(4)]


def test_momentum_is_left_alone():
    """CyclicLR turns momentum on and cycles it."""
    for momentum in (0.0, 0.9):
        optimizer = sgd(momentum=momentum)
        take(optimizer, LRSchedule(optimizer, SCHEDULE), 30)
        assert optimizer.param_groups[0]["momentum"] == momentum


def test_a_milestone_at_zero():
    optimizer = sgd()
    pieces = [LRSchedule(optimizer, Constant(0.7)), LRSchedule(optimizer, SCHEDULE)]
    both = torch_lr.SequentialLR(optimizer, pieces, milestones=[0])
    assert flat(take(optimizer, both, 30)) == expected(range(30))


# --- the rate ---


def test_the_rate_is_that_of_the_schedule():
    optimizer = sgd(7.0)
    lr = LRSchedule(optimizer, SCHEDULE)
    assert flat(take(optimizer, lr, 40)) == expected(range(40))
    assert lr.last_epoch == 40
    assert lr.get_last_lr() == [SCHEDULE(40)]


def test_groups_with_scales():
    optimizer = sgd(0.1, 0.01)
    lr = LRSchedule(optimizer, SCHEDULE, scales=[1.0, 0.1])
    for step, used in enumerate(take(optimizer, lr, 30)):
        assert used == [SCHEDULE(step), SCHEDULE(step) * 0.1]


def test_different_rates_are_not_flattened():
    optimizer = sgd(0.1, 0.01)
    with pytest.raises(ArgumentError, match=r"\[0\.1, 0\.01\].*scales=\[1\.0, 0\.1\]"):
        LRSchedule(optimizer, SCHEDULE)
    assert rates_of(optimizer) == [0.1, 0.01]


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([1.0], "1 factors for 2"),
        ([1.0, -1.0], "0 or more"),
        ([1.0, float("nan")], "finite"),
    ],
)
def test_scales_that_do_not_fit(scales, message):
    with pytest.raises(ArgumentError, match=message):
        LRSchedule(sgd(0.1, 0.01), SCHEDULE, scales=scales)


def test_what_is_no_schedule_and_no_optimizer():
    with pytest.raises(ArgumentError, match="takes a schedule"):
        LRSchedule(sgd(), 0.1)
    with pytest.raises(ArgumentError, match="Expected a torch optimizer"):
        LRSchedule(torch.nn.Linear(1, 1), SCHEDULE)


def test_tensor_rates_are_written_in_place():
    rate = torch.tensor(1.0, dtype=torch.float64)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=rate)
    lr = LRSchedule(optimizer, SCHEDULE)
    used = [[lr.get_last_lr()[0].item(), optimizer.step(), lr.step()][0] for _ in range(12)]
    assert used == expected(range(12))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == SCHEDULE(12)
    kept = lr.get_last_lr()[0]
    lr.load_state_dict({"step": 3, "scales": [1.0]})
    assert optimizer.param_groups[0]["lr"] is rate
    assert (rate.item(), kept.item()) == (SCHEDULE(3), SCHEDULE(12))


# --- saving and loading ---


def resumed(order: tuple[str, ...], state: dict, build) -> list[float]:
    """A second process, which builds and loads in this order, and goes on."""
    optimizer, scheduler = sgd(0.25), None
    for action in order:
        if action == "build":
            scheduler = build(optimizer)
        elif action == "load scheduler":
            scheduler.load_state_dict(saved(state["scheduler"]))
        else:
            optimizer.load_state_dict(saved(state["optimizer"]))
    return flat(take(optimizer, scheduler, 30))


ORDERS = [
    order
    for size in (2, 3)
    for order in itertools.permutations(("build", "load scheduler", "load optimizer"), size)
    if {"build", "load scheduler"} <= set(order)
    and order.index("build") < order.index("load scheduler")
]


def alone(optimizer):
    return LRSchedule(optimizer, SCHEDULE)


def several(optimizer):
    return torch_lr.SequentialLR(
        optimizer,
        [
            LRSchedule(optimizer, SCHEDULE),
            LRSchedule(optimizer, Linear(0.9, 0.0, steps=10)),
            LRSchedule(optimizer, Constant(0.7)),
        ],
        milestones=[6, 16],
    )


@pytest.mark.parametrize("build", [alone, several])
@pytest.mark.parametrize("order", ORDERS, ids=" - ".join)
@pytest.mark.parametrize("step", [0, 1, 5, 6, 7, 15, 16, 20])
def test_every_order_of_saving_and_loading(build, order, step):
    optimizer = sgd()
    scheduler = build(optimizer)
    take(optimizer, scheduler, step)
    state = copy.deepcopy(
        {"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()}
    )
    uninterrupted = flat(take(optimizer, scheduler, 30))
    assert resumed(order, state, build) == uninterrupted


@pytest.mark.parametrize("step", [0, 2, 3, 4, 8])
def test_mixed_with_torch_s_own_it_works_when_the_optimizer_loads_last(step):
    def build(optimizer):
        warm = torch_lr.LinearLR(optimizer, 0.1, 1.0, total_iters=3)
        return torch_lr.SequentialLR(optimizer, [warm, LRSchedule(optimizer, SCHEDULE)], [3])

    optimizer = sgd()
    scheduler = build(optimizer)
    take(optimizer, scheduler, step)
    state = copy.deepcopy(
        {"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()}
    )
    uninterrupted = flat(take(optimizer, scheduler, 30))
    order = ("build", "load scheduler", "load optimizer")
    assert resumed(order, state, build) == pytest.approx(uninterrupted, abs=1e-15)


def test_scales_resume_with_the_state():
    first = sgd(0.1, 0.02)
    lr = LRSchedule(first, SCHEDULE, scales=[1.0, 0.2])
    take(first, lr, 6)
    second = sgd(0.5, 0.5)
    other = LRSchedule(second, SCHEDULE)
    other.load_state_dict(saved(lr.state_dict()))
    assert rates_of(second) == rates_of(first)
    assert take(second, other, 10) == take(first, lr, 10)


def test_a_group_may_come_after_the_state():
    optimizer = sgd()
    lr = LRSchedule(optimizer, SCHEDULE)
    lr.load_state_dict({"step": 4, "scales": [1.0, 0.5]})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    take(optimizer, lr, 1)
    assert rates_of(optimizer) == [SCHEDULE(5), 0.5 * SCHEDULE(5)]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"last_epoch": 3, "_step_count": 4, "base_lrs": [0.1]},
        {"step": 1.5, "scales": [1.0]},
        {"step": 3, "scales": None},
        {"step": -2, "scales": [1.0]},
        {"step": 3, "scales": [float("inf")]},
    ],
)
def test_a_foreign_state_changes_nothing(state):
    optimizer = sgd()
    lr = LRSchedule(optimizer, SCHEDULE)
    take(optimizer, lr, 7)
    with pytest.raises(FormatError):
        lr.load_state_dict(state)
    assert rates_of(optimizer) == [SCHEDULE(7)]
    assert lr.state_dict() == {"step": 7, "scales": [1.0]}


def test_the_state_is_a_copy():
    lr = LRSchedule(sgd(), SCHEDULE)
    lr.state_dict()["scales"][0] = 5.0
    assert lr.scales == [1.0]


def test_it_is_a_torch_scheduler():
    lr = LRSchedule(sgd(), SCHEDULE)
    assert isinstance(lr, torch_lr.LRScheduler)
    assert lr.schedule is SCHEDULE


def test_hooks_see_each_step_and_no_loading():
    optimizer, seen = sgd(), []
    lr = LRSchedule(optimizer, SCHEDULE)
    handle = lr.register_step_post_hook(lambda lr: seen.append(lr.last_epoch))
    take(optimizer, lr, 3)
    lr.load_state_dict({"step": 7, "scales": [1.0]})
    take(optimizer, lr, 1)
    handle.remove()
    take(optimizer, lr, 1)
    assert seen == [1, 2, 3, 8]


def test_hooks_see_the_hand_over_of_a_sequential_lr():
    optimizer, seen = sgd(), []
    pieces = [LRSchedule(optimizer, Constant(0.1)), LRSchedule(optimizer, SCHEDULE)]
    both = torch_lr.SequentialLR(optimizer, pieces, milestones=[2])
    pieces[1].register_step_post_hook(lambda lr: seen.append(lr.last_epoch))
    take(optimizer, both, 4)
    assert seen == [0, 1, 2]
