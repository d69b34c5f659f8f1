"""`StatisticsCollector`: the moments of one layer's inputs over a pass, merged over all ranks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from polyak.batchnorm import moments
from polyak.batchnorm.moments import InstanceMoments, Moments

# Calls gathered before they are merged (one merge of 64 costs as much as one of 1): few at first,
# since a pass may be short.
_FIRST_ROWS, _ROWS = 8, 64

# Layers whose forward is known to be `F.batch_norm` and nothing else; not those derived from them.
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Numbers the first calls of layers, so that an error can name the layer that came first.
_order = itertools.count()

Buffers = dict[str, Tensor | None]


class StatisticsCollector:
    """Replaces the layer's `forward` during a pass and collects the moments of its inputs.

    In training mode with momentum 1 a layer leaves its batch statistics in the running buffers, so
    each call gets a row of scratch as its buffers and nothing is computed twice. Where that is not
    exact, or does not happen, the input is measured beside the layer instead (see `__call__`).
    """

    def __init__(self, layer: _NormBase, *, training: bool) -> None:
        assert layer.running_mean is not None  # noqa: S101 - norm_layers saw to it
        self.layer = layer
        self.calls = 0
        self.first_call = sys.maxsize
        self._forward: Callable[..., Tensor] = layer.forward
        self._counts: list[int] = []
        self._training = training
        self._instances = isinstance(layer, _InstanceNorm)
        self._synchronised = isinstance(layer, nn.SyncBatchNorm) and is_distributed()
        self._dtype = layer.running_mean.dtype
        self._is_low_precision = self._dtype not in (torch.float32, torch.float64)
        self.moments = self._kind.empty(layer.running_mean)
        self._may_leave = training and not self._is_low_precision and not self._synchronised
        self._is_plain = type(layer) in _PLAIN and "forward" not in layer.__dict__
        self._make_rows(_FIRST_ROWS)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Collect the moments of the input and run the layer, in the cheapest exact way of four."""
        x: Tensor = args[0] if args else kwargs["input"]
        count = self._count(x)
        if count == 0:  # nothing to collect; the layer itself will report what is wrong with it
            return self._forward(*args, **kwargs)
        if self.calls == 0:
            self.first_call = next(_order)
        self.calls += 1
        # 1. The layer computes its batch statistics anyway, and exactly: it leaves them in a row of
        #    scratch. All calls of a usual float32 model go this way.
        if self._leaves_exact(x, count):
            return self._leaving_a_row(x, count, *args, **kwargs)
        return self._measuring(x, count, *args, **kwargs)

    def flush(self) -> None:
        """Merge what was gathered since the last time."""
        n_calls = len(self._counts)
        if n_calls:
            seen = self._kind.of(self._counts, self._means[:n_calls], self._variances[:n_calls])
            self.moments.add(seen)
            self._counts = []

    def statistics(self) -> Buffers:
        """The running buffers that the layer should store."""
        tracked = self.layer.num_batches_tracked
        found: Buffers = {
            "running_mean": self.moments.mean.to(self._dtype),
            "running_var": self.moments.variance().to(self._dtype),
        }
        if tracked is not None and not self._instances:  # InstanceNorm has a count, always zero
            found["num_batches_tracked"] = torch.full_like(tracked, self.calls)
        return found

    @property
    def _kind(self) -> type[Moments]:
        return InstanceMoments if self._instances else Moments

    def _count(self, x: Tensor) -> int:
        """Values per channel, or instances, of an input; 0 for one that no layer takes."""
        if x.dim() < 2:
            return 0
        if self._instances:
            return moments.n_instances(self.layer, x)
        return x.numel() // max(1, x.shape[1])

    def _leaves_exact(self, x: Tensor, count: int) -> bool:
        """Whether the layer itself leaves its batch statistics, to all their digits."""
        if not self._may_leave:
            return False
        return self._instances or (count > 1 and moments.kernel_is_exact(x, count))

    def _leaving_a_row(self, x: Tensor, count: int, *args: Any, **kwargs: Any) -> Tensor:
        if len(self._counts) == len(self._rows):
            self.flush()
            if len(self._rows) < _ROWS:
                self._make_rows(_ROWS)
        mean, variance = self._rows[len(self._counts)]
        self._counts.append(count)
        out = self._run_into(mean, variance, x, *args, **kwargs)
        if not (self._instances or moments.mean_is_exact(x, count)):
            moments.mean_into(mean, x)
        return out

    def _measuring(self, x: Tensor, count: int, *args: Any, **kwargs: Any) -> Tensor:
        """The other three ways: the input is measured beside the layer."""
        seen = self._measured(x, count)
        self.moments.add(seen)
        is_single = count == 1 and not self._instances
        # 2. The layer runs as it is. In evaluation mode it normalises by the statistics of the pass
        #    before; a synchronised layer must call the other ranks; one with 16-bit statistics would
        #    round what it leaves, but its output is that of training.
        runs_itself = not self._training or self._synchronised
        if runs_itself or (self._is_low_precision and not is_single):
            return self._forward(*args, **kwargs)
        # 3. One value per channel has no variance, and torch refuses it in training mode: it counts
        #    with variance 0, and is normalised by the statistics so far.
        if is_single:
            self.flush()
            seen = self.moments
        # 4. The kernel's own statistics would be inexact (many values in an unlucky layout): the
        #    layer normalises by the measured ones, as if it had found them itself.
        return self._normalised_by(seen, x, *args, **kwargs)

    def _make_rows(self, n_rows: int) -> None:
        assert self.layer.running_mean is not None  # noqa: S101 - norm_layers saw to it
        self._means = self.layer.running_mean.new_zeros((n_rows, *self.moments.mean.shape))
        self._variances = torch.zeros_like(self._means)
        self._rows = list(zip(self._means.unbind(), self._variances.unbind(), strict=True))

    def _run_into(
        self, mean: Tensor, variance: Tensor, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run the layer so that it leaves its batch statistics here."""
        layer = self.layer
        if self._is_plain:  # all that its forward computes, without its bookkeeping
            cast("Any", layer)._check_input_dim(x)
            return F.batch_norm(x, mean, variance, layer.weight, layer.bias, True, 1.0, layer.eps)
        layer._buffers.update(running_mean=mean, running_var=variance)
        return self._forward(*args, **kwargs)

    def _measured(self, x: Tensor, count: int) -> Moments:
        dtype = torch.float32 if self._is_low_precision else self._dtype
        if self._instances:
            return self._kind.of([count], *moments.of_instances(self.layer, x.to(dtype)))
        return self._kind.of(*moments.of_values(x, dtype))

    def _normalised_by(self, seen: Moments, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer with these statistics, as it would with those of its batch."""
        layer = self.layer
        mean = seen.mean.to(self._dtype)
        variance = seen.variance(unbiased=False).to(self._dtype)
        if self._is_plain:
            return F.batch_norm(x, mean, variance, layer.weight, layer.bias, False, 0.0, layer.eps)
        layer._buffers.update(running_mean=mean, running_var=variance)
        layer.training = False
        try:
            return self._forward(*args, **kwargs)
        finally:
            layer.training = True


def is_distributed() -> bool:
    """Whether there are other ranks to merge with."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def merge_ranks(
    collectors: Sequence[StatisticsCollector], n_batches: int, *, counts: bool = True
) -> int:
    """Merge each layer's moments over all ranks, in rank order; returns the batches of all.

    Every rank must call this, with the same layers; all end with the same bits. counts: False on a
    rank whose data another one has counted.
    """
    if not is_distributed():
        return n_batches
    mine = _packed(collectors, n_batches)
    if not counts:
        mine.zero_()
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, mine)
    for collector in collectors:
        collector.calls = 0
        collector.moments = type(collector.moments).empty(collector.moments.mean)
    return sum(_merge_part(collectors, part) for part in parts)


def _packed(collectors: Sequence[StatisticsCollector], n_batches: int) -> Tensor:
    """One vector: the batches, count and calls of every layer, then means and spreads layer by layer."""
    like = collectors[0].moments.mean
    numbers: list[float] = [n_batches]
    pieces = []
    for collector in collectors:
        own = collector.moments
        numbers += [own.count, collector.calls]
        pieces += [own.mean, own.spread]
    header = torch.tensor(numbers, dtype=like.dtype, device="cpu")
    return torch.cat([piece.to(like.device, like.dtype) for piece in (header, *pieces)])


def _merge_part(collectors: Sequence[StatisticsCollector], part: Tensor) -> int:
    position = 1 + 2 * len(collectors)
    n_batches, *numbers = part[:position].tolist()  # the one wait for a device
    for collector, count, calls in zip(collectors, numbers[::2], numbers[1::2], strict=True):
        own = collector.moments
        n_channels = own.mean.numel()
        mean, spread = part[position : position + 2 * n_channels].to(own.mean).view(2, n_channels)
        own.merge(count, mean, spread)
        collector.calls += int(calls)
        position += 2 * n_channels
    return int(n_batches)
