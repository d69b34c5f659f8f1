"""A loan leaves no traces: what layers do to lent weights is undone on them, and nowhere else."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import swa_utils as torchs

import polyak
from polyak import EMA, SWA, Average, Window
from polyak.errors import PolyakWarning, StaleStatistics, UsageError
from polyak.tensors.memory import address


class Folding(nn.Linear):
    """LoRA that folds itself into the frozen weight in evaluation mode, as loralib does."""

    def __init__(self):
        super().__init__(4, 4)
        self.weight.requires_grad_(False)
        self.folded = False
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def train(self, mode=True):
        super().train(mode)
        if mode == self.folded:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).data
            self.folded = not mode
        return self

    def forward(self, x):
        return super().forward(x) + (0 if self.folded else x @ self.down.T @ self.up.T)


class Rescaling(nn.Module):
    """Weights that the first forward pass in another mode rescales, as RWKV does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.rescaled, self.history = False, []

    def forward(self, x):
        if self.rescaled == self.training:
            with torch.no_grad():
                self.body.weight.mul_(4.0 if self.training else 0.25)
            self.rescaled = not self.training
            self.history.append(self.rescaled)
        return self.body(x)


def plain(x, average):
    """What the averaged model gives, computed on a model that was never lent to."""
    model = copy.deepcopy(average.model).train()
    model.load_state_dict(average.averaged_tensors())
    return model(x)


def trained(model, profile=None, **options):
    average = Average(model, profile or SWA(), **options)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape))
        average.update()
    return average


@pytest.mark.parametrize("memory", ["torch", "numpy", "safetensors"])
def test_a_frozen_weight_in_memory_that_is_not_torchs(tmp_path, memory):
    model = nn.Sequential(Folding(), nn.Linear(4, 1))
    frozen = model[0].weight.detach().clone()
    if memory == "numpy":
        model[0].weight.data = torch.from_numpy(frozen.numpy().copy())
    elif memory == "safetensors":
        save_file({"w": frozen}, tmp_path / "base.safetensors")
        model[0].weight.data = load_file(tmp_path / "base.safetensors")["w"]
    average, x = trained(model), torch.randn(5, 4)
    expected = plain(x, average)
    for _ in range(3):
        with average.applied():
            model.eval()
            torch.testing.assert_close(model(x), expected)
        model.train()
        torch.testing.assert_close(model[0].weight, frozen, rtol=0, atol=1e-5)


@pytest.mark.parametrize("profile", [SWA(), EMA(decay=0.9999, keep_initial=True), Window(length=2)])
class TestLayersThatFoldThemselves:
    def test_the_frozen_weight_comes_back_to_the_bit(self, profile):
        model = nn.Sequential(Folding(), nn.Linear(4, 1))
        average, frozen, x = trained(model, profile), model[0].weight.clone(), torch.randn(5, 4)
        expected, before = plain(x, average), copy.deepcopy(model.state_dict())
        own = average.averaged_tensors()
        for _ in range(3):
            with average.applied():
                model.eval()
                torch.testing.assert_close(model(x), expected)
                model.train()
                torch.testing.assert_close(model(x), expected)
            assert torch.equal(model[0].weight, frozen)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
        for name, tensor in average.averaged_tensors().items():
            assert torch.equal(tensor, own[name])

    def test_modes_stay_where_the_block_left_them(self, profile):
        model = nn.Sequential(Folding(), nn.Dropout(), nn.Linear(4, 1))
        average, x = trained(model, profile), torch.randn(5, 4)
        frozen = model[0].weight.clone()
        live = copy.deepcopy(model).eval()(x)
        with average.applied():
            model.eval()
        assert not any(module.training for module in model.modules())
        assert model[0].folded
        torch.testing.assert_close(model(x), live)
        model.train()
        torch.testing.assert_close(model[0].weight, frozen, rtol=0, atol=1e-6)

    def test_a_model_that_is_folded_already(self, profile):
        model = nn.Sequential(Folding(), nn.Linear(4, 1))
        average, x = trained(model, profile), torch.randn(5, 4)
        expected = plain(x, average)
        model.eval()
        live = model(x)
        with average.applied():
            torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x), live)

    def test_in_place_the_modes_are_undone(self, profile):
        model = nn.Sequential(Folding(), nn.Linear(4, 1))
        average, frozen, x = trained(model, profile), model[0].weight.clone(), torch.randn(5, 4)
        expected = plain(x, average)
        for _ in range(3):
            with average.applied(in_place=True):
                model.eval()
                torch.testing.assert_close(model(x), expected)
            model.train()
            torch.testing.assert_close(model[0].weight, frozen, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("profile", "options"),
    [(SWA(), {}), (SWA(), {"dtype": torch.float64}), (Window(length=2), {})],
)
def test_layers_that_rescale_their_weights_in_the_forward_pass(profile, options):
    model = Rescaling()
    average, x = trained(model, profile, **options), torch.randn(5, 4)
    own, live = average.averaged_tensors(), copy.deepcopy(model.state_dict())
    for _ in range(3):
        with average.applied():
            model.eval()
            model(x)
            assert model.rescaled
            assert torch.equal(model.body.weight, own["body.weight"] / 4)
        assert (model.rescaled, model.history, model.training) == (False, [], False)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, live[name])
        for name, tensor in average.averaged_tensors().items():
            assert torch.equal(tensor, own[name])
        model.train()


class Loop(nn.Module):
    """A module that keeps the scores of its own validation, as Lightning's do."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.best, self.epochs = inner, None, []

    def validate(self, x):
        self.eval()
        self.inner(x)
        self.best = 0.9
        self.epochs.append(1)


class Observed(nn.Module):
    """A layer of quantisation-aware training: a buffer is written to in every forward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.inner.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        torch.maximum(self.inner.largest, x.abs().max(), out=self.inner.largest)
        return self.inner(x)


@pytest.mark.parametrize("inner", [nn.LSTM(4, 4), nn.BatchNorm1d(4), Observed()])
def test_what_the_loop_notes_in_the_block_stays(inner):
    model = Loop(inner)
    average, x = trained(model), torch.randn(5, 4)
    for turn in range(2):  # the warning comes once
        stale = turn == 0 and isinstance(inner, nn.BatchNorm1d)
        warns = pytest.warns(StaleStatistics) if stale else nullcontext()
        with warns, average.applied():
            inner(x)  # in training mode
            model.validate(x)
        average.update()
        model.train()
    assert (model.best, model.epochs) == (0.9, [1, 1])


class Loosely(nn.Module):
    """A flag far above the weight that it is about."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.Sequential(nn.Linear(4, 4)))])
        self.is_halved = False

    def forward(self, x):
        if not self.training and not self.is_halved:
            self.parts[0][0][0].weight.data.mul_(0.5)
            self.is_halved = True
        return self.parts[0](x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flags_further_up(dtype):
    model = Loosely().to(dtype)
    average = trained(model)
    with average.applied():
        model.eval()(torch.randn(5, 4, dtype=dtype))
        assert model.is_halved
    assert not model.is_halved


def test_in_place_there_is_nothing_to_restore_the_average_from():
    model = Rescaling()
    average = trained(model)
    live = copy.deepcopy(model.state_dict())
    said = pytest.warns(PolyakWarning, match=r"body\.weight: written to")
    with said, average.applied(in_place=True):
        model.eval()
        model(torch.randn(5, 4))
    assert not model.rescaled
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name])


def test_what_the_average_does_not_hold_leaves_the_block_as_it_came():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    model.register_buffer("calls", torch.zeros(()))
    average = trained(model)
    before = copy.deepcopy(model.state_dict())
    with average.applied():
        model[1].weight.data.zero_()
        model.calls += 1
        model[0].weight.data.fill_(7.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not (average.averaged_tensors()["0.weight"] == 7.0).any()


def test_nothing_is_copied_where_nothing_is_written():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model[0].requires_grad_(False)
    average = trained(model)
    x = torch.randn(2, 3, 4, 4)
    average.update_bn([x])
    model.eval()
    live = [address(tensor) for tensor in model.state_dict().values()]
    with average.applied():
        before = [address(tensor) for tensor in model.state_dict().values()]
        model(x)
        assert before == [address(tensor) for tensor in model.state_dict().values()]
        assert address(model[0].weight) == live[0]
    assert live == [address(tensor) for tensor in model.state_dict().values()]


def test_a_state_dict_taken_inside_keeps_its_values():
    model = nn.Linear(2, 2)
    average = trained(model)
    own = average.averaged_tensors()
    with average.applied():
        taken = model.state_dict()
    trained_on = trained(model)
    average.update()
    for name, tensor in taken.items():
        assert torch.equal(tensor, own[name])
    assert trained_on.count == 3


def test_an_optimizer_of_other_parameters_is_refused_inside():
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    average = trained(model, include="head.*")
    optimizer = torch.optim.SGD(model["body"].parameters(), lr=1.0)
    before = model["body"].weight.clone()
    model["body"].weight.grad = torch.ones(2, 2)
    with average.applied(), pytest.raises(UsageError, match=r"SGD\.step\(\) inside applied"):
        optimizer.step()
    assert torch.equal(model["body"].weight, before)


def _evaluator(model, go, seen):
    torch.set_num_threads(1)
    go.wait()
    seen.put(model.weight.detach().mean().item())


def test_a_model_in_shared_memory_is_lent_to_all_processes():
    model = nn.Linear(3, 3)
    average = trained(model)  # bound before the memory is shared
    model.share_memory()
    average.update()
    context = mp.get_context("fork")
    go, seen = context.Event(), context.Queue()
    process = context.Process(target=_evaluator, args=(model, go, seen))
    process.start()
    with average.applied():
        go.set()
        found = seen.get()
        assert found == model.weight.mean().item()
    process.join()
    assert found != model.weight.mean().item()


class TestStatistics:
    """Refreshed is what was measured, by each layer's own record."""

    @staticmethod
    def make(*layers):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), *(layers or (nn.BatchNorm1d(4),)))
        average = Average(model, SWA())
        for _ in range(5):
            with torch.no_grad():
                model[0].weight.add_(torch.randn(4, 3))
            model(torch.randn(16, 3))
            average.update()
        return model, average, torch.randn(64, 3).split(16)

    def test_a_forward_in_training_mode_measures_nothing(self):
        model, average, data = self.make()
        before = average.averaged_tensors()
        with pytest.warns(StaleStatistics, match="before evaluating"), average.applied():
            model(data[0])
        assert average._member.stale_layers() == ["1"]
        for name, tensor in average.averaged_tensors().items():
            assert torch.equal(tensor, before[name])
        assert model[1].num_batches_tracked == 5

    def test_torchs_update_bn_measures(self):
        model, average, data = self.make()
        with average.applied():
            torchs.update_bn(data, model)
            inside = model[1].running_var.clone()
            assert torch.equal(average.averaged_tensors()["1.running_var"], inside)
        assert average._member.stale_layers() == []
        assert torch.equal(average.averaged_tensors()["1.running_var"], inside)

    def test_only_what_was_reached_is_fresh(self):
        _model, average, data = self.make(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        with pytest.warns(StaleStatistics, match="2 was never called"):
            average.update_bn(data, forward=lambda m, x: m[1](m[0](x)))
        assert average._member.stale_layers() == ["2"]
        average.update_bn(data)
        assert average._member.stale_layers() == []

    def test_functional_batch_norm_on_the_buffers_of_a_layer(self):
        class Around(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(4)

            def forward(self, x):
                norm = self.norm
                return nn.functional.batch_norm(
                    x, norm.running_mean, norm.running_var, training=self.training
                )

        _model, average, data = self.make(Around(), nn.BatchNorm1d(4))
        with pytest.warns(StaleStatistics, match=r"1\.norm was never called"):
            average.update_bn(data)
        assert average._member.stale_layers() == ["1.norm"]

    def test_layers_whose_affine_parameters_are_frozen_move_all_the_same(self, tmp_path):
        model, average, data = self.make(nn.BatchNorm1d(4).requires_grad_(False))
        with pytest.warns(StaleStatistics):
            average.save(tmp_path / "stale.safetensors")
        average.update_bn(data)
        with average.applied():
            x = model[0](torch.cat(data))
            torch.testing.assert_close(model[1].running_mean, x.mean(0))
        average.save(tmp_path / "fresh.safetensors")

    def test_written_by_hand_in_evaluation_mode(self):
        model, average, _ = self.make(
            nn.Unflatten(1, (1, 4)), nn.InstanceNorm1d(1, track_running_stats=True)
        )
        model.eval()
        with average.applied():
            model[2].running_mean.fill_(3.0)
        assert average._member.stale_layers() == []
        assert average.averaged_tensors()["2.running_mean"].item() == 3.0

    def test_statistics_that_are_averaged_keep_their_average(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        average = Average(model, EMA(decay=0.9), average_buffers="*")
        alone = Average(model, EMA(decay=0.9), average_buffers="*")
        for index in range(10):
            model(torch.randn(16, 2))
            average.update()
            alone.update()
            if index == 4:
                average.update_bn([torch.randn(64, 2) + 100 for _ in range(3)])
                refreshed = average.averaged_tensors()["1.running_mean"]
                assert (refreshed.abs() > 5).all()
                again = Average(model, EMA(decay=0.9), average_buffers="*")
                again.load_state_dict(copy.deepcopy(average.state_dict()))
                assert torch.equal(again.averaged_tensors()["1.running_mean"], refreshed)
                with average.applied():
                    assert torch.equal(model[1].running_mean, refreshed)
                    model(torch.randn(16, 2) - 500)
        found, expected = average.averaged_tensors(), alone.averaged_tensors()
        assert torch.equal(found["1.running_mean"], expected["1.running_mean"])
        assert torch.equal(found["1.running_var"], expected["1.running_var"])

    def test_which_layers_are_fresh_survives_a_resume(self):
        model, average, data = self.make()
        average.update_bn(data)
        again = Average(model, SWA())
        again.load_state_dict(copy.deepcopy(average.state_dict()))
        assert again._member.stale_layers() == []
        polyak.update_bn(model, data)  # the live model's statistics are another matter
        average.update()
        assert average._member.stale_layers() == ["1"]
