"""What one layer saw: its batch statistics, read at each call."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from polyak.batchnorm import measuring
from polyak.batchnorm.moments import InstanceMoments, Moments
from polyak.batchnorm.ranks import is_distributed

# Calls gathered before they are merged: one merge of 64 costs as much as one of 1.
_ROWS = 64

# Numbers the first calls of layers, so that an error can name the layer that came first.
_order = itertools.count()

Buffers = dict[str, Tensor | None]


class Recorder:
    """Stands in for the layer's `forward` during a pass and gathers the moments of its inputs.

    In training mode with momentum 1 a layer leaves its batch statistics in the running buffers,
    so each call gets a row of scratch as its buffers and nothing is computed twice. Where that
    is not exact, or not what happens (evaluation mode, low-precision statistics, a synchronised
    layer), the input is measured instead.
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
        self._synchronised = isinstance(layer, SyncBatchNorm) and is_distributed()
        self._dtype = layer.running_mean.dtype
        self._is_low_precision = self._dtype not in (torch.float32, torch.float64)
        self.moments = self._kind.empty(layer.running_mean)
        self._means = layer.running_mean.new_zeros((_ROWS, *layer.running_mean.shape))
        self._variances = torch.zeros_like(self._means)
        self._rows = list(zip(self._means.unbind(), self._variances.unbind(), strict=True))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Record, and run the layer."""
        x: Tensor = args[0] if args else kwargs["input"]
        count = self._count(x)
        if count == 0:  # nothing to learn from; what is wrong with it, the layer will say
            return self._forward(*args, **kwargs)
        if self.calls == 0:
            self.first_call = next(_order)
        self.calls += 1
        if self._leaves_exact(x, count):
            return self._leaving_a_row(x, count, *args, **kwargs)
        seen = self._measured(x, count)
        self.moments.merge(seen.count, seen.mean, seen.spread)
        if not self._training or self._synchronised:
            return self._forward(*args, **kwargs)
        if count == 1 and not self._instances:
            # One value has no variance: it is pooled, and normalised by the statistics so far.
            self.flush()
            seen = self.moments
        elif self._is_low_precision:
            return self._forward(*args, **kwargs)
        return self._normalised_by(seen, *args, **kwargs)

    def flush(self) -> None:
        """Merge what was gathered since the last time."""
        n_calls = len(self._counts)
        if n_calls:
            self.moments.add(self._counts, self._means[:n_calls], self._variances[:n_calls])
            self._counts = []

    def statistics(self) -> Buffers:
        """The running buffers that the layer shall have."""
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
        if x.dim() < 2:
            return 0
        if self._instances:
            return measuring.n_instances(self.layer, x)
        return x.numel() // max(1, x.shape[1])

    def _leaves_exact(self, x: Tensor, count: int) -> bool:
        """Whether the layer itself leaves its batch statistics, to all their digits."""
        if not self._training or self._is_low_precision or self._synchronised:
            return False
        return self._instances or (count > 1 and measuring.kernel_is_exact(x, count))

    def _leaving_a_row(self, x: Tensor, count: int, *args: Any, **kwargs: Any) -> Tensor:
        if len(self._counts) == _ROWS:
            self.flush()
        mean, variance = self._rows[len(self._counts)]
        buffers = self.layer._buffers  # setattr would cost as much as a small layer
        buffers["running_mean"], buffers["running_var"] = mean, variance
        self._counts.append(count)
        out = self._forward(*args, **kwargs)
        if not self._instances and measuring.channels_come_last(x):
            measuring.mean_into(mean, x)
        return out

    def _measured(self, x: Tensor, count: int) -> Moments:
        dtype = torch.float32 if self._is_low_precision else self._dtype
        with torch.autocast(x.device.type, enabled=False):
            seen = self._kind.empty(self.moments.mean)
            if self._instances:
                seen.add([count], *measuring.of_instances(self.layer, x.to(dtype)))
            else:
                seen.add(*measuring.of_values(x, dtype))
        return seen

    def _normalised_by(self, moments: Moments, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer with these statistics, as it would with those of its batch."""
        layer = self.layer
        layer._buffers["running_mean"] = moments.mean.to(self._dtype)
        layer._buffers["running_var"] = moments.variance(unbiased=False).to(self._dtype)
        layer.training = False
        try:
            return self._forward(*args, **kwargs)
        finally:
            layer.training = True
