"""Means of 2, 4, 8, ... neighbouring intervals, kept beside a record as they are needed.

A window that begins and ends on edges is then the mean of a few files, whichever it is: of 2 log2(K) where
all means are there, of fewer than 16 once it has been asked for often. Nothing is subtracted: differences of prefix
sums in float32 would lose the short windows.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from polyak.checkpoints.intervals import Interval, write_mean
from polyak.errors import OutputError
from polyak.maths.planning import Span

_FOLDER = ".means"
_READ_PER_MEAN = 16
"""Files that an average has to read for each mean that is written on the way.

To write one costs as much as to read four, so an average takes 1.5 times as long at most as reading what it is
made of; each that reads so many leaves fewer to read to the next.
"""
_FEWEST = 4  # files in a mean that is worth writing


Cover = list[tuple[Interval, float]]


@dataclass(frozen=True)
class Source:
    """A file to read, with its weight: an interval, or a mean of neighbours."""

    interval: Interval
    weight: float


class MeanTree:
    """The means of one record. limit: bytes that they may take; the longest unused go first."""

    def __init__(self, folder: Path, intervals: Sequence[Interval], limit: int) -> None:
        self._folder = folder / _FOLDER
        self._intervals = intervals
        self._limit = limit

    def sources(self, weights: Sequence[float]) -> list[Source]:
        """Files whose weighted mean is that of the intervals; blocks of equal density in one file."""
        self._in_use: set[Path] = set()
        blocks = list(self._blocks(weights))
        covers = {at: self._cover(at, size) for at, size in blocks}
        room = sum(map(len, covers.values())) // _READ_PER_MEAN
        for at, size in sorted(blocks, key=lambda block: -len(covers[block[0]]))[:room]:
            if len(covers[at]) >= _FEWEST:
                covers[at] = self._made(at, size, covers[at])
        return [
            Source(one, math.fsum(weights[at : at + size]) * share)
            for at, size in blocks
            for one, share in covers[at]
        ]

    def _blocks(self, weights: Sequence[float]) -> Iterator[tuple[int, int]]:
        """(first, how many) of the runs of intervals that count evenly."""
        at = 0
        while at < len(weights):
            size = self._largest_block(weights, at)
            if weights[at]:
                yield at, size
            at += size

    def _largest_block(self, weights: Sequence[float], at: int) -> int:
        """The longest aligned run of intervals from here on that counts evenly."""
        size = 1
        while weights[at] and at % (2 * size) == 0 and at + 2 * size <= len(weights):
            group = self._intervals[at : at + 2 * size]
            lengths = np.array([one.end - one.start for one in group])
            density = np.array(weights[at : at + 2 * size]) / lengths
            joined = all(a.end == b.start for a, b in itertools.pairwise(group))
            if not joined or not np.allclose(density, density[0], rtol=1e-9, atol=0):
                break
            size *= 2
        return size

    def _cover(self, at: int, size: int) -> Cover:
        """The files that make up a block, each with its share of the block's time."""
        if size == 1:
            return [(self._intervals[at], 1.0)]
        block = self._block(at, size)
        if block.path.exists():
            self._in_use.add(block.path)
            with suppress(OSError):
                os.utime(block.path)
            return [(block, 1.0)]
        half = size // 2
        whole = block.end - block.start
        return [
            (one, share * (part[-1].end - part[0].start) / whole)
            for start in (at, at + half)
            for part in [self._intervals[start : start + half]]
            for one, share in self._cover(start, half)
        ]

    def _made(self, at: int, size: int, cover: Cover) -> Cover:
        """The block as one file, if that can be written."""
        block = self._block(at, size)
        if self._has_room(block):
            with suppress(OutputError, OSError):  # a folder that nobody may write to
                self._write(block, cover)
                return [(block, 1.0)]
        return cover

    def _block(self, at: int, size: int) -> Interval:
        group = self._intervals[at : at + size]
        made_of = "\n".join(one.stamp for one in group)
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        name = f"mean-{group[0].number}-{group[-1].number}-{digest}.safetensors"
        span = Span(group[0].start, group[-1].end, sum(one.captures for one in group))
        return replace(group[-1], path=self._folder / name, span=span)

    def _has_room(self, block: Interval) -> bool:
        """Whether the mean fits within the limit, after others made way."""
        size = block.nbytes
        with suppress(OSError):
            there = sorted(self._folder.glob("mean-*"), key=lambda one: one.stat().st_mtime_ns)
            taken = sum(one.stat().st_size for one in there)
            idle = [one for one in there if one not in self._in_use]
            while idle and taken + size > self._limit:
                taken -= idle[0].stat().st_size
                idle.pop(0).unlink()
            return taken + size <= self._limit
        return False

    def _write(self, block: Interval, parts: Cover) -> None:
        self._folder.mkdir(exist_ok=True)
        self._in_use |= {block.path, *(one.path for one, _ in parts)}
        write_mean(block.path, [one for one, _ in parts], [share for _, share in parts])
