"""`applied()` is a loan: no copy, everything given back, nothing trained meanwhile."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import polyak
from polyak import EMA, SWA, Average, Window
from polyak.errors import EmptyAverage, NonFiniteError, StaleStatistics, UsageError
from polyak.tensors.memory import address


def filled(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def averaged(model, *values, profile=None, **options):
    """An average of the model filled with each value."""
    average = Average(model, profile or SWA(), **options)
    for value in values:
        filled(model, value)
        average.update()
    return average


def test_storage_is_exchanged_without_a_copy():
    model = nn.Linear(3, 2)
    average = averaged(model, 1.0, 3.0)
    live, kept = address(model.weight), address(average._member.accumulator.tensors[0])
    with average.applied() as same:
        assert same is model
        assert address(model.weight) == kept
        assert model.weight.tolist() == [[2.0] * 3] * 2
    assert address(model.weight) == live


def test_another_dtype_takes_no_more_than_the_live_weights():
    model = nn.Linear(300, 200).bfloat16()
    average = averaged(model, 1.0, 2.0)
    with average.applied():
        assert model.weight.dtype is torch.bfloat16
        assert model.weight.untyped_storage().nbytes() == 300 * 200 * 2
    assert model.weight[0, 0] == 2.0


def test_in_place_keeps_every_address():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = averaged(model, 1.0, 3.0)
    addresses = [t.data_ptr() for t in model.state_dict().values()]
    average.update_bn([torch.randn(8, 3)])
    with average.applied(in_place=True):
        assert addresses == [t.data_ptr() for t in model.state_dict().values()]
        assert model[0].weight[0, 0] == 2.0
        assert average.averaged_tensors()["0.weight"][0, 0] == 2.0
        assert average.state_dict()["tensors"]["0.weight"][0, 0] == 2.0
    assert model[0].weight[0, 0] == 3.0


def test_empty_leaves_the_model_and_says_so_once():
    model = nn.Linear(3, 2)
    average = Average(model, SWA())
    before = model.weight.clone()
    with (
        pytest.warns(EmptyAverage, match="nothing has been averaged yet") as caught,
        average.applied(),
    ):
        assert torch.equal(model.weight, before)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with average.applied():
            pass


def test_empty_copies_and_measures_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(EmptyAverage):
        Average(model, SWA()).copy_to(model)
    with pytest.warns(EmptyAverage):
        Average(model, SWA()).update_bn([torch.randn(4, 3)])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(UsageError, match="nothing has been averaged"):
        Average(model, SWA()).save("never.safetensors")
    with pytest.raises(UsageError, match="nothing has been averaged"):
        Average(model, SWA()).averaged_tensors()


def test_before_its_start_an_average_is_empty():
    model = nn.Linear(3, 2)
    average = Average(model, polyak.After(2, SWA()))
    average.update()
    average.update()
    assert (average.time, average.count) == (2, 0)
    with pytest.warns(EmptyAverage), average.applied():
        pass


def test_nesting_the_same_is_one_loan():
    model = nn.Linear(3, 2)
    average = averaged(model, 1.0, 3.0)
    with average.applied():
        with average.applied():
            assert model.weight[0, 0] == 2.0
        assert model.weight[0, 0] == 2.0
    assert model.weight[0, 0] == 3.0


def test_another_average_of_the_same_weights_is_refused():
    model = nn.Linear(3, 2)
    one, two = averaged(model, 1.0, 3.0), averaged(model, 1.0, 3.0, profile=EMA(decay=0.5))
    with one.applied():
        with pytest.raises(UsageError, match="swa"), two.applied():
            pass
        for call in (two.update, one.update, lambda: one.copy_to(model)):
            with pytest.raises(UsageError, match="inside applied"):
                call()
    assert model.weight[0, 0] == 3.0
    assert two.count == 2


def test_steps_are_refused_attached_or_not():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    average = averaged(model, 1.0, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unrelated = torch.optim.SGD(other.parameters(), lr=0.1)
    with average.applied():
        model(torch.ones(1, 3)).sum().backward()
        with pytest.raises(UsageError, match=r"SGD\.step"):
            optimizer.step()
        unrelated.step()
    assert model.weight[0, 0] == 3.0
    optimizer.step()


def test_check_refuses_before_anything_is_lent():
    model = nn.Linear(3, 2)
    average = averaged(model, 1.0, float("nan"))
    filled(model, 5.0)
    with pytest.raises(NonFiniteError, match="weight, bias"), average.applied(check=True):
        pass
    assert model.weight[0, 0] == 5.0
    with pytest.raises(NonFiniteError, match="weight, bias"):
        average.copy_to(model)
    with average.applied():  # whoever does not ask may look
        assert model.weight.isnan().all()


def test_a_model_saved_inside_saves_the_average():
    model = nn.Linear(3, 2)
    average = averaged(model, 1.0, 3.0)
    file = io.BytesIO()
    with average.applied():
        torch.save(model.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["weight"][0, 0] == 2.0


def test_gradients_flow_and_optimizers_go_on_after_it():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    average = averaged(model, 1.0, 3.0)
    with average.applied(), torch.inference_mode():
        assert model(torch.ones(1, 3))[0, 0] == 8.0
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert model.weight[0, 0] == 2.5


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    average = averaged(model, 1.0, 3.0)
    with average.applied():
        assert model[1].weight is model[0].weight
        assert model[1].weight[0, 0] == 2.0
    assert len(average.state_dict()["tensors"]) == 1


def test_views_of_one_storage_stay_views():
    flat = torch.arange(6.0)
    model = nn.Module()
    model.a = nn.Parameter(flat[:4].view(2, 2))
    model.b = nn.Parameter(flat[4:])
    average = averaged(model, 1.0, 3.0)
    with average.applied():
        assert flat.tolist() == [2.0] * 6
        assert model.a.untyped_storage().data_ptr() == model.b.untyped_storage().data_ptr()
    assert flat.tolist() == [3.0] * 6


def test_channels_last_stays_channels_last():
    model = nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last)
    average = averaged(model, 1.0, 3.0)
    with average.applied():
        assert model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm_shows_the_average_and_then_its_own():
    model = nn.utils.weight_norm(nn.Linear(3, 2))
    model(torch.ones(1, 3))
    average = Average(model, SWA())
    average.update()
    with torch.no_grad():
        model.weight_g.mul_(3)
    average.update()
    model(torch.ones(1, 3))
    own = model.weight.clone()
    with average.applied():
        torch.testing.assert_close(model.weight, own * 2 / 3)
    assert torch.equal(model.weight, own)
    assert "weight" not in average.state_dict()["tensors"]


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_spectral_norm_vectors_are_of_the_newest():
    for model in (
        nn.utils.spectral_norm(nn.Linear(3, 2)),
        parametrizations.spectral_norm(nn.Linear(3, 2)),
    ):
        average = Average(model, SWA())
        average.update()
        model(torch.randn(4, 3))
        average.update()
        vectors = {n: b.clone() for n, b in model.named_buffers()}
        with average.applied():
            model.eval()
            model(torch.randn(4, 3))
            assert all(torch.equal(b, vectors[n]) for n, b in model.named_buffers())
        assert not set(vectors) & set(average.state_dict()["tensors"])


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("normed", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_only_full_names_average_spectral_norm_vectors(normed):
    model = normed(nn.Linear(3, 2))
    model.register_buffer("scale_u", torch.ones(2))
    vectors = {name for name, _ in model.named_buffers()} - {"scale_u"}
    average = Average(model, SWA(), average_buffers="*")
    average.update()
    stored = average.state_dict()["tensors"]
    assert "scale_u" in stored
    assert not vectors & set(stored)
    named = Average(model, SWA(), average_buffers=sorted(vectors))
    named.update()
    assert vectors <= set(named.state_dict()["tensors"])


def test_pruned_layers_show_the_average():
    model = prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=2)
    average = Average(model, SWA())
    average.update()
    with torch.no_grad():
        model.weight_orig.mul_(3)
    average.update()
    with average.applied():
        torch.testing.assert_close(model.weight, model.weight_orig * model.weight_mask)


def test_cached_parametrizations_are_cleared():
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    average = Average(model, SWA())
    average.update()
    with torch.no_grad():
        model.parametrizations.weight.original0.mul_(3)
    average.update()
    with parametrize.cached():
        own = model.weight.clone()
        with average.applied():
            torch.testing.assert_close(model.weight, own * 2 / 3)
        assert torch.equal(model.weight, own)


def test_compiled_models_are_not_recompiled_and_take_effect():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = nn.Linear(3, 2)
    compiled = torch.compile(model, backend=backend)
    average = averaged(compiled, 1.0, 3.0)
    x = torch.ones(1, 3)
    assert compiled(x)[0, 0] == 12.0
    for in_place in (False, True):
        with average.applied(in_place=in_place):
            assert compiled(x)[0, 0] == 8.0
        assert compiled(x)[0, 0] == 12.0
    assert len(graphs) == 1
    assert set(average.averaged_tensors()) == {"weight", "bias"}


def test_recurrent_layers():
    model = nn.LSTM(3, 2)
    average = averaged(model, 0.1, 0.3)
    x = torch.randn(4, 1, 3)
    own = model(x)[0]
    with average.applied():
        twin = nn.LSTM(3, 2)
        filled(twin, 0.2)
        torch.testing.assert_close(model(x)[0], twin(x)[0])
    assert torch.equal(model(x)[0], own)


def test_copy_to_is_for_good_and_fits_another_model():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    average = averaged(model, 1.0, 3.0)
    average.copy_to(other)
    assert other.weight[0, 0] == 2.0
    assert model.weight[0, 0] == 3.0
    average.copy_to(model)
    assert model.weight[0, 0] == 2.0


def test_copy_to_names_everything_that_does_not_fit():
    average = averaged(nn.Sequential(nn.Linear(3, 2)), 1.0)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = other[0].weight.clone()
    with pytest.raises(
        polyak.PolyakError, match=r"unexpected \(2\): 1.bias, 1.weight(.|\n)*0.weight"
    ):
        average.copy_to(other)
    assert torch.equal(other[0].weight, before)


class TestBatchNorm:
    @staticmethod
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        average = Average(model, SWA())
        for _ in range(3):
            with torch.no_grad():
                model[0].weight.add_(1)
            model(torch.randn(16, 3))
            average.update()
        return model, average

    def test_statistics_are_of_the_newest_at_the_last_update(self):
        model, average = self.make()
        newest = model[1].running_mean.clone()
        model(torch.randn(16, 3))
        with pytest.warns(StaleStatistics), average.applied():
            assert torch.equal(model[1].running_mean, newest)
        assert not torch.equal(model[1].running_mean, newest)
        assert average.averaged_tensors()["1.num_batches_tracked"] == 3

    def test_update_bn_is_kept_until_the_next_update(self, tmp_path):
        model, average = self.make()
        own, data = model[1].running_mean.clone(), torch.randn(64, 3)
        average.update_bn(data.split(16))
        assert torch.equal(model[1].running_mean, own)
        expected = (data @ average.averaged_tensors()["0.weight"].T).mean(0)
        expected += average.averaged_tensors()["0.bias"]
        for _ in range(2):
            with average.applied():
                torch.testing.assert_close(model[1].running_mean, expected)
        average.save(tmp_path / "fresh.safetensors")
        average.update()
        assert torch.equal(average.averaged_tensors()["1.running_mean"], own)

    def test_update_bn_inside_applied_is_kept_too(self, tmp_path):
        model, average = self.make()
        for in_place in (False, True):
            with average.applied(in_place=in_place):
                polyak.batchnorm.update_bn(model, torch.randn(64, 3).split(16))
                inside = model[1].running_mean.clone()
            assert torch.equal(average.averaged_tensors()["1.running_mean"], inside)
            average.save(tmp_path / f"{in_place}.safetensors")

    def test_evaluation_inside_applied_changes_nothing(self):
        model, average = self.make()
        model.eval()
        with pytest.warns(StaleStatistics) as caught, average.applied():
            model(torch.randn(4, 3))
        assert len(caught) == 1
        with average.applied():  # it is said once
            model(torch.randn(4, 3))
        assert average._member.stale_layers() == ["1"]

    def test_layers_frozen_at_the_last_capture_stay_frozen(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        model[0].eval()
        average = Average(model, SWA())
        average.update()
        model.eval()  # all are in evaluation mode now: the modes of the capture decide
        average.update_bn((torch.randn(64, 3) + 5).split(16))
        found = average.averaged_tensors()
        assert found["0.running_mean"].abs().max() == 0
        assert found["1.running_mean"].abs().min() > 1


def test_a_window_is_applied_and_keeps_its_snapshots():
    model = nn.Linear(3, 2)
    average = averaged(model, 1.0, 2.0, 4.0, profile=Window(2))
    assert len(average._member.accumulator.kept) == 2
    with average.applied():
        assert model.weight[0, 0] == 3.0
    assert "1 now" not in str(average.plan())
    assert "2 now" in str(average.plan())


class TestLend:
    """A loan that spans calls; `applied` is made of it."""

    def test_it_is_given_back_once(self):
        model = nn.Linear(2, 1)
        average = averaged(model, 1.0, 3.0)
        loan = average.lend()
        assert model.weight[0, 0] == 2.0
        with pytest.raises(UsageError, match="inside applied"):
            average.update()
        loan.give_back()
        assert model.weight[0, 0] == 3.0
        filled(model, 5.0)
        loan.give_back()
        assert model.weight[0, 0] == 5.0
        average.update()
        assert average.count == 3

    def test_the_outer_loan_decides(self):
        model = nn.Linear(2, 1)
        average = averaged(model, 1.0, 3.0)
        with average.lend() as outer:
            inner = average.lend()
            with average.applied():
                assert model.weight[0, 0] == 2.0
            inner.give_back()
            assert model.weight[0, 0] == 2.0
            outer.give_back()
            assert model.weight[0, 0] == 3.0

    def test_nothing_is_lent_where_a_check_fails_or_nothing_was_averaged(self):
        model = nn.Linear(2, 1)
        average = Average(model, SWA())
        assert average.empty
        with pytest.warns(EmptyAverage) as caught:
            average.lend().give_back()
        assert caught[0].filename == __file__
        filled(model, float("nan"))
        average.update()
        assert not average.empty
        with pytest.raises(NonFiniteError):
            average.lend(check=True)
        filled(model, 1.0)
        average.update()

    def test_another_average_of_the_same_weights_is_refused(self):
        model = nn.Linear(2, 1)
        one, other = averaged(model, 1.0), averaged(model, 2.0)
        loan = one.lend()
        with pytest.raises(UsageError, match="holds the weights of"):
            other.lend()
        loan.give_back()
        other.lend().give_back()


@pytest.mark.parametrize(
    "begin",
    [
        lambda model, folder: polyak.Average(model, polyak.SWA()),
        lambda model, folder: polyak.Averages(model, {"a": "swa", "b": "ema:decay=0.9"}),
        lambda model, folder: polyak.SWAG(model),
        lambda model, folder: polyak.Recorder(model, folder, interval=2),
    ],
    ids=["Average", "Averages", "SWAG", "Recorder"],
)
def test_what_has_taken_nothing_yet_takes_nothing_from_a_lent_model(tmp_path, begin):
    model = torch.nn.Linear(4, 2)
    lent = polyak.Average(model, polyak.SWA())
    lent.update()
    with torch.no_grad():
        model.weight.add_(1)
    other = begin(model, tmp_path / "record")
    with lent.applied(), pytest.raises(UsageError, match="update"):
        other.update()
    other.update()


class Deployed(nn.Module):
    """In evaluation mode its scale is in its weight, as a new parameter."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(2.0))

    def fold(self):
        self.weight = nn.Parameter(self.weight.detach() * self.scale.detach())
        self.scale = None

    def forward(self, x):
        return x * self.weight * (1 if self.scale is None else self.scale)


def replaced(model):
    model[1].weight = nn.Parameter(model[1].weight.detach() * 2)


def without_bias(model):
    model[1].bias = None


@pytest.mark.parametrize("change", [replaced, without_bias, lambda model: model[0].fold()])
@pytest.mark.parametrize("in_place", [False, True])
def test_parameters_that_a_block_registers_anew_are_put_back(change, in_place):
    model = nn.Sequential(Deployed(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = polyak.Average(model, "swa")
    average.attach(optimizer)

    def step():
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    parameters = dict(model.named_parameters())
    live = {name: p.detach().clone() for name, p in parameters.items()}
    averaged = average.averaged_tensors()
    with torch.no_grad(), average.applied(in_place=in_place):
        change(model)
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())
    assert all(torch.equal(t, averaged[n]) for n, t in average.averaged_tensors().items())
    step()
    assert average.count == 2
    assert not any(torch.equal(p, live[name]) for name, p in model.named_parameters())
