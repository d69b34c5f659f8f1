"""What a batch may be, and what may stand around the model."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from reference.batchnorm import channel_statistics
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

import polyak.errors
from polyak.batchnorm import norm_layers, update_bn

DATA = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", "x y")


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.bn(pixels)


def _is_right(layer: nn.Module) -> bool:
    mean, variance = channel_statistics(DATA)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=0)
    return True


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, 1), lambda x: [x, "label"], lambda x: Pair(x, None)],
    ids=["tensor", "tuple", "list", "named tuple"],
)
def test_tensors_and_tuples(wrap: object) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    update_bn(model, [wrap(x) for x in DATA.split(10)])
    assert _is_right(model[0])


def test_a_mapping_goes_in_as_keywords() -> None:
    model = Keywords()
    update_bn(model, [{"pixels": x, "labels": None} for x in DATA.split(10)])
    assert _is_right(model.bn)


def test_a_mapping_that_does_not_fit_says_what_to_do() -> None:
    with pytest.raises(polyak.errors.UsageError, match=r"\['image', 'y'\] as keyword.*forward="):
        update_bn(Keywords(), [{"image": DATA, "y": 1}])


def test_a_type_error_inside_the_model_is_not_hidden() -> None:
    class Broken(Keywords):
        def forward(self, pixels: Tensor) -> Tensor:
            return self.bn(pixels) + "x"

    with pytest.raises(TypeError, match="unsupported operand") as caught:
        update_bn(Broken(), [{"pixels": DATA}])
    assert not isinstance(caught.value, polyak.errors.PolyakError)


def test_anything_with_forward() -> None:
    model = Keywords()
    batches = [{"image": {"pixels": x}, "y": 1} for x in DATA.split(10)]
    update_bn(model, batches, forward=lambda m, b: m(b["image"]["pixels"]))
    assert _is_right(model.bn)


def test_a_shuffling_loader_leaves_the_random_state_alone() -> None:
    loader = DataLoader(TensorDataset(DATA), batch_size=10, shuffle=True)
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = torch.get_rng_state()
    update_bn(model, loader, passes=2)
    assert torch.equal(before, torch.get_rng_state())
    assert _is_right(model[0])


def test_no_graph_is_kept_and_inference_mode_works() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with torch.inference_mode():
        update_bn(model, [DATA])
    update_bn(model, [DATA], forward=lambda m, x: assert_no_graph(m(x)))
    model(DATA).sum().backward()


def assert_no_graph(out: Tensor) -> None:
    assert not out.requires_grad


def test_a_compiled_model_runs_uncompiled_and_is_not_compiled_again() -> None:
    compiled = []

    def counting(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = torch.compile(inner, backend=counting)
    model(DATA)
    n_compiled = len(compiled)
    assert list(norm_layers(model)) == ["1"]
    update_bn(model, list(DATA.split(10)))
    with torch.no_grad():
        mean, _ = channel_statistics(inner[0](DATA))
    torch.testing.assert_close(inner[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    model(DATA)
    assert len(compiled) == n_compiled


def test_a_data_parallel_wrapper_is_looked_through() -> None:
    model = nn.DataParallel(nn.Sequential(nn.BatchNorm1d(3)))
    assert list(norm_layers(model)) == ["0"]
    update_bn(model, list(DATA.split(10)))
    assert _is_right(model.module[0])


def test_beside_weight_norm_and_custom_hooks() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0 + DATA,))
    update_bn(model, [DATA])
    assert _is_right(model[1])  # of what the layer itself saw


def test_a_custom_forward_on_the_layer_comes_back() -> None:
    layer = nn.BatchNorm1d(3)
    own = layer.forward
    layer.forward = own
    update_bn(layer, [DATA])
    assert layer.__dict__["forward"] is own
    assert _is_right(layer)


@pytest.mark.parametrize("n_values", [10, 1, 5000])
def test_a_derived_layer_that_takes_more_than_the_input(n_values: int) -> None:
    class Conditional(nn.BatchNorm1d):
        def forward(self, x: Tensor, scale: float, *, shift: float) -> Tensor:
            return super().forward(x) * scale + shift

    layer = Conditional(3)
    batches = [DATA, torch.randn(n_values, 3, generator=torch.Generator().manual_seed(1))]
    update_bn(layer, batches, forward=lambda m, x: m(x, 2.0, shift=1.0))
    mean, variance = channel_statistics(torch.cat(batches))
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_batches_follow_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).cuda()
    update_bn(model, list(DATA.split(10)), passes=2)
    with torch.no_grad():
        mean, variance = channel_statistics(model[0](DATA.cuda()))
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-5, atol=0)
