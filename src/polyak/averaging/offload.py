"""Averages kept on the host while the weights train on a GPU.

The weights are copied to pinned memory on a separate stream, beside the next forward and backward
pass; the arithmetic happens on the host when the next update, or a read, asks for it.
Events keep the order: the copy starts after the step that made the weights, and the next step that
overwrites them waits (on the GPU, not on the host) until the copy has read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def stages(live: Sequence[Tensor], device: torch.device | None) -> bool:
    """Whether weights on a GPU are averaged on the host."""
    return device is not None and device.type == "cpu" and live[0].device.type == "cuda"


class Staging:
    """Pinned copies of the weights, and what to do once they have arrived."""

    def __init__(self, live: Sequence[Tensor]) -> None:
        with torch.inference_mode(False):
            self.tensors = [torch.empty_like(t, device="cpu", pin_memory=True) for t in live]
        self._stream = torch.cuda.Stream(live[0].device)  # type: ignore[no-untyped-call]
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._then: Sequence[Callable[[], object]] = ()

    def start(self, live: Sequence[Tensor], then: Sequence[Callable[[], object]]) -> None:
        """Begin to copy the weights; `finish` calls `then`, one after the other."""
        self._stream.wait_stream(torch.cuda.current_stream(live[0].device))
        with torch.cuda.stream(self._stream):
            for staged, source in zip(self.tensors, live, strict=True):
                staged.copy_(source.detach(), non_blocking=True)
                source.record_stream(self._stream)  # its memory outlives the copy
            self._arrived.record(self._stream)
        self._then = then

    def order_after_reading(self) -> None:
        """Make the current stream wait until the weights have been read."""
        if self._then:
            torch.cuda.current_stream(self._stream.device).wait_event(self._arrived)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the weights to arrive and use them."""
        if not self._then:
            return
        self._arrived.synchronize()
        then, self._then = self._then, ()
        for step in then:
            step()
