"""Each difference from torch: what torch's module does, and what ours does instead."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.optim import swa_utils as torchs

import polyak.errors
from polyak import swa_utils as ours


def _walk(module: object, model: nn.Module, values: list[float], **options: object) -> nn.Module:
    average = module.AveragedModel(model, **options)
    with torch.no_grad():
        for value in values:
            for parameter in model.parameters():
                parameter.fill_(value)
            average.update_parameters(model)
    return average


def test_bfloat16_weights_do_not_stall() -> None:
    ramp = [1 + i / 2000 for i in range(2000)]
    means = {}
    for module in (torchs, ours):
        model = nn.Linear(1, 1, bias=False).bfloat16()
        means[module] = _walk(module, model, ramp).module.weight.item()
    assert means[torchs] < 1.1  # it does not move
    assert means[ours] == pytest.approx(1.5, rel=4e-3)  # half a unit in the last place
    decay = ours.get_ema_multi_avg_fn(0.999)
    ema = _walk(
        ours, nn.Linear(1, 1, bias=False).bfloat16(), [1.0] + [1.5] * 5000, multi_avg_fn=decay
    )
    assert ema.module.weight.item() == pytest.approx(1.5, rel=4e-3)
    assert ema.module.weight.dtype == torch.bfloat16


def test_bfloat16_resumes_bitwise_through_a_file_that_torch_reads_too() -> None:
    values = [1 + i / 300 for i in range(300)]
    whole = _walk(ours, nn.Linear(1, 1).bfloat16(), values)
    half = _walk(ours, nn.Linear(1, 1).bfloat16(), values[:150])
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model = nn.Linear(1, 1).bfloat16()
    resumed = ours.AveragedModel(model)
    resumed.load_state_dict(state)
    with torch.no_grad():
        for value in values[150:]:
            for parameter in model.parameters():
                parameter.fill_(value)
            resumed.update_parameters(model)
    assert torch.equal(resumed.module.weight, whole.module.weight)
    assert torch.equal(resumed._wide["weight"][0], whole._wide["weight"][0])
    torchs.AveragedModel(model).load_state_dict(state)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda average: pickle.loads(pickle.dumps(average))]
)
def test_copies_of_a_bfloat16_average_go_on_bitwise(copied: object) -> None:
    values = [1 + i / 300 for i in range(300)]
    average = _walk(ours, nn.Linear(1, 1).bfloat16(), values[:150])
    other = copied(average)
    model = nn.Linear(1, 1).bfloat16()
    for value in values[150:]:
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        average.update_parameters(model)
        other.update_parameters(model)
    for name, tensor in average._wide.items():
        assert torch.equal(other._wide[name][0], tensor[0])


def test_weights_written_into_a_bfloat16_average_count() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    average = _walk(ours, model, [1.0, 1.0])
    with torch.no_grad():
        average.module.weight.fill_(4.0)
        model.weight.fill_(1.0)
    average.update_parameters(model)
    assert average.module.weight.item() == 3.0


def test_counters_and_masks_are_of_the_newest_model() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 1)
            self.register_buffer("steps", torch.tensor(0))
            self.register_buffer("mask", torch.tensor([True, False]))
            self.register_buffer("scale", torch.tensor(0.0))

    model = Counting()
    average = ours.AveragedModel(model, use_buffers=True)
    theirs = torchs.AveragedModel(
        model, use_buffers=True, multi_avg_fn=torchs.get_ema_multi_avg_fn()
    )
    for n in (1, 1000):
        model.steps.fill_(n)
        model.scale.fill_(n)
        model.mask.copy_(torch.tensor([n == 1, n != 1]))
        average.update_parameters(model)
        theirs.update_parameters(model)
    assert average.module.steps == 1000
    assert theirs.module.steps == 1
    assert average.module.mask.tolist() == [False, True]
    assert theirs.module.mask.tolist() == [True, True]
    assert average.module.scale == 500.5


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_integers_that_never_change_keep_their_values(decay: float) -> None:
    class Frozen(nn.Linear):
        """Quantised weights are bytes in a parameter, positions are integers in a buffer."""

        def __init__(self) -> None:
            super().__init__(1, 1)
            codes = torch.arange(256, dtype=torch.uint8)
            self.codes = nn.Parameter(codes, requires_grad=False)
            self.register_buffer("positions", torch.arange(512))

    model = Frozen()
    made = [
        library.AveragedModel(
            model, use_buffers=True, multi_avg_fn=library.get_ema_multi_avg_fn(decay)
        )
        for library in (ours, torchs)
    ]
    for average in made:
        for _ in range(3):
            average.update_parameters(model)
    average, theirs = (average.module for average in made)
    assert torch.equal(average.codes, model.codes)
    assert torch.equal(average.positions, model.positions)
    # torch 2.13.0 cuts the fraction off: findings/ema-of-4bit-weights.sh
    assert (theirs.codes != model.codes).sum() > 40
    assert (theirs.positions != model.positions).sum() > 90


def test_a_model_that_grew_is_refused_by_name_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    average, theirs = ours.AveragedModel(model), torchs.AveragedModel(model)
    average.update_parameters(model)
    before = copy.deepcopy(average.state_dict())
    model.append(nn.Linear(2, 3))
    theirs.update_parameters(model)  # swallowed
    with pytest.raises(polyak.errors.MismatchError, match=r"unexpected \(2\): 1.bias, 1.weight"):
        average.update_parameters(model)
    other = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(polyak.errors.MismatchError, match=r"0.weight: \(2, 3\), expected \(2, 2\)"):
        average.update_parameters(other)
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_tensors_go_by_name_when_their_order_changes() -> None:
    model = nn.Module()
    model.register_buffer("a", torch.tensor(1.0))
    model.register_buffer("b", torch.tensor(2.0))
    mine, theirs = ours.AveragedModel(model), torchs.AveragedModel(model)
    a = model.a
    del model.a
    model.register_buffer("a", a)
    for average in (mine, theirs):
        average.update_parameters(model)
    assert (mine.module.a, mine.module.b) == (1.0, 2.0)
    assert (theirs.module.a, theirs.module.b) == (2.0, 1.0)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_old_weight_norm_after_a_forward_can_be_averaged() -> None:
    model = old_weight_norm(nn.Linear(2, 2))
    model(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="deepcopy"):
        torchs.AveragedModel(model)
    average = ours.AveragedModel(model)
    average.update_parameters(model)
    torch.testing.assert_close(average(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_what_cannot_be_copied_says_what_to_use_instead() -> None:
    class Sharded(nn.Linear):
        def __deepcopy__(self, memo: object) -> None:
            raise AssertionError("FSDP does not support deepcopy.")

    with pytest.raises(polyak.errors.UsageError, match=r"polyak\.Average\(model.*copies nothing"):
        ours.AveragedModel(Sharded(1, 1))


def test_statistics_are_pooled_and_frozen_layers_left_alone() -> None:
    frozen = nn.BatchNorm1d(1).eval()
    model = nn.Sequential(frozen, nn.Dropout(0.5), nn.BatchNorm1d(1))
    average = ours.AveragedModel(model)
    loader = [(torch.zeros(100, 1), 0), (torch.full((1, 1), 101.0), 1)]
    ours.update_bn(loader, average, device="cpu")
    assert average.module[0].num_batches_tracked == 0
    assert average.module[2].running_mean.item() == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        torchs.update_bn(loader, average)


def test_a_batch_that_is_a_mapping_goes_to_the_model_as_in_torch() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(1)

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.bn(batch["x"])

    model = Reads()
    ours.update_bn([{"x": torch.tensor([[1.0], [3.0]])}], model, torch.device("cpu"))
    assert model.bn.running_mean.item() == 2.0
    with pytest.raises(AttributeError):
        torchs.update_bn([{"x": torch.tensor([[1.0], [3.0]])}], model, torch.device("cpu"))


def _optimizer(lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def _rates(scheduler: object, optimizer: torch.optim.SGD, n: int, meddle: bool) -> list[float]:
    rates = []
    for _ in range(n):
        if meddle:
            optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_another_writer_of_the_rate_does_not_bend_the_curve() -> None:
    curves = {}
    for module in (torchs, ours):
        for meddle in (False, True):
            optimizer = _optimizer()
            scheduler = module.SWALR(optimizer, 0.1, anneal_epochs=5, anneal_strategy="linear")
            start = _rates(scheduler, optimizer, 1, False)
            curves[module, meddle] = start + _rates(scheduler, optimizer, 6, meddle)
    assert curves[ours, True] == curves[ours, False]
    assert curves[ours, False] == pytest.approx(curves[torchs, False])
    assert curves[torchs, True] != pytest.approx(curves[torchs, False])


def test_groups_that_come_later_and_states_of_the_optimizer() -> None:
    optimizer = _optimizer()
    scheduler = ours.SWALR(optimizer, 0.1, anneal_epochs=2, anneal_strategy="linear")
    _rates(scheduler, optimizer, 1, False)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.5})
    _rates(scheduler, optimizer, 1, False)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.1])

    old = _optimizer()
    torchs.SWALR(old, 0.9)
    optimizer = _optimizer()
    scheduler = ours.SWALR(optimizer, 0.1, anneal_epochs=1)
    optimizer.load_state_dict(old.state_dict())
    assert _rates(scheduler, optimizer, 2, False)[-1] == pytest.approx(0.1)  # not 0.9


def _three_groups(lr: float = 1.0) -> torch.optim.SGD:
    groups = [
        {"params": [torch.zeros(1, requires_grad=True)], "lr": lr * (i + 1)} for i in range(3)
    ]
    return torch.optim.SGD(groups, lr=lr)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("removed", [[0], [1], [2], [0, 1], [2, 0]])
def test_groups_that_are_removed_as_in_torch(removed: list[int], after: int) -> None:
    curves = []
    for module in (torchs, ours):
        optimizer = _three_groups()
        scheduler = module.SWALR(optimizer, [0.1, 0.2, 0.3], 4, "linear")
        for step in range(8):
            if step == after:
                for index in sorted(removed, reverse=True):
                    del optimizer.param_groups[index]
            optimizer.step()
            scheduler.step()
            curves.append([float(g["lr"]) for g in optimizer.param_groups])
    for theirs, own in zip(curves[:8], curves[8:], strict=True):
        assert own == pytest.approx(theirs)


def test_groups_that_move_or_come_back() -> None:
    optimizer = _three_groups()
    scheduler = ours.SWALR(optimizer, [0.1, 0.2, 0.3], 2, "linear")
    _rates(scheduler, optimizer, 1, False)
    optimizer.param_groups.reverse()
    optimizer.load_state_dict(optimizer.state_dict())  # makes new groups around the old parameters
    optimizer.param_groups.insert(1, {**optimizer.param_groups[0], "params": [], "lr": 9.0})
    _rates(scheduler, optimizer, 1, False)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.3, 0.3, 0.2, 0.1])
    del optimizer.param_groups[:3]
    twin = copy.deepcopy(scheduler)
    twin.step()
    assert [g["lr"] for g in twin.optimizer.param_groups] == pytest.approx([0.1])


@pytest.mark.parametrize("module", [torchs, ours])
def test_a_caller_s_tensors_and_states_are_copies(module) -> None:
    """As in torch: what goes in and out may be changed without changing the scheduler."""
    target = torch.tensor(0.1, dtype=torch.float64)
    several = [torch.tensor(0.1, dtype=torch.float64), 0.2, 0.3]
    for given in (target, several):
        optimizer = _three_groups()
        scheduler = module.SWALR(optimizer, given, 2, "linear")
        (target if given is target else several[0]).fill_(7.0)
        _rates(scheduler, optimizer, 1, False)
        state = scheduler.state_dict()
        loaded = module.SWALR(_three_groups(), 0.5, 2, "linear")
        loaded.load_state_dict(state)
        if module is ours:
            for name in ("_targets", "_starts", "base_lrs", "_last_lr"):
                for held in (scheduler, loaded):
                    assert getattr(held, name) is not state[name]
                state[name][:] = [99.0] * 3
        _rates(scheduler, optimizer, 3, False)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
        target.fill_(0.1)


def test_a_state_of_ours_loads_in_torch() -> None:
    optimizer = _three_groups()
    scheduler = ours.SWALR(optimizer, [0.1, 0.2, 0.3], 4, "linear")
    _rates(scheduler, optimizer, 2, False)
    other = _three_groups()
    again = torchs.SWALR(other, [0.1, 0.2, 0.3], 4, "linear")
    again.load_state_dict(scheduler.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for one, steps in ((scheduler, 3), (again, 3)):
        _rates(one, one.optimizer, steps, False)
    rates = [[g["lr"] for g in o.param_groups] for o in (optimizer, other)]
    assert rates[0] == pytest.approx(rates[1])


def test_inside_sequential_and_with_tensor_rates() -> None:
    for lr in (1.0, torch.tensor(1.0)):
        curves = []
        for module in (torchs, ours):
            parameter = torch.zeros(1, requires_grad=True)
            optimizer = torch.optim.Adam([parameter], lr=copy.copy(lr))
            if isinstance(lr, torch.Tensor):
                optimizer = torch.optim.Adam([parameter], lr=lr.clone())
            first = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=3)
            second = module.SWALR(optimizer, 0.1, anneal_epochs=3)
            scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], [3])
            curves.append([])
            for _ in range(9):
                optimizer.step()
                scheduler.step()
                curves[-1].append(float(optimizer.param_groups[0]["lr"]))
        assert curves[0] == pytest.approx(curves[1])


def test_deepcopy_and_dtype_changes_of_the_average_itself() -> None:
    model = nn.Linear(1, 1).bfloat16()
    average = _walk(ours, model, [1.0, 2.0])
    twin = copy.deepcopy(average)
    for a in (average, twin):
        a.update_parameters(model)
    assert torch.equal(average.module.weight, twin.module.weight)
    average.float().update_parameters(model)
    assert average.module.weight.dtype == torch.float32
