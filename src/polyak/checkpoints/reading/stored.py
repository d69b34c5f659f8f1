"""Files, stored tensors and checkpoints: what every reader builds and everything else uses.

A reader builds a `Checkpoint` of `StoredTensor`s; the values of a tensor are read only when they are
asked for. Dtypes are named as in safetensors (`F32`, `BF16`, `I64`, `F8_E4M3`), numbers are
little-endian, and reading is thread-safe.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

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
"""Safetensors name -> torch dtype; dtypes that torch does not have are absent."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that are averaged, and that an average can be written as."""

COMPLEX_PARTS = {"C32": "F16", "C64": "F32", "C128": "F64"}
"""Complex values are two real ones side by side, and are averaged as such."""

NARROW_FLOATS = tuple(n for n, bits in DTYPE_BITS.items() if n.startswith("F") and bits <= 8)
"""Floats that only mean something together with scales stored beside them."""

MAX_DIMENSIONS = 64
"""The most dimensions that torch and NumPy support."""

MAX_TENSORS = 1_000_000
"""The most tensors that one checkpoint may hold: a file of some megabytes could claim any number."""

MAX_SIZE = 2**62
"""Larger than any tensor, and still far from overflowing a 64-bit integer."""


def accumulator(dtype: str) -> torch.dtype:
    """Float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == "F64" else torch.float32


def itemsize(dtype: str) -> int:
    """Bytes per value; 1 for the dtypes below a byte, which are only ever copied."""
    return max(1, DTYPE_BITS[dtype] // 8)


def are_sizes(value: Any, kind: type[list[Any]] | type[tuple[Any, ...]]) -> bool:
    """Whether it is a list or tuple (`kind`) of sizes, as dimensions or offsets can be.

    >>> are_sizes([2, 3], list), are_sizes([2, True], list), are_sizes((-1,), tuple)
    (True, False, False)
    """
    if not isinstance(value, kind) or len(value) > MAX_DIMENSIONS:
        return False
    for size in value:  # noqa: SIM110 - runs for every tensor; all() over a generator is slower
        if type(size) is not int or not 0 <= size < MAX_SIZE:
            return False
    return True


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor; FormatError for an unknown dtype or values that do not fill bytes.

    >>> bytes_of("BF16", (3, 4))
    24
    """
    if dtype not in DTYPE_BITS:
        raise FormatError(f"The dtype {dtype!r} is unknown; known are {', '.join(DTYPE_BITS)}.")
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"The shape has {len(shape)} dimensions; at most {MAX_DIMENSIONS} fit.")
    if max(shape, default=0) >= MAX_SIZE:
        raise FormatError(f"The shape {str(list(shape))[:200]} is larger than any tensor can be.")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise FormatError(f"The shape {list(shape)} of {dtype} does not fill whole bytes.")
    return bits // 8


class ByteFile(ABC):
    """A file of known size that any thread can read at any offset."""

    path: str
    size: int

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; FormatError if the file ends before."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise FormatError if the file has changed since it was opened."""

    @abstractmethod
    def close(self) -> None:
        """Release the file descriptor."""

    def read(self, offset: int, length: int) -> bytes:
        """The `length` bytes from `offset` on, checked against the size before memory is reserved."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                f"{self.path} is cut short or damaged: it ends at byte {self.size}, "
                f"and bytes {offset} to {offset + length} were expected. Copy the file again."
            )
        buffer = bytearray(length)
        if length:
            self.read_into(offset, memoryview(buffer))
        return bytes(buffer)


class Span(NamedTuple):
    """`length` bytes of `file`, from `offset` on."""

    file: ByteFile
    offset: int
    length: int


class StoredTensor(ABC):
    """A tensor in a file: its name, dtype and shape, and its values on request.

    name: the full name in the state dict. dtype: as safetensors names it. shape: its sizes.
    nbytes: the bytes of all values in row-major order.
    """

    __slots__ = ("dtype", "name", "nbytes", "shape")

    def __init__(self, name: str, dtype: str, shape: Iterable[int]) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = tuple(shape)
        self.nbytes = bytes_of(dtype, self.shape)

    @property
    def spans(self) -> tuple[Span, ...] | None:
        """The row-major bytes as spans of files, in order; None if they are not stored in that order."""
        return None

    @property
    def storage_order(self) -> tuple[int, ...]:
        """The dimensions from the slowest to the fastest as stored: `(0, 1, ...)` if row-major."""
        return tuple(range(len(self.shape)))

    def in_storage_order(self) -> StoredTensor:
        """The same values with the dimensions permuted by `storage_order`, which is cheap to read."""
        return self

    @abstractmethod
    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes `start` to `start + len(buffer)` of the row-major tensor.

        start: bytes, at least 0, `start + len(buffer) <= nbytes`; whole values are the fast path.
        buffer: writable, contiguous, one byte per item. Raises FormatError if bytes are missing.
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
    """A tensor whose row-major bytes are one span of a file.

    A checkpoint of many small tensors is mostly these: slots, and no objects inside, keep the garbage
    collector from taking longer than the reading.
    """

    __slots__ = ("file", "offset")

    def __init__(
        self, name: str, dtype: str, shape: Iterable[int], file: ByteFile, offset: int
    ) -> None:
        super().__init__(name, dtype, shape)
        self.file = file
        self.offset = offset

    @property
    def spans(self) -> tuple[Span, ...]:
        """The one span."""
        return (Span(self.file, self.offset, self.nbytes),)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `StoredTensor.read_into`."""
        if len(buffer):
            self.file.read_into(self.offset + start, buffer)


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


@dataclass(eq=False)
class Checkpoint:
    """An open checkpoint: its tensors by name, read on request. Also a context manager.

    path: as given. format: `safetensors`, `torch`, `dcp`, `npz`, one of these followed by `shards`, or
    `components` (a pipeline of several models). tensors: stored names only. ties: alias -> stored
    name. metadata: strings to strings. step: the training step, None if unknown. files: the files that
    it is read from. refused: name -> why it cannot be read (empty if opened with `strict=True`). extra:
    the state in it that is no tensor, which `get_extra_state` returned: name -> containers and plain
    values.

    order: all names, aliases too, as a torch file has them; empty for others. versions: what
    `Module.state_dict` says of each module's layout, if a torch file holds it. components: prefix of
    names -> path of the weights in the folder (`{"unet/": "unet/diffusion_pytorch_model.safetensors"}`,
    `""` for a folder of one model); empty for a file that no folder goes with.
    """

    path: str
    format: str
    tensors: dict[str, StoredTensor]
    files: tuple[ByteFile, ...]
    ties: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    step: int | None = None
    refused: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    versions: dict[str, dict[Any, Any]] = field(default_factory=dict)
    components: dict[str, str] = field(default_factory=dict)

    @property
    def is_merged(self) -> bool:
        """Whether `polyak.average_checkpoints` wrote it: the metadata then lists the inputs."""
        return {"polyak", "inputs"} <= self.metadata.keys()

    def check_unchanged(self) -> None:
        """Raise FormatError if one of the files has changed since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files; the tensors can no longer be read afterwards."""
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


PIECE_BYTES = 1 << 20
"""Bytes read at once; as float64 a piece takes at most eight times as much memory."""


def iter_values(*tensors: StoredTensor) -> Iterator[tuple[Tensor, ...]]:
    """The values of tensors of one shape, side by side: flat, piece by piece, in their own dtypes.

    Complex numbers come as pairs of real ones, packed values below a byte as bytes. Raises ValueError
    if the numbers of values differ.
    """
    sizes = [itemsize(tensor.dtype) for tensor in tensors]
    counts = [tensor.nbytes // size for tensor, size in zip(tensors, sizes, strict=True)]
    if len(set(counts)) != 1:
        raise ValueError(f"The tensors have different numbers of values: {counts}.")
    step = PIECE_BYTES // max(sizes)
    for begin in range(0, counts[0], step):
        count = min(step, counts[0] - begin)
        yield tuple(
            _values(tensor, begin * size, count * size)
            for tensor, size in zip(tensors, sizes, strict=True)
        )


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether dtype, shape and every byte are equal; reading ends at the first piece that differs."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    for start in range(0, a.nbytes, PIECE_BYTES):
        length = min(PIECE_BYTES, a.nbytes - start)
        ours, theirs = bytearray(length), bytearray(length)
        a.read_into(start, memoryview(ours))
        b.read_into(start, memoryview(theirs))
        if ours != theirs:
            return False
    return True


def _values(tensor: StoredTensor, start: int, length: int) -> Tensor:
    buffer = bytearray(length)
    tensor.read_into(start, memoryview(buffer))
    part = COMPLEX_PARTS.get(tensor.dtype, tensor.dtype)
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES.get(part, torch.uint8))
