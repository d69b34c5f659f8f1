"""Tensors that are stored in an order of their own: transposed, channels last, every second row."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from polyak.checkpoints.reading.gather import GatheredTensor, Strided
from polyak.checkpoints.reading.layout import StoredTensor

TILE_BYTES = 4 << 20
"""What is gathered at once. A transposed matrix costs one small read a column, however many rows are
fetched: the more rows, the fewer reads."""

MAX_TILES = 16
"""Tiles kept at most, in all; each is dropped when it has been read to its end."""


class StridedTensor(GatheredTensor):
    """A view of a storage whose values do not lie in row-major order."""

    def __init__(self, name: str, dtype: str, shape: Sequence[int], source: Strided) -> None:
        super().__init__(name, dtype, shape)
        self.source = source
        self.serial = next(_SERIALS)
        self._lock = threading.Lock()

    @property
    def storage_order(self) -> tuple[int, ...]:
        """The dimensions from the slowest to the fastest as stored."""
        axes = range(len(self.shape))
        return tuple(sorted(axes, key=lambda axis: -self.source.strides[axis]))

    def in_storage_order(self) -> StoredTensor:
        """The same values with the dimensions permuted by `storage_order`: quick to read."""
        order, source = self.storage_order, self.source
        strides = [source.strides[axis] for axis in order]
        permuted = Strided(source.file, source.base, strides, source.kind.itemsize)
        return StridedTensor(self.name, self.dtype, [self.shape[axis] for axis in order], permuted)

    def read_box(self, first: tuple[int, ...], out: NDArray[Any]) -> None:
        """Fill `out` from the storage."""
        self.source.read_box(first, out)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`, small pieces from tiles; see `StoredTensor.read_into`."""
        if len(buffer) >= TILE_BYTES or self.storage_order == tuple(range(len(self.shape))):
            super().read_into(start, buffer)
            return
        done = 0
        while done < len(buffer):
            number, skip = divmod(start + done, TILE_BYTES)
            take = min(TILE_BYTES - skip, len(buffer) - done)
            with self._lock:
                tile = self._tile(number)
                buffer[done : done + take] = tile[skip : skip + take]
                if skip + take == len(tile):
                    _TILES.drop((self.serial, number))
            done += take

    def _tile(self, number: int) -> memoryview:
        tile = _TILES.get((self.serial, number))
        if tile is None:
            start = number * TILE_BYTES
            tile = memoryview(bytearray(min(TILE_BYTES, self.nbytes - start)))
            super().read_into(start, tile)
            _TILES.put((self.serial, number), tile)
        return tile


class _Tiles:
    """The tiles gathered last, of all tensors together, so that their memory is bounded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], memoryview] = OrderedDict()

    def get(self, key: tuple[int, int]) -> memoryview | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: tuple[int, int], tile: memoryview) -> None:
        with self._lock:
            self._kept[key] = tile
            while len(self._kept) > MAX_TILES:
                self._kept.popitem(last=False)

    def drop(self, key: tuple[int, int]) -> None:
        with self._lock:
            self._kept.pop(key, None)


_SERIALS = itertools.count()
_TILES = _Tiles()
