"""The statistics that `update_bn` finds, against float64 twins."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.batchnorm import (
    batch_statistics_one_by_one,
    channel_statistics,
    instance_statistics,
)
from torch import Tensor, nn

from polyak.batchnorm import update_bn


def _close(layer: nn.Module, expected: tuple[Tensor, Tensor], relative: float = 1e-5) -> None:
    mean, variance = expected
    mean_error = (layer.running_mean.double() - mean).abs()
    assert (mean_error <= relative * (mean.abs() + variance.sqrt())).all(), mean_error
    assert ((layer.running_var.double() - variance).abs() <= relative * variance).all()


def _split(values: Tensor, sizes: list[int]) -> list[Tensor]:
    assert sum(sizes) == len(values)
    return list(values.split(sizes))


def _data(n: int, *shape: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator) * 3 + offset


SPLITS = [[1000], [997, 2, 1], [1, 999], [1] * 1000, [7] * 142 + [6], [500, 500], [1, 1, 998]]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("ordered", [False, True])
def test_vectors_on_any_split(sizes: list[int], offset: float, ordered: bool) -> None:
    values = _data(1000, 5, offset=offset)
    if ordered:
        values = values.sort(0).values
    model = nn.Sequential(nn.BatchNorm1d(5))
    update_bn(model, _split(values, sizes))
    _close(model[0], channel_statistics(values))


@given(st.lists(st.integers(1, 40), min_size=2, max_size=90), st.integers(0, 2**31))
def test_any_split_at_all(sizes: list[int], seed: int) -> None:
    values = _data(sum(sizes), 3, seed=seed, offset=5.0).sort(0).values
    model = nn.Sequential(nn.BatchNorm1d(3))
    update_bn(model, _split(values, sizes))
    _close(model[0], channel_statistics(values))
    assert model[0].num_batches_tracked == len(sizes)


@pytest.mark.parametrize("sizes", [[40], [30, 9, 1], [20, 20]], ids=str)
@pytest.mark.parametrize(
    ("memory_format", "relative"),
    [(torch.contiguous_format, 1e-6), (torch.channels_last, 1e-5)],
)
def test_images(sizes: list[int], memory_format: torch.memory_format, relative: float) -> None:
    images = _data(40, 6, 13, 11, offset=2.0).sort(0).values.to(memory_format=memory_format)
    model = nn.Sequential(nn.BatchNorm2d(6)).to(memory_format=memory_format)
    batches = [b.contiguous(memory_format=memory_format) for b in _split(images, sizes)]
    update_bn(model, batches)
    _close(model[0], channel_statistics(images), relative)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_many_values_per_channel(
    offset: float, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """torch's channels-last and bfloat16 kernels drift by up to 1e-4 here; pieces do not."""
    images = _data(24, 3, 70, 70, offset=offset).to(dtype).contiguous(memory_format=memory_format)
    model = nn.Sequential(nn.BatchNorm2d(3, eps=1e-12))
    seen: list[Tensor] = []
    model.register_forward_hook(lambda *call: seen.append(call[2]))
    update_bn(model, [images[:20], images[20:]])
    _close(model[0], channel_statistics(images))
    if dtype == torch.float32:
        mean, variance = channel_statistics(seen[0])  # normalised by its own batch, as in training
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=2e-5, rtol=0)
        torch.testing.assert_close(variance, torch.ones_like(mean), atol=5e-5, rtol=0)


def test_behind_a_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    images = _data(50, 3, 10, 10).sort(0).values
    update_bn(model, _split(images, [32, 17, 1]))
    with torch.no_grad():
        _close(model[1], channel_statistics(model[0](images)), 1e-6)


def test_sequences_and_volumes() -> None:
    for values, layer in (
        (_data(20, 4, 9), nn.BatchNorm1d(4)),
        (_data(9, 4, 3, 4, 5), nn.BatchNorm3d(4)),
    ):
        update_bn(layer, list(values.split(4)))
        _close(layer, channel_statistics(values))


def test_float64_is_exact_to_its_own_digits() -> None:
    values = _data(500, 4).double() + 1e4
    model = nn.Sequential(nn.BatchNorm1d(4)).double()
    update_bn(model, _split(values, [400, 99, 1]))
    _close(model[0], channel_statistics(values), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_statistics_lose_digits_only_when_stored(dtype: torch.dtype) -> None:
    values = _data(3000, 4, offset=2.0).to(dtype)
    model = nn.Sequential(nn.BatchNorm1d(4)).to(dtype)
    update_bn(model, _split(values, [2048, 951, 1]))
    mean, variance = channel_statistics(values)
    assert torch.equal(model[0].running_mean, mean.to(dtype))
    assert torch.equal(model[0].running_var, variance.to(dtype))


def test_low_precision_input_with_float32_statistics() -> None:
    values = _data(300, 4, 5, 5).bfloat16()
    layer = nn.BatchNorm2d(4)
    update_bn(layer, _split(values, [200, 100]))
    _close(layer, channel_statistics(values))


def test_under_autocast_the_statistics_are_of_what_the_layer_sees() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    values = _data(64, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update_bn(model, list(values.split(16)), passes=2)
        with torch.no_grad():
            seen = model[0](values)
    _close(model[1], channel_statistics(seen))


def test_a_layer_called_twice_pools_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.bn(x)
            return self.bn.forward(10 * x)  # around the hooks

    model, values = Twice(), _data(30, 3)
    update_bn(model, list(values.split(10)))
    _close(model.bn, channel_statistics(torch.cat([values, 10 * values])))
    assert model.bn.num_batches_tracked == 6


def test_a_layer_in_two_places_is_one_layer() -> None:
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": shared, "b": shared})
    values = _data(30, 3)

    def both(m: nn.ModuleDict, x: Tensor) -> None:
        m["a"](x)
        m["b"](input=x + 1)

    update_bn(model, list(values.split(10)), forward=both)
    _close(shared, channel_statistics(torch.cat([values, values + 1])))


def test_one_value_per_channel_is_normalised_by_the_statistics_so_far() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1, eps=1e-12), nn.BatchNorm1d(1))
    seen: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    update_bn(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0]])])
    # so far 0, 2 and 4 itself: mean 2, biased variance 8/3
    torch.testing.assert_close(seen[1], torch.tensor([[2 / (8 / 3) ** 0.5]]))


def test_further_passes_make_one_more_layer_exact_each_time() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(),
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(),
        nn.Linear(4, 4), nn.BatchNorm1d(4),
    )  # fmt: skip
    values = _data(200, 4).sort(0).values
    batches = _split(values, [64, 64, 71, 1])
    for passes, place in enumerate((1, 4, 7), 1):
        model.train()
        update_bn(model, batches, passes=passes)
        with torch.no_grad():
            _close(model[place], channel_statistics(model.eval()[:place](values)))
    assert model[7].num_batches_tracked == 4


def test_instance_norm_keeps_its_own_definition() -> None:
    images = _data(30, 4, 6, 6) * torch.linspace(1, 5, 30)[:, None, None, None]
    for passes in (1, 2):
        layer = nn.InstanceNorm2d(4, track_running_stats=True)
        update_bn(layer, _split(images, [20, 9, 1]), passes=passes)
        _close(layer, instance_statistics(images))
        assert layer.num_batches_tracked == 0  # torch never counts them either


def test_instance_norm_without_a_batch_dimension() -> None:
    images = _data(5, 4, 6, 6)
    layer = nn.InstanceNorm2d(4, track_running_stats=True)
    update_bn(layer, list(images))
    _close(layer, instance_statistics(images))


def test_sync_batchnorm_without_ranks_is_batchnorm() -> None:
    values = _data(30, 3)
    layer = nn.SyncBatchNorm(3)
    update_bn(layer, list(values.split(7)))
    _close(layer, channel_statistics(values))


def test_old_statistics_leave_no_trace() -> None:
    values = _data(20, 3)
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(torch.nan)
    layer.running_var.fill_(torch.inf)
    update_bn(layer, [values])
    _close(layer, channel_statistics(values))


def test_an_empty_batch_counts_for_nothing() -> None:
    values = _data(20, 3)
    layer = nn.BatchNorm1d(3)
    update_bn(layer, [values, values[:0]])
    _close(layer, channel_statistics(values))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_torch_estimator_gives_torchs_bits(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(256, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    model[1].eval()
    twin = copy.deepcopy(model)
    batches = [(_data(n, 3, 10, 10, seed=n),) for n in (16, 16, 5)]
    torch.manual_seed(seed)
    torch.optim.swa_utils.update_bn(batches, twin)
    torch.manual_seed(seed)
    update_bn(model, batches, estimator="torch")
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


def test_why_the_torch_estimator_is_not_the_default() -> None:
    """Two batches of a constant each: pooled sees the difference between them."""
    batches = [torch.zeros(10, 1), torch.ones(30, 1)]
    pooled, torchs = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(pooled, batches)
    update_bn(torchs, batches, estimator="torch")
    assert pooled.running_mean.item() == 0.75
    assert torchs.running_mean.item() == 0.5
    assert torchs.running_var.item() == 0.0
    _close(pooled, channel_statistics(torch.cat(batches)))
    assert batch_statistics_one_by_one(batches)[0].item() == 0.5
