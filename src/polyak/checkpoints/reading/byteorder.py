"""Big-endian files, read as little-endian."""

from __future__ import annotations

import numpy as np

from polyak.checkpoints.reading.layout import DTYPE_BITS, StoredTensor


class SwappedTensor(StoredTensor):
    """A tensor whose numbers are stored most significant byte first."""

    def __init__(self, stored: StoredTensor) -> None:
        super().__init__(stored.name, stored.dtype, stored.shape)
        self.stored = stored
        complex_parts = 2 if stored.dtype.startswith("C") else 1
        self.word = DTYPE_BITS[stored.dtype] // 8 // complex_parts

    @property
    def storage_order(self) -> tuple[int, ...]:
        """As stored."""
        return self.stored.storage_order

    def in_storage_order(self) -> StoredTensor:
        """As stored, swapped."""
        return SwappedTensor(self.stored.in_storage_order())

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `StoredTensor.read_into`."""
        before, stop = start % self.word, start + len(buffer)
        if before or stop % self.word:
            whole = bytearray(-(-stop // self.word) * self.word - (start - before))
            self.read_into(start - before, memoryview(whole))
            buffer[:] = memoryview(whole)[before : before + len(buffer)]
            return
        self.stored.read_into(start, buffer)
        np.frombuffer(buffer, np.uint8).view(f"u{self.word}").byteswap(inplace=True)
