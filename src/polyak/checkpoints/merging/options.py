"""What can be asked of a merge, checked where it enters."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypedDict

from polyak.errors import ArgumentError

DEFAULT_MEMORY = 128 * 1024**2
DEFAULT_SHARD = 5 * 10**9
MAX_THREADS = 16

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {f"{_prefix}B": 1000**_power, f"{_prefix}IB": 1024**_power, _prefix: 1000**_power}

_DTYPES = {
    "F64": ("float64", "double", "fp64"),
    "F32": ("float32", "float", "fp32"),
    "F16": ("float16", "half", "fp16"),
    "BF16": ("bfloat16", "bf16"),
}
_SPELLINGS = {alias: name for name, all_ in _DTYPES.items() for alias in (name.lower(), *all_)}


class Options(TypedDict, total=False):
    """The keyword arguments of `average_checkpoints`; what each means stands there."""

    dtype: Any
    include: Sequence[str]
    exclude: Sequence[str]
    base: str | os.PathLike[str] | None
    key: str | None
    normalize: bool
    shard_size: int | str
    max_memory: int | str
    threads: int | None
    part: str | None
    resume: bool
    verify: bool
    overwrite: bool
    progress: Callable[[int, int], None] | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`Options` with their defaults, every value checked."""

    dtype: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    base: str | None
    key: str | None
    normalize: bool
    shard_size: int
    max_memory: int
    threads: int
    part: tuple[int, int]
    resume: bool
    verify: bool
    overwrite: bool
    progress: Callable[[int, int], None] | None

    @classmethod
    def of(cls, options: Options) -> Self:
        """Check every option; ArgumentError for the first that is wrong."""
        if unknown := options.keys() - Options.__annotations__.keys():
            known = ", ".join(Options.__annotations__)
            raise ArgumentError(f"Unknown options {sorted(unknown)}; known are {known}.")
        base = options.get("base")
        return cls(
            dtype=dtype_from(options.get("dtype")),
            include=_patterns("include", options.get("include", ())),
            exclude=_patterns("exclude", options.get("exclude", ())),
            base=None if base is None else os.fspath(base),
            key=options.get("key"),
            normalize=bool(options.get("normalize", False)),
            shard_size=bytes_from(options.get("shard_size", DEFAULT_SHARD), "shard_size"),
            max_memory=bytes_from(options.get("max_memory", DEFAULT_MEMORY), "max_memory"),
            threads=_threads(options.get("threads")),
            part=part_from(options.get("part")),
            resume=bool(options.get("resume", False)),
            verify=bool(options.get("verify", False)),
            overwrite=bool(options.get("overwrite", False)),
            progress=options.get("progress"),
        )


def bytes_from(value: int | str, what: str) -> int:
    """A number of bytes, or text like `256MB` (10^6) or `256MiB` (2^20); ArgumentError else.

    >>> bytes_from("1.5GB", "max_memory"), bytes_from("4 KiB", "max_memory")
    (1500000000, 4096)
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(value))
    try:
        size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError):
        size = 0
    if size <= 0:
        raise ArgumentError(f"{what} is {value!r}; expected a size like 256MB, 1.5GB or 4KiB.")
    return size


def dtype_from(value: Any) -> str | None:
    """The safetensors spelling of a floating dtype given as text or `torch.dtype`; None stays.

    >>> dtype_from("bfloat16"), dtype_from("fp16"), dtype_from(None)
    ('BF16', 'F16', None)
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.").lower()
    if name not in _SPELLINGS:
        known = ", ".join(aliases[0] for aliases in _DTYPES.values())
        raise ArgumentError(f"dtype is {value!r}; averages are written as one of {known}.")
    return _SPELLINGS[name]


def part_from(value: str | None) -> tuple[int, int]:
    """`"2/4"` as (1, 4): the index from 0, and how many; (0, 1) for None.

    >>> part_from("1/4"), part_from(None)
    ((0, 4), (0, 1))
    """
    if value is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", value.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 4096:
        raise ArgumentError(f"part is {value!r}; expected I/N with 1 <= I <= N, like 1/4.")
    return int(match[1]) - 1, int(match[2])


def _threads(value: int | None) -> int:
    if value is None:
        mine = (
            os.sched_getaffinity(0)
            if hasattr(os, "sched_getaffinity")
            else range(os.cpu_count() or 1)
        )
        return min(MAX_THREADS, len(mine))
    if not 1 <= value <= 1024:
        raise ArgumentError(f"threads is {value}; expected 1 to 1024.")
    return value


def _patterns(what: str, value: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ArgumentError(f"{what} is the text {value!r}; expected a list of name patterns.")
    return tuple(value)
