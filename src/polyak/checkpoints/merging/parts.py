"""Sharing a merge among processes: each takes the chunks that cost its even share of the bytes."""

from __future__ import annotations

from polyak.checkpoints.merging.plan import Plan


def part_of(plan: Plan, index: int, count: int) -> range:
    """The chunks of part `index` (from 0) of `count`; all parts together are all chunks, once each."""
    return range(_boundary(plan, index, count), _boundary(plan, index + 1, count))


def bytes_to_read(plan: Plan) -> int:
    """Bytes of all inputs that a merge reads."""
    return sum(_bytes(plan, at) for at in range(len(plan.segments)))


def _boundary(plan: Plan, index: int, count: int) -> int:
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


def _bytes(plan: Plan, at: int) -> int:
    return sum(strip.length for strip in plan.segments[at].inputs)
