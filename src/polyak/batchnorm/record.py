"""Whether the statistics of layers were measured, told from each layer's own record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from polyak.tensors.memory import address
from polyak.tensors.policy import RUNNING_STATISTICS

# What `update_bn` left in a layer, by the versions of its buffers: as long as they are these, the
# statistics are the measured ones. Every pass has a number.
_measured: WeakKeyDictionary[Module, tuple[int, tuple[int, ...]]] = WeakKeyDictionary()
_passes = 0


def note_measured(layers: Iterable[Module]) -> None:
    """`update_bn` has written these layers' statistics."""
    global _passes  # noqa: PLW0603 - one count for the process
    _passes += 1
    for layer in layers:
        _measured[layer] = (_passes, _versions(layer))


class StatisticsRecord:
    """Watches layers from now on: `measured` are those whose statistics were measured since.

    A forward in training mode changes statistics as well, by one step of momentum, and measures
    nothing. What tells the two apart is what each layer keeps: `update_bn` notes the layers it has
    written; torch's `update_bn` restarts their count of batches; and values written by hand leave
    that count alone. A layer without a count is believed to be written by hand if it is in
    evaluation mode, in which forwards write nothing.
    """

    def __init__(self, layers: Mapping[str, Module]) -> None:
        self._layers = layers
        self._pass = _passes
        self._before = {name: _marks(layer) for name, layer in layers.items()}

    def measured(self) -> set[str]:
        """The names of the layers that were measured."""
        return {name for name, layer in self._layers.items() if self._is_measured(name, layer)}

    def _is_measured(self, name: str, layer: Module) -> bool:
        before, now = self._before[name], _marks(layer)
        if before == now:
            return False
        number, versions = _measured.get(layer, (0, ()))
        if number > self._pass and versions == _versions(layer):
            return True
        count = _buffer(layer, "num_batches_tracked")
        if count is None or not isinstance(layer, _BatchNorm):  # InstanceNorm's count stays 0
            return not layer.training
        writes = count._version - before[-1][0]
        # A reset is one write, each batch another: the count is one less than the writes.
        return writes == 0 or 0 < int(count) == writes - 1


def _statistics(layer: Module) -> list[Tensor]:
    return [buffer for name in RUNNING_STATISTICS if (buffer := _buffer(layer, name)) is not None]


def _buffer(layer: Module, name: str) -> Tensor | None:
    buffer = getattr(layer, name, None)  # scripted modules have no dict of buffers
    return buffer if isinstance(buffer, Tensor) else None


def _versions(layer: Module) -> tuple[int, ...]:
    return tuple(buffer._version for buffer in _statistics(layer))


def _marks(layer: Module) -> tuple[tuple[int, int], ...]:
    """Version and address of each buffer: kernels write statistics without raising their version."""
    return tuple((buffer._version, address(buffer)) for buffer in _statistics(layer))
