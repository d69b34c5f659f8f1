"""What a merge will do, laid out before a byte is read: segments, chunks, places, memory.

The values of all tensors that are treated alike form a *segment*, one long row. It is cut into
chunks of a fixed number of values, whatever the tensors' borders, so that a thousand small tensors
cost no more than one large one. `ByteRuns` say where the bytes of a segment are in an input or an output.
Processes that share a merge each take the chunks that make up their share of the bytes.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from polyak.checkpoints.merging.align import MergedTensor
from polyak.checkpoints.reading.stored import ByteFile, StoredTensor, accumulator, itemsize
from polyak.errors import ArgumentError

CHUNK_BYTES = 512 * 1024
"""Of input, per chunk. Measured on 2 cores: 128 KiB 0.142 s, 256 KiB 0.133, 512 KiB 0.105 (1 GB)."""

VECTOR = 64
"""Work is done on whole multiples of this many values, so that none is ever in the scalar rest of a
vectorised loop, where a compiler may round otherwise: results do not depend on where chunks end."""

Source = TypeVar("Source")


class ByteRuns(Generic[Source]):
    """Where the bytes of a row are: runs of bytes in files, end to end.

    Neighbours that are neighbours in the file too become one run.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._places: list[tuple[Source, int]] = []
        self.length = 0

    def add(self, source: Source, offset: int, length: int) -> None:
        """Append the `length` bytes at `offset` of `source`."""
        if not length:
            return
        if not self._continues(source, offset):
            self._starts.append(self.length)
            self._places.append((source, offset))
        self.length += length

    def runs(self, begin: int, end: int) -> Iterator[tuple[Source, int, int, int]]:
        """(source, offset in it, begin, end) of the runs that hold the row's bytes `begin` to `end`."""
        at = bisect_right(self._starts, begin) - 1
        while begin < end:
            source, offset = self._places[at]
            start = self._starts[at]
            stop = self._starts[at + 1] if at + 1 < len(self._starts) else self.length
            stop = min(stop, end)
            yield source, offset + begin - start, begin, stop
            begin, at = stop, at + 1

    def single_run(self, begin: int, end: int) -> tuple[Source, int] | None:
        """The source and the offset in it, if one run holds the row's bytes `begin` to `end`."""
        at = bisect_right(self._starts, begin) - 1
        if at + 1 < len(self._starts) and self._starts[at + 1] < end:
            return None
        source, offset = self._places[at]
        return source, offset + begin - self._starts[at]

    @property
    def sources(self) -> list[Source]:
        """What the runs are in, in their order."""
        return [source for source, _ in self._places]

    def _continues(self, source: Source, offset: int) -> bool:
        if not self._places:
            return False
        last, at = self._places[-1]
        return last is source and at + self.length - self._starts[-1] == offset


Reader = ByteFile | StoredTensor


@dataclass(eq=False)
class Segment:
    """Tensors that are treated alike, in the order of the output.

    numbers: float dtypes in and out, or None for bytes that are copied. mean: of all inputs, or the
    newest alone. values: how many numbers (bytes, if copied) there are in all.
    """

    numbers: tuple[str, str] | None
    mean: bool
    tensors: list[MergedTensor] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    inputs: list[ByteRuns[Reader]] = field(default_factory=list)
    values: int = 0

    @property
    def read_as(self) -> str:
        """The dtype of its values as read; bytes if they are copied."""
        return self.numbers[0] if self.numbers else "U8"

    @property
    def written_as(self) -> str:
        """The dtype of its values as written."""
        return self.numbers[1] if self.numbers else "U8"

    @property
    def bytes_in(self) -> int:
        """Bytes of one value as read."""
        return itemsize(self.read_as)

    @property
    def bytes_out(self) -> int:
        """Bytes of one value as written."""
        return itemsize(self.written_as)

    def chunk_values(self, chunk_bytes: int) -> int:
        """Values per chunk: a multiple of `VECTOR`."""
        return max(VECTOR, chunk_bytes // max(2, self.bytes_in) // VECTOR * VECTOR)

    def chunks(self, chunk_bytes: int) -> int:
        """How many chunks there are."""
        return -(-self.values // self.chunk_values(chunk_bytes))

    def add(self, tensor: MergedTensor) -> None:
        """Append a tensor and where its bytes are."""
        self.tensors.append(tensor)
        self.starts.append(self.values)
        if not self.inputs:
            self.inputs = [ByteRuns() for _ in tensor.sources]
        for runs, source in zip(self.inputs, tensor.sources, strict=True):
            if source is not None:
                _add_spans(runs, source)
        self.values += tensor.nbytes // self.bytes_out

    def tensors_in(self, begin: int, end: int) -> Iterator[tuple[MergedTensor, int, int]]:
        """(tensor, first, last) of the values `begin` to `end`, counted within the tensor."""
        for at in range(bisect_right(self.starts, begin) - 1, len(self.starts)):
            start, tensor = self.starts[at], self.tensors[at]
            if start >= end:
                return
            size = tensor.nbytes // self.bytes_out
            if size and start + size > begin:
                yield tensor, max(begin - start, 0), min(end - start, size)


def _add_spans(runs: ByteRuns[Reader], tensor: StoredTensor) -> None:
    spans = tensor.spans
    if spans is None:
        runs.add(tensor, 0, tensor.nbytes)
        return
    for span in spans:
        runs.add(span.file, span.offset, span.length)


@dataclass(frozen=True)
class Chunk:
    """Values `begin` to `end` of a segment."""

    segment: int
    begin: int
    end: int


class MergePlan:
    """All segments of a merge, and the chunks that they are cut into."""

    def __init__(self, tensors: Sequence[MergedTensor], chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self.segments: list[Segment] = []
        for tensor in tensors:
            last = self.segments[-1] if self.segments else None
            if last is None or (last.numbers, last.mean) != (tensor.numbers, tensor.mean):
                last = Segment(tensor.numbers, tensor.mean)
                self.segments.append(last)
            last.add(tensor)
        self._first = [0, *itertools.accumulate(s.chunks(chunk_bytes) for s in self.segments)]

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Chunk:
        at = bisect_right(self._first, index) - 1
        segment = self.segments[at]
        size = segment.chunk_values(self.chunk_bytes)
        begin = (index - self._first[at]) * size
        return Chunk(at, begin, min(begin + size, segment.values))

    def memory_per_thread(self, rows: int) -> int:
        """Bytes of buffers that one thread needs for outputs that are made in this many rows."""
        return max((self._memory(segment, rows) for segment in self.segments), default=0)

    def threads_within(self, max_memory: int, rows: int, wanted: int) -> int:
        """How many threads fit in `max_memory`; ArgumentError if not even one does."""
        each = self.memory_per_thread(rows)
        if each > max_memory:
            raise ArgumentError(
                f"max_memory is {max_memory} bytes; one thread needs {each}. "
                "Allow more, or write fewer outputs at once."
            )
        return max(1, min(wanted, len(self), max_memory // each if each else wanted))

    def _memory(self, segment: Segment, rows: int) -> int:
        values = segment.chunk_values(self.chunk_bytes)
        if segment.numbers is None:
            return values
        wide = accumulator(segment.read_as).itemsize
        return values * (segment.bytes_in + wide * (1 + rows) + segment.bytes_out)


Key = tuple[int, str, bool, int, int, int]


def in_writing_order(tensors: Sequence[MergedTensor]) -> list[MergedTensor]:
    """Widest dtype first, as safetensors aligns; then what is treated alike; then as stored."""
    files: dict[int, int] = {}
    for tensor in tensors:
        for span in (tensor.sources[-1] and tensor.sources[-1].spans) or ():
            files.setdefault(id(span.file), len(files))

    def place(item: tuple[int, MergedTensor]) -> Key:
        index, tensor = item
        spans = tensor.sources[-1].spans if tensor.sources[-1] is not None else None
        file, offset = (files[id(spans[0].file)], spans[0].offset) if spans else (len(files), 0)
        alike = "/".join(tensor.numbers or ("copied",))
        return (-itemsize(tensor.dtype), alike, not tensor.mean, file, offset, index)

    return [tensor for _, tensor in sorted(enumerate(tensors), key=place)]


def share_of_chunks(plan: MergePlan, index: int, count: int) -> range:
    """The chunks of part `index` (from 0) of `count`; all parts together are all chunks, once each."""
    return range(_boundary(plan, index, count), _boundary(plan, index + 1, count))


def bytes_to_read(plan: MergePlan) -> int:
    """Bytes of all inputs that a merge reads."""
    return sum(_bytes(plan, at) for at in range(len(plan.segments)))


def _boundary(plan: MergePlan, index: int, count: int) -> int:
    """The first chunk of a part: where `index / count` of all bytes have been read."""
    remaining = bytes_to_read(plan) * index // count
    chunks = 0
    for at, segment in enumerate(plan.segments):
        size, number = _bytes(plan, at), segment.chunks(plan.chunk_bytes)
        if remaining < size:
            return chunks + remaining * number // size
        remaining -= size
        chunks += number
    return chunks


def _bytes(plan: MergePlan, at: int) -> int:
    return sum(runs.length for runs in plan.segments[at].inputs)
