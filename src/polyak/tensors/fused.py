"""Updates on a GPU in one launch: the tables that a kernel walks, and when there is no kernel.

The kernels are in `kernels.py`, which needs Triton. Where that is missing or cannot compile, and for
tensors that are not dense, complex or in float64, `blend.py` calls torch's own functions instead.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from polyak.errors import UsageError, warn
from polyak.tensors.memory import is_dense, odd_form

Number = float | Tensor

BLOCK = 4096  # items a program: enough work for its look-ups, and few enough for small tensors
_WARPS = 8
_COLUMNS = 8  # averages in one launch: as many as compile within a second or two
_TABLES_KEPT = 64

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WORDS, _BYTES = 3, 4

# Where the kernels run. The tests add the CPU, on which Triton interprets them.
DEVICES = {"cuda"}

_compiled: set[tuple[object, ...]] = set()
_seconds: dict[torch.device, float] = {}  # spent on compiling
_failures: dict[torch.device, str] = {}
_warned: set[torch.device] = set()


@dataclass(frozen=True)
class Column:
    """One average's part in a launch: what moves toward the weights, and copies of the statistics.

    None for what stays as it is; else one tensor per row. `adds`: the weights are added, times `weight`.
    """

    targets: Sequence[Tensor] | None
    copies: Sequence[Tensor] | None
    weight: Number = 0.0
    adds: bool = False


class FusedRows:
    """The tensors of one device that are moved by one launch: weights, and statistics to copy."""

    def __init__(self, weights: Sequence[Tensor], statistics: Sequence[Tensor]) -> None:
        self.device = (*weights, *statistics)[0].device
        self._weights, self._statistics = weights, statistics
        rows = [(t.numel(), _KINDS[t.dtype]) for t in weights] + [_as_copied(t) for t in statistics]
        self._rows = _on(torch.tensor(rows), self.device)
        pieces = torch.tensor([-(-n // BLOCK) for n, _ in rows])
        self._n_programs = int(pieces.sum())
        row = torch.repeat_interleave(pieces)
        piece = torch.arange(self._n_programs) - (pieces.cumsum(0) - pieces)[row]
        self._programs = _on(torch.stack([row, piece], dim=1), self.device)
        self._tables: dict[tuple[int, ...], Tensor] = {}

    def compiles(self, columns: Sequence[Column]) -> bool:
        """Whether `update` can run, compiling it if need be; if not, `warn_of_failure` says why.

        With what folds the sums later on, so that nothing has been written when this is found out.
        """
        return all(
            self._compile("update", *self._launch(part)) for part in _parts(columns)
        ) and all(
            self._compile("fold", *self._folding(column.targets, column.targets, column.weight))
            for column in columns
            if column.adds and column.targets
        )

    def update(self, columns: Sequence[Column]) -> None:
        """Move and copy everything, for up to 8 averages in one launch."""
        for part in _parts(columns):
            self._run("update", self._n_programs, *self._launch(part))

    def fold(self, averages: Sequence[Tensor], sums: Sequence[Tensor], growth: Number) -> bool:
        """`average = (average + sum) / growth`; what that rounds off stays in the sum.

        False, and nothing was changed, if the kernel cannot be compiled.
        """
        launch = self._folding(averages, sums, growth)
        if not self._compile("fold", *launch):
            return False
        self._run("fold", self._n_programs, *launch)
        return True

    def _folding(
        self, averages: Sequence[Tensor], sums: Sequence[Tensor], growth: Number
    ) -> tuple[list[Any], int]:
        tables = [self._table(targets, None) for targets in (averages, sums)]
        excess: Any = growth - 1
        numbers = [_scalar(number, self.device) for number in (growth, excess)]
        return [*tables, *numbers], int(isinstance(growth, Tensor))

    def _launch(self, columns: Sequence[Column]) -> tuple[list[Any], int, int]:
        """The arguments of the kernel, and what it is compiled for."""
        tables = tuple(self._table(column.targets, column.copies) for column in columns)
        weights = tuple(_scalar(column.weight, self.device) for column in columns)
        adds = tuple(float(column.adds) for column in columns)
        on_device = sum(isinstance(w, Tensor) << k for k, w in enumerate(weights))
        sources = self._table(self._weights, self._statistics)
        return [sources, tables, weights, adds], on_device, len(columns)

    def _table(self, targets: Sequence[Tensor] | None, copies: Sequence[Tensor] | None) -> Tensor:
        """Where the rows of one column are now: on the device already, unless one has moved."""
        addresses = (
            *(map(Tensor.data_ptr, targets) if targets else [0] * len(self._weights)),
            *(map(Tensor.data_ptr, copies) if copies else [0] * len(self._statistics)),
        )
        table = self._tables.get(addresses)
        if table is None:
            if len(self._tables) >= _TABLES_KEPT:
                self._tables.clear()
            table = self._tables[addresses] = _on(torch.tensor(addresses), self.device)
        return table

    def _compile(self, name: str, args: Sequence[Any], *constants: int) -> bool:
        key = (name, self.device, *constants)
        if key in _compiled:
            return True
        _refuse_in_capture(self.device)
        start = time.perf_counter()
        try:
            self._run(name, 0, args, *constants)
        except Exception as error:
            _failures[self.device] = _in_short(error)
            return False
        _seconds[self.device] = seconds_compiling(self.device) + time.perf_counter() - start
        _compiled.add(key)
        return True

    def _run(self, name: str, n_programs: int, args: Sequence[Any], *constants: int) -> None:
        kernel = getattr(_kernels(), name)
        with _current(self.device):
            kernel[(n_programs,)](
                self._programs, self._rows, *args, *constants, BLOCK, num_warps=_WARPS
            )


def fits(source: Tensor, target: Tensor) -> bool:
    """Whether the kernel can move this average toward these weights."""
    return (
        source.dtype in _KINDS
        and target.dtype is torch.float32
        and _can_be_read(source)
        and _laid_out_alike(source, target)
    )


def can_be_copied(statistic: Tensor) -> bool:
    """Whether the kernel can copy this into a clone of it."""
    return _can_be_read(statistic)


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on a device, as far as is known before they are compiled."""
    if device.type not in DEVICES or device in _failures:
        return False
    try:
        kernels = _kernels()
    except Exception as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "triton"):
            _failures[device] = _in_short(error)
        return False
    # The interpreter reads the memory of the host only.
    return bool(kernels.INTERPRETED) is (device.type == "cpu")


def warn_of_failure(device: torch.device) -> None:
    """Say once why the updates on a device are not fused."""
    if device in _failures and device not in _warned:
        _warned.add(device)
        warn(
            f"Triton could not compile the kernel that updates averages on {device} "
            f"({_failures[device]}). They are updated by torch's own functions, which gives the same "
            "averages, but takes longer for many tensors and for bfloat16. Triton needs a C compiler "
            "and the headers of Python; without Triton, this warning does not appear."
        )


def seconds_compiling(device: torch.device) -> float:
    """How long compiling has taken in this process: once, and less where Triton's cache had it."""
    return _seconds.get(device, 0.0)


@cache
def _kernels() -> Any:
    return import_module("polyak.tensors.kernels")


def _parts(columns: Sequence[Column]) -> list[Sequence[Column]]:
    return [columns[start : start + _COLUMNS] for start in range(0, len(columns), _COLUMNS)]


def _as_copied(tensor: Tensor) -> tuple[int, int]:
    """A statistic as items to copy, whatever they mean: their number and kind."""
    n_bytes = tensor.numel() * tensor.element_size()
    return (n_bytes, _BYTES) if tensor.element_size() % 4 else (n_bytes // 4, _WORDS)


def _can_be_read(tensor: Tensor) -> bool:
    as_it_stands = not (odd_form(tensor) or tensor.is_conj() or tensor.is_neg())
    return as_it_stands and is_dense(tensor)


def _laid_out_alike(a: Tensor, b: Tensor) -> bool:
    return (a.device, a.shape, a.stride()) == (b.device, b.shape, b.stride())


def _scalar(number: Number, device: torch.device) -> Number:
    if isinstance(number, Tensor):
        return number.to(device, non_blocking=True)
    return float(number)


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


def _on(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return table
    _refuse_in_capture(device)
    return table.pin_memory().to(device, non_blocking=True)


def _refuse_in_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UsageError(
            "update() in a CUDA graph, but not in the way it was last called, or of tensors that have "
            "moved since. Call update() in the same way once before the capture."
        )


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
