"""The tensors of a merge one by one, in memory: as soon as its last chunk is done each is handed out."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from polyak.checkpoints.merging.align import MergedTensor
from polyak.checkpoints.merging.engine import Memory, Room, Sink, Worker
from polyak.checkpoints.merging.plan import ByteRuns, Segment
from polyak.checkpoints.reading.stored import TORCH_DTYPES

if TYPE_CHECKING:
    from polyak.checkpoints.merging.prepare import Merge

_LARGE = 2 << 20  # bytes from which on fresh memory is asked for in huge pages


def streamed(
    merge: Merge, into: Mapping[str, Tensor] = MappingProxyType({})
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the one output, in the order of the plan, by the calling thread alone.

    One set of buffers serves all: a thousand small tensors cost no more than one large one. Tensors of
    `into` that can take a result bit for bit are written to, and handed out themselves.
    """
    plan = merge.plan
    waiting = [_memories(segment, into) for segment in plan.segments]
    worker = Worker(merge.job([[runs for _, runs in waiting]]))
    at = 0  # the next chunk
    for index, (memories, _) in enumerate(waiting):
        done = 0  # bytes of the segment
        while memories:
            end, memory = memories[0]
            while done < end:
                chunk = plan[at]
                worker.merge(chunk, checksums=False)
                done, at = chunk.end * plan.segments[index].bytes_out, at + 1
            memories.pop(0)
            yield memory.name, memory.take()


class _Memory(Memory):
    """One tensor of the output: memory for it is made when its first bytes come."""

    def __init__(self, tensor: MergedTensor, target: Tensor | None) -> None:
        self.name, self._size = tensor.name, tensor.nbytes
        self._dtype, self._shape = TORCH_DTYPES[tensor.dtype], tensor.shape
        fits = target is not None and _takes_bytes(target, self._dtype, self._shape)
        self._target = target if fits else None
        self._bytes: memoryview | None = None

    def write(self, offset: int, data: memoryview) -> None:
        self._memory()[offset : offset + len(data)] = data

    def room(self, offset: int, length: int) -> Room:
        return Room(self._memory()[offset : offset + length])

    def take(self) -> Tensor:
        """The tensor, which is the caller's from now on."""
        found, self._bytes = self._bytes, None
        if self._target is not None:
            return self._target
        if found is None:
            return torch.empty(self._shape, dtype=self._dtype)
        return torch.frombuffer(found, dtype=self._dtype).reshape(self._shape)

    def _memory(self) -> memoryview:
        if self._bytes is None:
            target = self._target
            self._bytes = _new_memory(self._size) if target is None else _bytes_of(target)
        return self._bytes


def _takes_bytes(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a result can be made in the memory of this tensor."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.device.type == "cpu"
        and (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape))
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    values: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def _new_memory(size: int) -> memoryview:
    """Where pages are small, touching them for the first time costs as much as all else."""
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(bytearray(size))
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        made.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(made)


def _memories(
    segment: Segment, into: Mapping[str, Tensor]
) -> tuple[list[tuple[int, _Memory]], ByteRuns[Sink]]:
    """The tensors of a segment, each with the byte at which it ends; and where the segment's bytes go."""
    found: list[tuple[int, _Memory]] = []
    runs: ByteRuns[Sink] = ByteRuns()
    for tensor in segment.tensors:
        memory = _Memory(tensor, into.get(tensor.name))
        runs.add(memory, 0, tensor.nbytes)
        found.append((runs.length, memory))
    return found, runs
