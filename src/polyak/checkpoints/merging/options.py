"""What can be asked of a merge, checked where it enters."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from polyak.errors import ArgumentError, require
from polyak.files import as_path
from polyak.maths.arguments import count, flag

if TYPE_CHECKING:
    import torch

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


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How checkpoints are merged. The fields are the keywords of `average_checkpoints`, as given.

    Properties give the values that text stands for. Raises ArgumentError for the first that is wrong.
    """

    dtype: str | torch.dtype | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    base: str | os.PathLike[str] | None = None
    key: str | None = None
    normalize: bool = False
    shard_size: int | str = "5GB"
    max_memory: int | str = "128MiB"
    threads: int | None = None
    part: str | None = None
    format: str | None = None
    dcp_files: int | None = None
    dcp_key: str | None = None
    keep_state: bool = False
    steps_unit: str | None = None
    steps_from: str | os.PathLike[str] | None = None
    resume: bool = False
    verify: bool = False
    overwrite: bool = False
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
                raise ArgumentError(f"{name} is {value!r}; expected a list of name patterns.")
        for name in ("normalize", "keep_state", "resume", "verify", "overwrite"):
            flag(name, getattr(self, name))
        for name in ("key", "part", "format", "dcp_key", "steps_unit"):
            value = getattr(self, name)
            require(value is None or isinstance(value, str), f"{name} is {value!r}; expected text.")
        for path in (self.base, self.steps_from):
            if path is not None:
                as_path(path)
        self._check_format()
        require(
            self.progress is None or callable(self.progress),
            f"progress is {self.progress!r}; expected a function of two numbers.",
        )
        for name in ("written_dtype", "shard_bytes", "memory_bytes", "thread_count", "share"):
            getattr(self, name)

    def _check_format(self) -> None:
        require(
            self.format in (None, "safetensors", "dcp"),
            f"format is {self.format!r}; expected 'safetensors' or 'dcp', which is what a folder holds.",
        )
        if self.dcp_files is not None and not 1 <= count("dcp_files", self.dcp_files) <= 65536:
            raise ArgumentError(f"dcp_files is {self.dcp_files}; expected 1 to 65536.")
        given = {
            "dcp_files": self.dcp_files,
            "dcp_key": self.dcp_key,
            "keep_state": self.keep_state,
        }
        idle = [name for name, value in given.items() if value not in (None, False)]
        if idle and not self.is_dcp:
            raise ArgumentError(f"{idle[0]} is about DCP folders. Pass format='dcp' to write them.")

    @property
    def is_dcp(self) -> bool:
        """Whether the outputs are folders of `torch.distributed.checkpoint`."""
        return self.format == "dcp"

    @cached_property
    def written_dtype(self) -> str | None:
        """The dtype of floating tensors as safetensors spells it; None keeps that of the inputs."""
        return parse_dtype(self.dtype)

    @cached_property
    def shard_bytes(self) -> int:
        """The size of a shard."""
        return parse_bytes(self.shard_size, "shard_size")

    @cached_property
    def memory_bytes(self) -> int:
        """What all buffers together may take."""
        return parse_bytes(self.max_memory, "max_memory")

    @cached_property
    def thread_count(self) -> int:
        """How many threads to use; by default one per core that this process may use."""
        if self.threads is not None:
            if not 1 <= count("threads", self.threads, -(1 << 62)) <= 1024:
                raise ArgumentError(f"threads is {self.threads}; expected 1 to 1024.")
            return self.threads
        if hasattr(os, "sched_getaffinity"):
            return min(MAX_THREADS, len(os.sched_getaffinity(0)))
        return min(MAX_THREADS, os.cpu_count() or 1)

    @cached_property
    def share(self) -> tuple[int, int]:
        """Which part of the work is this process's, from 0, and how many parts there are."""
        return parse_part(self.part)


def parse_bytes(value: int | str, what: str) -> int:
    """A number of bytes, or text like `256MB` (10^6) or `256MiB` (2^20); ArgumentError otherwise.

    >>> parse_bytes("1.5GB", "max_memory"), parse_bytes("4 KiB", "max_memory")
    (1500000000, 4096)
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(value))
    try:
        size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise ArgumentError(f"{what} is {value!r}; expected a size like 256MB, 1.5GB or 4KiB.")
    return size


def parse_dtype(value: str | torch.dtype | None) -> str | None:
    """The safetensors spelling of a floating dtype given as text or `torch.dtype`; None stays None.

    >>> parse_dtype("bfloat16"), parse_dtype("fp16"), parse_dtype(None)
    ('BF16', 'F16', None)
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.").lower()
    if name not in _SPELLINGS:
        known = ", ".join(aliases[0] for aliases in _DTYPES.values())
        raise ArgumentError(f"dtype is {value!r}; averages are written as one of {known}.")
    return _SPELLINGS[name]


def parse_part(value: str | None) -> tuple[int, int]:
    """`"2/4"` as (1, 4): the index from 0, and how many; (0, 1) for None.

    >>> parse_part("1/4"), parse_part(None)
    ((0, 4), (0, 1))
    """
    if value is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", value.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 4096:
        raise ArgumentError(f"part is {value!r}; expected I/N with 1 <= I <= N, like 1/4.")
    return int(match[1]) - 1, int(match[2])
