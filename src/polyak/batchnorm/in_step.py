"""Passes over data with a sharded model, whose every forward pass is a call to the other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from typing import Any

from torch import distributed
from torch.nn import Module

from polyak.batchnorm.collector import is_distributed
from polyak.errors import ArgumentError
from polyak.tensors.fsdp import reshard, tensor_parallel_meshes
from polyak.tensors.sharding import is_sharded

_END = object()


def in_step(model: Module, batches: Iterable[Any], limit: int | None) -> Iterable[Any]:
    """The batches; of a sharded model, refused unless every rank has as many.

    Otherwise the ranks with more would wait for the others for ever. Where no length is known the ranks
    agree on each batch before it is run. Raises ArgumentError on all ranks.
    """
    if not is_distributed() or not _is_sharded(model):
        return batches
    found = _from_all_ranks(_length(batches, limit))
    if None in found:
        return _Agreed(batches)
    if len(set(found)) > 1:
        raise ArgumentError(_UNEQUAL.format(", ".join(map(str, found))))
    return batches


def sees_data_of_its_own(model: Module) -> bool:
    """Whether no other rank counts the same data: of those of tensor parallelism the first does."""
    places = [mesh.get_coordinate() for mesh in tensor_parallel_meshes(model)]
    return not any(any(place) for place in places if place is not None)


class _Agreed:
    """Batches that end on all ranks at once, or raise on all."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._batches)
        done = 0
        while True:
            batch = next(iterator, _END)
            ended = _from_all_ranks(batch is _END)
            if all(ended):
                return
            if any(ended):
                counts = [str(done) if end else f"more than {done}" for end in ended]
                raise ArgumentError(_UNEQUAL.format(", ".join(counts)))
            yield batch
            done += 1


_UNEQUAL = (
    "The ranks have {} batches, and a sharded model needs as many on each: its forward pass calls all "
    "ranks. The statistics were not updated. Pass limit=, or a sampler that deals the data out evenly."
)


def _length(batches: Iterable[Any], limit: int | None) -> int | None:
    if isinstance(batches, Sized):
        with suppress(TypeError):  # a DataLoader over an iterable dataset
            return len(batches) if limit is None else min(limit, len(batches))
    return None


def _from_all_ranks(value: Any) -> list[Any]:
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def _is_sharded(model: Module) -> bool:
    reshard(model)
    return any(map(is_sharded, model.parameters()))
