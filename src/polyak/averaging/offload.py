"""Averages kept on the host while the weights train on a GPU: updated in the background.

A thread does what an update does, one after the other, on a stream of its own: the copies start after
the step that made the weights, beside the next forward and backward pass. The next step that overwrites
them waits until they have been read, and whoever reads the average until all is done.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyak.errors import UsageError
from polyak.tensors.ahead import ReadAhead
from polyak.tensors.interrupts import interrupts_held


def in_background(live: Sequence[Tensor], device: torch.device | None) -> bool:
    """Whether weights on a GPU are averaged on the host."""
    return device is not None and device.type == "cpu" and any(t.is_cuda for t in live)


@dataclass(eq=False)
class _Job:
    """One update: `undo` is for one that was not done."""

    work: Callable[[], object]
    undo: Callable[[], object]
    weights_made: Sequence[torch.cuda.Event]
    versions: list[int] | None  # of the weights when it was asked for, until they are compared
    done: bool = False
    # What comes later on these streams comes after the weights were read, once `reading` is set.
    reading: threading.Event = field(default_factory=threading.Event)
    weights_read: Sequence[torch.cuda.Event] = ()
    ended: threading.Event = field(default_factory=threading.Event)


class Background:
    """The thread of one tracker, and the updates that it has not done yet.

    Weights that the program writes to between an update and the next step may be read before or after
    that: `written` says which, for a warning.

    After an update that failed no other is done; the next call that asks raises the error, and the counts
    are those of the updates that were done.
    """

    def __init__(self, live: Sequence[Tensor]) -> None:
        self._devices = _devices(live)
        self._streams = [torch.cuda.Stream(d) for d in self._devices]  # type: ignore[no-untyped-call]
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: list[_Job] = []  # those that may not be done
        self._running: _Job | None = None
        self._failure: BaseException | None = None
        self._live: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self.written: set[int] = set()  # which weights were written to when nothing ordered it
        self.read = ReadAhead(self._all_begun)
        _all.add(self)

    def serves(self, live: Sequence[Tensor]) -> bool:
        """Whether it also can read these."""
        return _devices(live) == self._devices

    def sources(self, live: Sequence[Tensor], in_forward: Sequence[bool]) -> list[Tensor]:
        """What updates read from now on: these where they are now, or copies on their device.

        in_forward: which are written to in a forward pass, which waits for nothing.
        """
        self._live = [tensor.detach() for tensor in live]  # read where they are, if they move
        with torch.inference_mode(False):
            copies = {i: torch.empty_like(self._live[i]) for i, it in enumerate(in_forward) if it}
        self._buffers, self._copies = [self._live[i] for i in copies], list(copies.values())
        return [copies.get(i, tensor) for i, tensor in enumerate(self._live)]

    def start(self, work: Callable[[], object], undo: Callable[[], object]) -> None:
        """Begin to do `work` when all before it is done."""
        self._note_writes()
        if self._buffers:
            self.wait_until_read()
            torch._foreach_copy_(self._copies, self._buffers)
        made = [torch.cuda.current_stream(device).record_event() for device in self._devices]
        job = _Job(work, undo, made, self._versions())
        with interrupts_held():  # or it would be in one of the two queues only
            self._jobs = [one for one in self._jobs if not one.done]
            self._jobs.append(job)
            try:
                self._pool = self._pool or ThreadPoolExecutor(1, "polyak-average")
                self._pool.submit(self._do, job)
            except RuntimeError:  # the interpreter is about to exit
                self._do(job)

    def wait_until_read(self) -> None:
        """What is enqueued from now on may overwrite the weights."""
        self._note_writes()
        for job in self._jobs:
            job.reading.wait()
            if job.done:
                continue  # and a graph that is being captured refuses such events
            for device, event in zip(self._devices, job.weights_read, strict=False):
                torch.cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        """Return when nothing is being done."""
        for job in self._jobs:
            job.ended.wait()

    def finish(self) -> None:
        """Wait until everything is done. Raises UsageError, once, if something was not."""
        self._note_writes()
        self.wait()
        jobs, self._jobs = self._jobs, []
        failure, self._failure = self._failure, None
        if failure is not None:
            for job in reversed([job for job in jobs if not job.done]):
                job.undo()
            raise UsageError(
                f"An update of the average on the host failed in the background: "
                f"{type(failure).__name__}: {failure}. The average may hold a part of that update, which "
                "is not counted, and nothing of later ones. Continue from an earlier state "
                "(load_state_dict), or begin anew (reset)."
            ) from failure

    def check(self) -> None:
        """Raise what `finish` raises, if something has failed already; wait for nothing."""
        if self._failure is not None:
            self.finish()

    def forget_thread(self) -> None:
        """In a process that was forked, where it does not run."""
        self._pool = None

    def _versions(self) -> list[int]:
        return [0 if tensor.is_inference() else tensor._version for tensor in self._live]

    def _note_writes(self) -> None:
        """Weights have been written to by what this cannot know, perhaps while they were read."""
        noted = [job.versions for job in self._jobs if job.versions is not None]
        if noted and (now := self._versions()) != noted[0]:
            at = {i for i, pair in enumerate(zip(now, noted[0], strict=True)) if pair[0] != pair[1]}
            buffers = set(map(id, self._buffers))
            self.written |= {i for i in at if id(self._live[i]) not in buffers}
        for job in self._jobs:
            job.versions = None

    def _do(self, job: _Job) -> None:
        if job.ended.is_set():  # its thread could not be started when it was asked for
            return
        self._running = job
        try:
            if self._failure is None:
                self._work(job)
                job.done = True
        except BaseException as error:
            self._failure = error
        finally:
            self._running = None
            job.reading.set()
            job.ended.set()

    def _work(self, job: _Job) -> None:
        if self._devices:  # a thread begins on device 0, which may be another process's
            torch.cuda.set_device(self._devices[0])
        with ExitStack() as streams, torch.no_grad():
            for stream, made in zip(self._streams, job.weights_made, strict=True):
                streams.enter_context(torch.cuda.stream(stream))
                stream.wait_event(made)
            job.work()
            for stream in self._streams:
                stream.synchronize()

    def _all_begun(self) -> None:
        if (job := self._running) is not None:
            job.weights_read = [stream.record_event() for stream in self._streams]
            job.reading.set()


def _devices(live: Sequence[Tensor]) -> list[torch.device]:
    return sorted({tensor.device for tensor in live if tensor.is_cuda}, key=str)


_all: weakref.WeakSet[Background] = weakref.WeakSet()


def _before_fork() -> None:
    # A child has a copy of the averages but not of the threads: it gets what is complete.
    for one in list(_all):
        one.wait()


def _after_fork() -> None:
    for one in list(_all):
        one.forget_thread()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
