"""What `update_bn` changes, what it restores, and what it refuses."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from reference.batchnorm import channel_statistics
from torch import Tensor, nn

import polyak.errors
from polyak.batchnorm import norm_layers, trained_layers, update_bn


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2)
    )


def _batches(n: int = 4) -> list[Tensor]:
    return list(torch.randn(8 * n, 3, generator=torch.Generator().manual_seed(1)).split(8))


def _state(model: nn.Module) -> dict[str, object]:
    state: dict[str, object] = {k: v.clone() for k, v in model.state_dict().items()}
    for name, module in model.named_modules():
        state[name + ":mode"] = module.training
        state[name + ":momentum"] = getattr(module, "momentum", 0)
        state[name + ":dict"] = set(module.__dict__)
        state[name + ":hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
    state["buffers"] = [id(b) for b in model.buffers()]
    state["random"] = torch.get_rng_state()
    return state


def _assert_same(a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key]
        assert same, key


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("passes", [1, 3])
def test_everything_but_the_statistics_comes_back(training: bool, passes: int) -> None:
    model = _model().train(training)
    model[1].momentum = None
    model[4].momentum = 0.37
    model[3].eval()
    before = _state(model)
    update_bn(model, _batches(), passes=passes)
    after = _state(model)
    _assert_same(
        {k: v for k, v in before.items() if not k.endswith(STATISTICS)},
        {k: v for k, v in after.items() if not k.endswith(STATISTICS)},
    )
    assert model[1].num_batches_tracked == 4


class Stop(Exception):
    pass


def _failing(n: int) -> Iterator[Tensor]:
    yield from _batches()[:n]
    raise Stop


@pytest.mark.parametrize("estimator", ["pooled", "torch"])
@pytest.mark.parametrize("passes", [1, 2])
def test_after_an_error_all_is_as_it_was(estimator: str, passes: int) -> None:
    if estimator == "torch" and passes == 2:
        pytest.skip("torch makes one pass")
    model = _model()
    model[1].eval()
    before = _state(model)
    calls = itertools.count()

    def forward(m: nn.Module, batch: Tensor) -> Tensor:
        if next(calls) == 4 * passes - 2:
            raise Stop
        return m(batch)

    with pytest.raises(Stop):
        update_bn(model, _batches(), forward=forward, passes=passes, estimator=estimator)
    _assert_same(before, _state(model))
    with pytest.raises(Stop):
        update_bn(model, _failing(2), estimator=estimator)
    _assert_same(before, _state(model))


def test_nan_is_refused_by_the_name_of_the_layer_it_came_to_first() -> None:
    model, batches = _model(), _batches()
    batches[2][3, 1] = torch.nan
    before = _state(model)
    with pytest.raises(polyak.errors.NonFiniteError, match="Layer '1' saw a NaN"):
        update_bn(model, batches)
    _assert_same(before, _state(model))


def test_first_means_first_called() -> None:
    model = nn.ModuleDict({"late": nn.BatchNorm1d(3), "early": nn.BatchNorm1d(3)})
    with pytest.raises(polyak.errors.NonFiniteError, match="'early'"):
        update_bn(
            model, [torch.full((4, 3), torch.inf)], forward=lambda m, x: m["late"](m["early"](x))
        )


def test_a_frozen_layer_in_evaluation_mode_is_left_alone() -> None:
    model = _model()
    model[1].eval()
    old = model[1].running_mean.clone()
    update_bn(model, _batches())
    assert torch.equal(model[1].running_mean, old)
    assert model[4].num_batches_tracked == 4
    seen = torch.cat(_batches())
    with torch.no_grad():  # the frozen layer normalised by its own statistics, without dropout
        expected = channel_statistics(model.eval()[:4](seen))
    torch.testing.assert_close(model[4].running_mean.double(), expected[0], rtol=1e-5, atol=1e-6)


def test_a_layer_without_gradients_is_frozen_unless_nothing_has_any() -> None:
    model = _model()
    model[1].requires_grad_(False)
    assert list(trained_layers(model)) == ["1", "4"]  # its statistics move all the same
    assert list(trained_layers(model.eval())) == ["4"]
    model.requires_grad_(False)  # as in an averaged copy: it says nothing about the layers
    assert list(trained_layers(model)) == ["1", "4"]


def test_layers_overrides_what_is_frozen() -> None:
    model = _model()
    model[1].eval()
    for layers in (["1"], [model[1]]):
        fresh = copy.deepcopy(model)
        fresh_layers = [fresh[1]] if isinstance(layers[0], nn.Module) else layers
        update_bn(fresh, _batches(), layers=fresh_layers)
        assert fresh[1].num_batches_tracked == 4
        assert fresh[4].num_batches_tracked == 0
        assert not fresh[1].training
    with pytest.raises(
        polyak.errors.MismatchError, match=r"unexpected \(1\): 3(.|\n)*These do: 1, 4"
    ):
        update_bn(model, _batches(), layers=["3"])
    with pytest.raises(polyak.errors.ArgumentError, match="Put it in a list"):
        update_bn(model, _batches(), layers="1")


def test_dropout_is_off() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    update_bn(model, _batches())
    _, variance = channel_statistics(torch.cat(_batches()))
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-5, atol=0)


def test_overridden_train_methods_are_not_called() -> None:
    class Stubborn(nn.Sequential):
        def train(self, mode: bool = True) -> Stubborn:
            raise AssertionError

    model = Stubborn(nn.BatchNorm1d(3))
    update_bn(model, _batches())
    assert model[0].num_batches_tracked == 4


def test_a_model_without_running_statistics_runs_nothing() -> None:
    class Forbidden:
        def __iter__(self) -> Iterator[Tensor]:
            raise AssertionError

    model = nn.Sequential(
        nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3), nn.LayerNorm(3)
    )
    assert norm_layers(model) == {}
    update_bn(model, Forbidden())


def test_statistics_taken_away_by_hand_stay_away() -> None:
    model = _model()
    model[1].running_mean = model[1].running_var = None
    update_bn(model, _batches())
    assert model[1].running_mean is None
    assert model[4].num_batches_tracked == 4


def test_old_layers_without_a_count() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].num_batches_tracked = None
    update_bn(model, _batches())
    assert model[0].num_batches_tracked is None


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_layer_must_have_seen_data() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(polyak.errors.UsageError, match=r"lazy .* '0' .* one batch first"):
        update_bn(model, _batches())


def test_no_batches_is_an_error_and_keeps_the_statistics() -> None:
    model = _model()
    before = _state(model)
    for estimator in ("pooled", "torch"):
        with pytest.raises(polyak.errors.ArgumentError, match="no batches"):
            update_bn(model, [], estimator=estimator)
        _assert_same(before, _state(model))


def test_one_value_in_all_is_an_error() -> None:
    model = _model()
    with pytest.raises(polyak.errors.ArgumentError, match="Layer '1' saw one value per channel"):
        update_bn(model, [torch.zeros(1, 3)])


def test_a_model_that_never_calls_its_layers() -> None:
    with pytest.raises(polyak.errors.UsageError, match="none of the layers 1, 4 was called"):
        update_bn(_model(), _batches(), forward=lambda model, batch: None)


def test_a_layer_the_data_never_reaches_keeps_what_it_had() -> None:
    model = _model()
    with pytest.warns(polyak.errors.StaleStatistics, match="4 was never called in 4 batches"):
        update_bn(model, _batches(), forward=lambda m, x: m[:2](x))
    assert model[1].num_batches_tracked == 4
    assert torch.equal(model[4].running_mean, torch.zeros(2))
    assert torch.equal(model[4].running_var, torch.ones(2))


def test_limit_fetches_no_batch_too_many() -> None:
    fetched = []

    def batches() -> Iterator[Tensor]:
        for batch in _batches():
            fetched.append(1)
            yield batch

    model = _model()
    update_bn(model, batches(), limit=2)
    assert len(fetched) == model[1].num_batches_tracked == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0; expected 1 or more"),
        ({"limit": True}, "limit is True"),
        ({"passes": 0}, "passes is 0; expected 1 or more"),
        ({"passes": None}, "passes is None"),
        ({"estimator": "torch", "passes": 2}, "leave out passes= and layers="),
        ({"estimator": "torch", "layers": ["1"]}, "leave out passes= and layers="),
        ({"estimator": "best"}, "estimator is 'best'; expected 'pooled' or 'torch'"),
    ],
)
def test_arguments_out_of_their_domain(options: dict[str, object], message: str) -> None:
    with pytest.raises(polyak.errors.ArgumentError, match=message):
        update_bn(_model(), _batches(), **options)


def test_an_iterator_cannot_be_read_twice() -> None:
    with pytest.raises(polyak.errors.ArgumentError, match="an iterator can be read only once"):
        update_bn(_model(), iter(_batches()), passes=2)


def test_arguments_in_torchs_order() -> None:
    with pytest.raises(polyak.errors.ArgumentError, match=r"polyak\.update_bn\(model, batches\)"):
        update_bn(_batches(), _model())


def test_progress_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    update_bn(_model(), _batches(), progress=True, passes=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("update_bn, pass 1 of 2: 4 batches in")
    assert err.count("\n") == 2
