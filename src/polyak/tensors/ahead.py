"""Weights of a device read into the memory of the host, a few groups ahead of whoever uses them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_NBYTES = (
    64 << 20
)  # pinned; of the weights, whatever their number, no more is on the host at a time


class ReadAhead:
    """Reads groups of tensors in order, through a ring of buffers that are written again and again.

    all_begun: called when the last group is on its way: what is enqueued later comes after it.
    """

    def __init__(self, all_begun: Callable[[], None]) -> None:
        self._all_begun = all_begun
        self._groups: Sequence[Sequence[Tensor]] = ()
        self._buffers: list[list[Tensor]] = []  # one list of views for each group
        self._room = torch.empty(0, 0, dtype=torch.uint8, device="cpu")  # one row for each slot

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (_nothing,)  # a copy is told anew what to read, and by whom

    def __call__(self, groups: Sequence[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
        """The values of each group, which hold until the next one is asked for."""
        if groups is not self._groups:
            self._make_room(groups)
        on_their_way: deque[tuple[list[Tensor], torch.cuda.Event | None]] = deque()
        for group, buffers in zip(groups, self._buffers, strict=True):
            if len(on_their_way) == len(self._room):
                yield _arrived(*on_their_way.popleft())
            on_their_way.append((buffers, _begin(buffers, group)))
        self._all_begun()
        while on_their_way:
            yield _arrived(*on_their_way.popleft())

    def _make_room(self, groups: Sequence[Sequence[Tensor]]) -> None:
        pinned = any(tensor.is_cuda for group in groups for tensor in group)
        width = -(-max([1, *map(_nbytes, groups)]) // 16) * 16
        n_slots = min(len(groups), max(2, _NBYTES // width))
        if self._room.shape != (n_slots, width) or self._room.is_pinned() is not pinned:
            shape = (n_slots, width)
            with torch.inference_mode(False):
                self._room = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        slots = itertools.cycle(self._room)
        self._buffers = [_views(room, group) for room, group in zip(slots, groups, strict=False)]
        self._groups = groups


def _nothing() -> None:
    pass


def _begin(buffers: list[Tensor], group: Sequence[Tensor]) -> torch.cuda.Event | None:
    # torch would conjugate on the host, before the values are there.
    plain = [t.resolve_conj().resolve_neg() if t.is_conj() or t.is_neg() else t for t in group]
    torch._foreach_copy_(buffers, plain, non_blocking=True)
    if not plain[0].is_cuda:
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(plain[0].device))
    return event


def _arrived(buffers: list[Tensor], event: torch.cuda.Event | None) -> list[Tensor]:
    if event is not None:
        event.synchronize()
    return buffers


def _nbytes(group: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in group)


def _views(room: Tensor, group: Sequence[Tensor]) -> list[Tensor]:
    """Room for each tensor of a group; all have one dtype."""
    values = room[: _nbytes(group)].view(group[0].dtype)
    parts = torch.split(values, [tensor.numel() for tensor in group])
    return [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)]
