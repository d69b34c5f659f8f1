"""What every format is reduced to: for each name a dtype, a shape, and bytes in row-major order.

A reader builds a `Checkpoint` of `StoredTensor`; nothing of a tensor is read until `read_into` asks
for it. Dtypes are spelled as safetensors spells them (`F32`, `BF16`, `I64`, `F8_E4M3`), numbers are
little-endian, and `read_into` may be called from any number of threads at once.

The dtypes of files in torch, and in which precision each is accumulated.

The values of a stored tensor as numbers, a piece at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Self

import torch
from torch import Tensor

from polyak.errors import FormatError

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
        "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C32": 32, "C64": 64, "C128": 128,
        "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    }
)  # fmt: skip
"""Bits per value of every dtype that a stored tensor may have."""

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16,
    "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64,
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
    "BF16": torch.bfloat16, "C32": torch.complex32, "C64": torch.complex64,
    "C128": torch.complex128, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Spelling of safetensors -> torch; what torch lacks is absent."""

MAX_DIMENSIONS = 64
"""As many dimensions as torch and NumPy can hold."""

MAX_TENSORS = 1_000_000
"""As many tensors as one checkpoint may hold: a file of some megabytes could claim any number."""

MAX_SIZE = 2**62
"""Above any tensor, and below what 64-bit integers hold."""


class ByteFile(ABC):
    """A file whose size is known and whose bytes can be read at any place, by any thread."""

    path: str
    size: int

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; FormatError where they are not there."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise FormatError if the file is no longer the one that was opened."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what the operating system lent."""

    def read(self, offset: int, length: int) -> bytes:
        """The `length` bytes from `offset` on, checked against the size before any room is made."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                f"{self.path} is cut short or damaged: it ends at byte {self.size}, "
                f"and bytes {offset} to {offset + length} were expected. Copy the file again."
            )
        buffer = bytearray(length)
        if length:
            self.read_into(offset, memoryview(buffer))
        return bytes(buffer)


@dataclass(frozen=True, slots=True)
class Span:
    """`length` bytes of `file`, from `offset` on."""

    file: ByteFile
    offset: int
    length: int


class StoredTensor(ABC):
    """A tensor in a file: its name, dtype and shape, and its row-major bytes on request.

    name: the fully qualified name; dtype: safetensors spelling; shape: sizes; nbytes: row-major bytes.
    """

    def __init__(self, name: str, dtype: str, shape: Iterable[int]) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = tuple(shape)
        self.nbytes = bytes_of(dtype, self.shape)

    @property
    def spans(self) -> tuple[Span, ...] | None:
        """The row-major bytes as spans of files, in order; None where they are not stored so."""
        return None

    @property
    def storage_order(self) -> tuple[int, ...]:
        """The dimensions from the slowest to the fastest as stored: `(0, 1, ...)` if row-major."""
        return tuple(range(len(self.shape)))

    def in_storage_order(self) -> StoredTensor:
        """The same values, dimensions permuted by `storage_order`: what is cheap to read."""
        return self

    @abstractmethod
    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes `start` to `start + len(buffer)` of the row-major tensor.

        start: bytes, at least 0, `start + len(buffer) <= nbytes`; whole values are the fast path.
        buffer: writable, contiguous, one byte an item. Raises FormatError where bytes are missing.
        """

    def load(self) -> Tensor:
        """The whole tensor in host memory: row-major, with the torch dtype that it is stored as.

        Raises FormatError for a dtype that torch does not have (F4, F6_E2M3, F6_E3M2), and where
        `read_into` does.

        >>> import tempfile, pathlib, torch
        >>> from polyak import open_checkpoint
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.pt"
        >>> torch.save({"w": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
        >>> with open_checkpoint(path) as checkpoint:
        ...     checkpoint.tensors["w"].load()
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.bfloat16)
        """
        dtype = TORCH_DTYPES.get(self.dtype)
        if dtype is None:
            raise FormatError(
                f"{self.name} is stored as {self.dtype}, which torch does not have. Its bytes can be "
                "read with read_into."
            )
        raw = torch.empty(self.nbytes, dtype=torch.uint8)
        self.read_into(0, raw.numpy().data)
        return raw.view(dtype).reshape(self.shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.dtype}, {list(self.shape)})"


class SpanTensor(StoredTensor):
    """A tensor whose row-major bytes are spans of files, one after the other."""

    def __init__(self, name: str, dtype: str, shape: Iterable[int], spans: Iterable[Span]) -> None:
        super().__init__(name, dtype, shape)
        self._spans = tuple(spans)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans, in order."""
        return self._spans

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`, span by span; see `StoredTensor.read_into`."""
        read_spans(self._spans, start, buffer)


def read_spans(spans: Iterable[Span], start: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes from `start` on of the spans laid end to end."""
    filled, begin = 0, 0
    for span in spans:
        skip = max(0, start + filled - begin)
        take = min(span.length - skip, len(buffer) - filled)
        if take > 0:
            span.file.read_into(span.offset + skip, buffer[filled : filled + take])
            filled += take
        begin += span.length
        if filled == len(buffer):
            return


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor; FormatError for an unknown dtype or values that do not fill bytes.

    >>> bytes_of("BF16", (3, 4))
    24
    """
    if dtype not in DTYPE_BITS:
        raise FormatError(f"dtype {dtype!r} is unknown; known are {', '.join(DTYPE_BITS)}.")
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{len(shape)} dimensions; at most {MAX_DIMENSIONS} are possible.")
    if any(size >= MAX_SIZE for size in shape):
        raise FormatError(f"shape {str(list(shape))[:200]} is larger than any tensor can be.")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise FormatError(f"shape {list(shape)} of {dtype} does not fill whole bytes.")
    return bits // 8


@dataclass(eq=False)
class Checkpoint:
    """A checkpoint, opened: tensors by name, read when asked for. Also a context manager.

    path: as given. format: `safetensors`, `torch`, `dcp`, `npz`. tensors: canonical names only.
    ties: alias -> canonical name. metadata: strings to strings. step: the training step, if known.
    files: what it is read from. refused: name -> why it cannot be read (empty when strict).
    """

    path: str
    format: str
    tensors: dict[str, StoredTensor]
    files: tuple[ByteFile, ...]
    ties: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    step: int | None = None
    refused: dict[str, str] = field(default_factory=dict)

    def check_unchanged(self) -> None:
        """Raise FormatError if one of the files is no longer what it was when it was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files; tensors can no longer be read afterwards."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


FLOATS = ("F64", "F32", "F16", "BF16")
"""What is averaged, and what an average can be written as."""

COMPLEX_PARTS = {"C32": "F16", "C64": "F32", "C128": "F64"}
"""Complex values are two real ones side by side, and are averaged as such."""

NARROW_FLOATS = tuple(n for n, bits in DTYPE_BITS.items() if n.startswith("F") and bits <= 8)
"""Floats that only mean something together with scales stored beside them."""


def accumulator(dtype: str) -> torch.dtype:
    """Float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == "F64" else torch.float32


def itemsize(dtype: str) -> int:
    """Bytes of one value; 1 for those below a byte, which are only ever copied."""
    return max(1, DTYPE_BITS[dtype] // 8)


PIECE_BYTES = 1 << 20
"""What is read at once; in float64 at most eight times that lies in memory."""


def pieces(*tensors: StoredTensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same values of several tensors of one shape, flat, piece by piece, in their dtypes.

    Complex numbers come as pairs of real ones, packed values below a byte as bytes.
    """
    sizes = [_itemsize(tensor) for tensor in tensors]
    counts = [tensor.nbytes // size for tensor, size in zip(tensors, sizes, strict=True)]
    step = PIECE_BYTES // max(sizes)
    if len(set(counts)) != 1:
        raise ValueError(f"tensors of different numbers of values: {counts}")
    for begin in range(0, counts[0], step):
        count = min(step, counts[0] - begin)
        yield tuple(
            _values(tensor, begin * size, count * size)
            for tensor, size in zip(tensors, sizes, strict=True)
        )


def _itemsize(tensor: StoredTensor) -> int:
    """Bytes between two values, both parts of a complex number together."""
    known = TORCH_DTYPES.get(tensor.dtype)
    return 1 if known is None else known.itemsize


def _values(tensor: StoredTensor, start: int, length: int) -> torch.Tensor:
    buffer = bytearray(length)
    tensor.read_into(start, memoryview(buffer))
    part = COMPLEX_PARTS.get(tensor.dtype, tensor.dtype)
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES.get(part, torch.uint8))
