"""The dtypes of files in torch, and in which precision each is accumulated."""

from __future__ import annotations

import torch

from polyak.checkpoints.reading.layout import DTYPE_BITS

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
