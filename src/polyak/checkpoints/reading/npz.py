"""NumPy archives (`np.savez`): a zip of stored `.npy` files, whose headers are read by a pattern."""

from __future__ import annotations

import math
import re

from polyak.checkpoints.reading.gather import Strided, StridedTensor, SwappedTensor
from polyak.checkpoints.reading.stored import (
    MAX_DIMENSIONS,
    ByteFile,
    Checkpoint,
    Span,
    SpanTensor,
    StoredTensor,
    bytes_of,
)
from polyak.checkpoints.reading.zips import ZipArchive
from polyak.errors import FormatError

_DTYPES = {
    "f8": "F64", "f4": "F32", "f2": "F16", "c8": "C64", "c16": "C128", "i8": "I64", "i4": "I32",
    "i2": "I16", "i1": "I8", "u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL",
}  # fmt: skip
_HEADER = re.compile(
    r"\{'descr': '([<>|=])([a-zA-Z]\d{1,4})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,19}(?:, ?|,?(?=\))))*)\), \}\s*"
)
_MAX_HEADER = 65_536


def read_npz(file: ByteFile, archive: ZipArchive | None = None) -> Checkpoint:
    """Open an `.npz` file; arrays of objects or records are refused, nothing is unpickled."""
    archive = archive or ZipArchive(file)
    tensors: dict[str, StoredTensor] = {}
    refused: dict[str, str] = {}
    if not archive.entries:
        raise FormatError(f"{file.path} is an empty zip archive; it holds no arrays.")
    for entry in archive.entries:
        name = entry.removesuffix(".npy")
        if name == entry:
            raise FormatError(
                f"{file.path}: {entry!r} is not an .npy file; is this an .npz file at all?"
            )
        span = archive.span(entry)
        try:
            tensors[name] = _array(name, span)
        except FormatError as error:
            refused[name] = str(error)
    return Checkpoint(file.path, "npz", tensors, (file,), refused=refused)


def _array(name: str, span: Span) -> StoredTensor:
    order, kind, fortran, shape, start = _header(span)
    if kind not in _DTYPES:
        raise FormatError(
            f"It has the NumPy dtype {order}{kind}, which is not a plain number. Save it as one, "
            "for instance array.astype(np.float32)."
        )
    dtype = _DTYPES[kind]
    size = bytes_of(dtype, shape)
    if start + size != span.length:
        raise FormatError(
            f"It should have {size} bytes after the header, and has {span.length - start}."
        )
    stored: StoredTensor
    if fortran and sum(length != 1 for length in shape) > 1 and size:
        strides = [math.prod(shape[:axis]) for axis in range(len(shape))]
        source = Strided(span.file, span.offset + start, strides, size // math.prod(shape))
        stored = StridedTensor(name, dtype, shape, source)
    else:
        stored = SpanTensor(name, dtype, shape, span.file, span.offset + start)
    return SwappedTensor(stored) if order == ">" else stored


def _header(span: Span) -> tuple[str, str, bool, tuple[int, ...], int]:
    """Byte order, kind, whether in Fortran order, shape, and where the values begin."""
    head = _read(span, 0, 12)
    wide = head[6:7] in (b"\x02", b"\x03")
    if head[:6] != b"\x93NUMPY" or head[6:8] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise FormatError("It is not an .npy array of version 1, 2 or 3.")
    length = int.from_bytes(head[8:12] if wide else head[8:10], "little")
    start = 12 if wide else 10
    if length > _MAX_HEADER:
        raise FormatError(f"It has a header of {length} bytes; at most {_MAX_HEADER} are read.")
    text = _read(span, start, length).decode("latin-1")
    match = _HEADER.fullmatch(text)
    if match is None:
        raise FormatError(f"It is not an array of plain numbers: {text[:200].strip()!r}.")
    order, kind, fortran, sizes = match.groups()
    shape = tuple(int(size) for size in re.findall(r"\d+", sizes))
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"It has {len(shape)} dimensions; at most {MAX_DIMENSIONS} fit.")
    return order, kind, fortran == "True", shape, start + length


def _read(span: Span, start: int, length: int) -> bytes:
    if start + length > span.length:
        raise FormatError("It is cut short.")
    return span.file.read(span.offset + start, length)
