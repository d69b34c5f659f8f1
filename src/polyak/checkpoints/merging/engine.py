"""The loop of a merge: read a chunk of every input, accumulate, cast, write at the final offset.

Every byte of the inputs is read once, for however many outputs. A thread owns one set of buffers and
nothing else; inputs are added in their order with elementwise operations only, so results depend
neither on the number of threads nor on where chunks end (a matrix product's would). Values that are not
finite are found by one pass over each result, and explained only when found.
"""

from __future__ import annotations

import math
import mmap
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polyak.checkpoints.merging.plan import VECTOR, ByteRuns, Chunk, MergePlan, Reader, Segment
from polyak.checkpoints.merging.rules import Part, Piece, Rule, WeightedSum
from polyak.checkpoints.reading.stored import TORCH_DTYPES, StoredTensor, accumulator, itemsize
from polyak.errors import NonFiniteError


class Sink(Protocol):
    """What takes the bytes of an output."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`."""


class Memory(ABC):
    """A sink that stays in memory, where sums are made at once: nothing need be written then."""

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`."""

    @abstractmethod
    def room(self, offset: int, length: int) -> Room:
        """The memory of these bytes."""


@dataclass(frozen=True)
class Job:
    """A merge: rules[k] makes output k; outputs[k][s]: where its segment s goes."""

    plan: MergePlan
    rules: Sequence[Rule]
    outputs: Sequence[Sequence[ByteRuns[Sink]]]
    paths: Sequence[str]


class Room:
    """Memory that files read into and torch computes on."""

    def __init__(self, memory: memoryview) -> None:
        self.bytes = memory
        self._views: dict[torch.dtype, Tensor] = {}

    def as_tensor(self, dtype: torch.dtype, values: int) -> Tensor:
        """The first values in it as a tensor."""
        if dtype not in self._views:
            count = len(self.bytes) // dtype.itemsize
            self._views[dtype] = torch.frombuffer(self.bytes, dtype=dtype, count=count)
        return self._views[dtype][:values]


class Buffer(Room):
    """Page-aligned memory of a thread's own."""

    def __init__(self, size: int) -> None:
        super().__init__(memoryview(mmap.mmap(-1, max(size, 1))))


class Worker:
    """One thread's buffers, and what it does with them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        arithmetic = [s for s in job.plan.segments if s.numbers]
        sizes = [(s, s.chunk_values(job.plan.chunk_bytes)) for s in job.plan.segments]
        self._raw = Buffer(max((n * s.bytes_in for s, n in sizes), default=0))
        self._out = Buffer(max((n * s.bytes_out for s, n in sizes if s.numbers), default=0))
        wide = max((n * accumulator(s.read_as).itemsize for s, n in sizes if s.numbers), default=0)
        self._wide = Buffer(wide)
        self._rows = [
            [Buffer(wide) for _ in range(rule.buffers)] for rule in job.rules if arithmetic
        ]

    def merge(self, chunk: Chunk, *, checksums: bool) -> list[int]:
        """Do one chunk; CRC-32 of what each output was given (zeros unless asked for).

        Raises NonFiniteError naming the tensor and the input.
        """
        segment = self._job.plan.segments[chunk.segment]
        if segment.numbers is None:
            length = chunk.end - chunk.begin
            _read(segment.inputs[-1], chunk.begin, self._raw.bytes[:length])
            everywhere = range(len(self._job.outputs))
            return self._write(everywhere, chunk, self._raw.bytes[:length], checksums)
        rules = self._job.rules if segment.mean else [_newest_only(segment)]
        lent = self._lent(segment, chunk)
        rows: Sequence[Sequence[Room]] = [[lent, *self._rows[0][1:]]] if lent else self._rows
        self._accumulate(segment, chunk, rules, rows)
        totals = [mine[0] for mine, _ in zip(rows, rules, strict=False)]
        if not lent:
            return self._cast(segment, chunk, totals, checksums)
        self._check(segment, chunk, totals[0])
        return [0]

    def _lent(self, segment: Segment, chunk: Chunk) -> Room | None:
        """Where the one output is in memory, to be made there."""
        outputs, size = self._job.outputs, segment.bytes_out
        if (
            len(outputs) > 1
            or TORCH_DTYPES[segment.written_as] != accumulator(segment.read_as)
            or _padded(chunk) != chunk.end - chunk.begin
        ):
            return None
        place = outputs[0][chunk.segment].single_run(chunk.begin * size, chunk.end * size)
        if place is None:
            return None
        sink, offset = place
        return (
            None
            if not isinstance(sink, Memory)
            else sink.room(offset, (chunk.end - chunk.begin) * size)
        )

    def _accumulate(
        self,
        segment: Segment,
        chunk: Chunk,
        rules: Sequence[Rule],
        rooms: Sequence[Sequence[Room]],
    ) -> None:
        """Give every input that counts somewhere to the rules, in order."""
        padded, dtype = _padded(chunk), accumulator(segment.read_as)
        begin = chunk.begin * segment.bytes_in
        buffer = self._raw.bytes[: chunk.end * segment.bytes_in - begin]
        raw = self._raw.as_tensor(TORCH_DTYPES[segment.read_as], padded)
        wide = raw if raw.dtype == dtype else self._wide.as_tensor(dtype, padded)
        rows = [
            [row.as_tensor(dtype, padded) for row in mine[: rule.buffers]]
            for mine, rule in zip(rooms, rules, strict=False)
        ]
        pieces = _pieces(segment, chunk) if any(rule.per_tensor for rule in rules) else ()
        begun: set[int] = set()
        for index, runs in enumerate(segment.inputs):
            counting = [k for k, one in enumerate(rules) if one.coefficients[index]]
            if not counting:
                continue
            if not begun and len(counting) == 1 and wide is raw:
                # It is copied to where its sum begins: read there, it need not be.
                first = counting[0]
                _read(runs, begin, rooms[first][0].bytes[: len(buffer)])
                rules[first].add(rows[first], Part(rows[first][0], index, True, pieces))
                begun.add(first)
                continue
            _read(runs, begin, buffer)
            # The first input of a sum is copied into its total, and the copy casts. So while no sum has
            # begun, `raw` need not be cast into `wide` first. Once one has, this input is added somewhere
            # and is cast; sums that begin with it copy the cast values, which are the same.
            if wide is not raw and begun:
                wide.copy_(raw)
            for k in counting:
                values = wide if begun else raw
                rules[k].add(rows[k], Part(values, index, k not in begun, pieces))
            begun.update(counting)
        for rule, mine in zip(rules, rows, strict=True):
            rule.finish(mine)

    def _cast(
        self, segment: Segment, chunk: Chunk, totals: Sequence[Room], checksums: bool
    ) -> list[int]:
        """Write every sum in the dtype of the output."""
        count = chunk.end - chunk.begin
        padded = _padded(chunk)
        target, dtype = TORCH_DTYPES[segment.written_as], accumulator(segment.read_as)
        crcs: list[int] = []
        for k, total in enumerate(totals):
            self._check(segment, chunk, total)
            buffer = total
            if target != dtype:
                buffer = self._out
                buffer.as_tensor(target, padded).copy_(total.as_tensor(dtype, padded))
            data = buffer.bytes[: count * segment.bytes_out]
            which = [k] if segment.mean else range(len(self._job.outputs))
            crcs += self._write(which, chunk, data, checksums)
        return crcs

    def _check(self, segment: Segment, chunk: Chunk, total: Room) -> None:
        values = total.as_tensor(accumulator(segment.read_as), chunk.end - chunk.begin)
        if not fits(values, segment.written_as):
            raise explained(self._job.paths, segment, chunk, values)

    def _write(
        self,
        outputs: Sequence[int],
        chunk: Chunk,
        data: memoryview,
        checksums: bool,
    ) -> list[int]:
        start = chunk.begin * self._job.plan.segments[chunk.segment].bytes_out
        for k in outputs:
            runs = self._job.outputs[k][chunk.segment]
            for sink, offset, begin, end in runs.runs(start, start + len(data)):
                sink.write(offset, data[begin - start : end - start])
        return [zlib.crc32(data) if checksums else 0] * len(outputs)


def run(
    job: Job,
    chunks: Iterator[int],
    threads: int,
    done: Callable[[int, Sequence[int]], None],
    *,
    checksums: bool = False,
) -> None:
    """Merge the chunks in threads of one torch thread each; `done(chunk, checksums)` after each.

    The first error of any thread stops all and is raised here.
    """
    crew = _Crew(job, chunks, done, checksums=checksums)
    before = torch.get_num_threads()
    workers = [threading.Thread(target=crew.work, daemon=True) for _ in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        crew.stop.set()  # also after Ctrl-C: nobody writes once this function has ended
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        torch.set_num_threads(before)  # a worker's 1 would be what later threads begin with
    if crew.error is not None:
        raise crew.error


class _Crew:
    """What the threads share: the chunks still to do, and the first error."""

    def __init__(
        self,
        job: Job,
        chunks: Iterator[int],
        done: Callable[[int, Sequence[int]], None],
        *,
        checksums: bool,
    ) -> None:
        self._job, self._chunks, self._done, self._checksums = job, chunks, done, checksums
        self._lock = threading.Lock()
        self.stop = threading.Event()
        self.error: BaseException | None = None

    def work(self) -> None:
        try:
            torch.set_num_threads(1)
            worker = Worker(self._job)
            while (index := self._next()) is not None:
                self._done(index, worker.merge(self._job.plan[index], checksums=self._checksums))
        except BaseException as error:  # handed to the caller's thread, not swallowed
            with self._lock:
                self.error = self.error or error
            self.stop.set()

    def _next(self) -> int | None:
        with self._lock:
            return None if self.stop.is_set() else next(self._chunks, None)


def _read(runs: ByteRuns[Reader], begin: int, buffer: memoryview) -> None:
    if (whole := runs.single_run(begin, begin + len(buffer))) is not None:
        whole[0].read_into(whole[1], buffer)
        return
    for source, offset, start, end in runs.runs(begin, begin + len(buffer)):
        source.read_into(offset, buffer[start - begin : end - begin])


def _newest_only(segment: Segment) -> WeightedSum:
    return WeightedSum([0.0] * (len(segment.inputs) - 1) + [1.0])


def _pieces(segment: Segment, chunk: Chunk) -> list[Piece]:
    """Whose values the chunk holds."""
    found, at = [], 0
    for tensor, first, last in segment.tensors_in(chunk.begin, chunk.end):
        found.append((tensor.name, first, slice(at, at + last - first)))
        at += last - first
    return found


def _padded(chunk: Chunk) -> int:
    return -(-(chunk.end - chunk.begin) // VECTOR) * VECTOR


# The first magnitude that rounds to infinity: the largest finite value and half a unit above it.
_LIMITS = {
    "F64": float("inf"),
    "F32": 2.0**127 * (2 - 2.0**-24),
    "F16": 65520.0,
    "BF16": 2.0**127 * (2 - 2.0**-8),
}


def fits(total: Tensor, dtype: str) -> bool:
    """Whether all values are finite once written as `dtype`; a NaN passes nothing."""
    # A sum is the cheapest to find, and finite only if all values are.
    if TORCH_DTYPES[dtype] == total.dtype and math.isfinite(total.sum().item()):
        return True
    limit = _LIMITS[dtype]
    return -limit < total.amin().item() and total.amax().item() < limit


def explained(
    paths: Sequence[str], segment: Segment, chunk: Chunk, total: Tensor
) -> NonFiniteError:
    """Which tensor of which input holds what is not finite; looked for only after it was found."""
    for tensor, first, last in segment.tensors_in(chunk.begin, chunk.end):
        for path, source in zip(paths, tensor.sources, strict=True):
            if source is None:
                continue
            at = _first_non_finite(source, segment, first, last)
            if at is not None:
                advice = "Leave this checkpoint out, or pass exclude= to take the tensor from the newest."
                if len(paths) == 1:
                    advice = "Pass exclude= with its name to write it as it is."
                return NonFiniteError(
                    f"{tensor.name} of {path} is not finite (value {at[0]} of it is {at[1]}). {advice}"
                )
    name = _overflowing(segment, chunk, total)
    return NonFiniteError(
        f"{name}: the average exceeds what {segment.written_as} can hold, though every input is "
        "finite. Write a wider dtype."
    )


def _first_non_finite(
    source: StoredTensor, segment: Segment, first: int, last: int
) -> tuple[int, float] | None:
    size = itemsize(segment.read_as)
    raw = bytearray((last - first) * size)
    source.read_into(first * size, memoryview(raw))
    values = torch.frombuffer(raw, dtype=TORCH_DTYPES[segment.read_as])
    bad = torch.nonzero(~torch.isfinite(values))
    return None if not len(bad) else (first + int(bad[0]), float(values[int(bad[0])]))


def _overflowing(segment: Segment, chunk: Chunk, total: Tensor) -> str:
    position = 0
    names: list[str] = []
    for tensor, first, last in segment.tensors_in(chunk.begin, chunk.end):
        if not fits(total[position : position + last - first], segment.written_as):
            names.append(tensor.name)
        position += last - first
    return ", ".join(names)
