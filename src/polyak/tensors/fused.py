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
from polyak.tensors.memory import is_dense, odd_form, times_shared
from polyak.tensors.updates import Targets, Update, Weight

BLOCK = 4096  # items a program: enough work for its look-ups, and few enough for small tensors
_WARPS = 8
_COLUMNS = 8  # averages in one launch: as many as compile within a second or two
_TABLES_KEPT = 64

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WORDS, _BYTES = 3, 4

# Where the kernels run. The tests add the CPU, on which Triton interprets them.
DEVICES = {"cuda"}


@dataclass(frozen=True)
class Launch:
    """The name of a kernel, what it is called with, and the constants that it is compiled for."""

    kernel: str
    args: tuple[Any, ...]
    constants: tuple[int, ...]


_compiled: set[tuple[object, ...]] = set()
_seconds: dict[torch.device, float] = {}  # spent on compiling
_failures: dict[torch.device, str] = {}
_warned: set[torch.device] = set()
_in_graphs: list[tuple[Any, ...]] = []  # tables that replays read, for as long as they may


class FusedRows:
    """The tensors of one device that one launch moves: weights, and statistics to copy.

    `weights` and `statistics` are their indices among the live tensors and statistics that are given.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        weights: Sequence[int],
        statistics: Sequence[Tensor],
        copied: Sequence[int],
    ) -> None:
        self.weights, self.statistics = weights, copied
        self._live_statistics = [statistics[i] for i in copied]
        tensors = [live[i] for i in weights]
        self.device = (tensors + self._live_statistics)[0].device
        # A live weight that moves is noticed before every update, and then this is made anew.
        self._addresses = _addresses(tensors)
        rows = [(t.numel(), _KINDS[t.dtype], place) for place, t in enumerate(tensors)]
        rows += [(*_as_copied(t), place) for place, t in enumerate(self._live_statistics)]
        self._rows = _on(_on_host(rows), self.device)
        self._programs = _on(_programs([row[0] for row in rows]), self.device)
        self._source_table: Tensor | None = None
        self._statistics_at: tuple[int, ...] = ()
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._columns: dict[int, tuple[Targets, int, Tensor]] = {}

    def prepare(
        self, updates: Sequence[Update], copies: Sequence[Sequence[Tensor]]
    ) -> list[Launch] | None:
        """The launches that do this, compiled if need be; None, with a failure to tell, if they cannot.

        What folds block sums later on is compiled with them: nothing has been written yet.
        """
        launches = [
            self._update(updates[start : start + _COLUMNS], copies[start : start + _COLUMNS])
            for start in range(0, max(len(updates), len(copies)), _COLUMNS)
        ]
        folds = [self._fold(u.targets, u.targets, u.weight) for u in updates if u.adds]
        return launches if all(map(self._compile, [*launches, *folds])) else None

    def run(self, launch: Launch) -> None:
        """Do it: asynchronous, on the current stream."""
        if _is_capturing(self.device):
            # Not the weights between them, which lie in the memory of the graph.
            _in_graphs.append((self._programs, self._rows, *launch.args[:2], launch.args[-1]))
        self._call(launch, len(self._programs))

    def fold(self, averages: Targets, sums: Targets, growth: Weight) -> bool:
        """`average = (average + sum) / growth`; what that rounds off stays in the sum.

        False, and nothing was changed, if the kernel cannot be compiled.
        """
        launch = self._fold(averages, sums, growth)
        compiled = self._compile(launch)
        if compiled:
            self.run(launch)
        return compiled

    def _update(self, updates: Sequence[Update], copies: Sequence[Sequence[Tensor]]) -> Launch:
        chosen = [[tensors[i] for i in self.statistics] for tensors in copies]
        weights = tuple(_scalar(update.weight, self.device) for update in updates)
        on_device = sum(isinstance(weight, Tensor) << k for k, weight in enumerate(weights))
        sources = self._sources()
        args = (  # no empty tuples: a launcher may not know what to do with one
            sources,
            tuple(self._column(update.targets) for update in updates) or (sources,),
            weights or (0.0,),
            tuple(float(update.adds) for update in updates) or (0.0,),
            tuple(self._table(_addresses(tensors)) for tensors in chosen) or (sources,),
        )
        return Launch("update", args, (on_device, len(updates), len(copies)))

    def _fold(self, averages: Targets, sums: Targets, growth: Weight) -> Launch:
        excess: Any = growth - 1
        numbers = [_scalar(number, self.device) for number in (growth, excess)]
        args = (self._column(averages), self._column(sums), *numbers)
        return Launch("fold", args, (int(isinstance(growth, Tensor)),))

    def _sources(self) -> Tensor:
        now = _addresses(self._live_statistics)
        if self._source_table is None or now != self._statistics_at:
            made = _on_host([*self._addresses, *now])
            self._statistics_at, self._source_table = now, _on(made, self.device)
        return self._source_table

    def _column(self, targets: Targets) -> Tensor:
        """Where the rows of an average are: looked up only after their memory may have moved."""
        known = self._columns.get(id(targets))
        if known is not None and known[0] is targets and known[1] == times_shared():
            return known[2]
        table = self._table(_addresses([targets.tensors[i] for i in self.weights]))
        # Asking for an address that is to be written to ends the sharing of its memory.
        self._columns[id(targets)] = (targets, times_shared(), table)
        return table

    def _table(self, addresses: tuple[int, ...]) -> Tensor:
        table = self._tables.get(addresses)
        if table is None:
            if len(self._tables) >= _TABLES_KEPT:
                self._tables.clear()
            table = self._tables[addresses] = _on(_on_host(addresses), self.device)
        return table

    def _compile(self, launch: Launch) -> bool:
        key = (self.device, launch.kernel, *launch.constants)
        if key in _compiled:
            return True
        _refuse_in_capture(self.device)
        start = time.perf_counter()
        try:
            self._call(launch, 0)
        except Exception as error:
            _failures[self.device] = _in_short(error)
            return False
        _seconds[self.device] = seconds_compiling(self.device) + time.perf_counter() - start
        _compiled.add(key)
        return True

    def _call(self, launch: Launch, n_programs: int) -> None:
        kernel = getattr(_kernels(), launch.kernel)
        with _current(self.device):
            kernel[(n_programs,)](
                self._programs,
                self._rows,
                *launch.args,
                *launch.constants,
                BLOCK,
                num_warps=_WARPS,
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


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(Tensor.data_ptr, tensors))


def _programs(sizes: Sequence[int]) -> Tensor:
    """For each program the row that it works on, and which piece of it."""
    pieces = _on_host([-(-size // BLOCK) for size in sizes])
    row = torch.repeat_interleave(pieces)
    piece = torch.arange(len(row), device="cpu") - (pieces.cumsum(0) - pieces)[row]
    return torch.stack([row, piece], dim=1)


def _as_copied(tensor: Tensor) -> tuple[int, int]:
    """A statistic as items to copy, whatever they mean: their number and kind."""
    n_bytes = tensor.numel() * tensor.element_size()
    return (n_bytes, _BYTES) if tensor.element_size() % 4 else (n_bytes // 4, _WORDS)


def _can_be_read(tensor: Tensor) -> bool:
    as_it_stands = not (odd_form(tensor) or tensor.is_conj() or tensor.is_neg())
    return as_it_stands and is_dense(tensor)


def _laid_out_alike(a: Tensor, b: Tensor) -> bool:
    return (a.device, a.shape, a.stride()) == (b.device, b.shape, b.stride())


def _scalar(number: Weight, device: torch.device) -> Weight:
    if isinstance(number, Tensor):
        return number.to(device, non_blocking=True)
    return float(number)


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


def _on_host(numbers: Sequence[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")  # whatever the default device is


def _on(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return table
    _refuse_in_capture(device)
    return table.pin_memory().to(device, non_blocking=True)


def _refuse_in_capture(device: torch.device) -> None:
    if _is_capturing(device):
        raise UsageError(
            "update() in a CUDA graph, but not in the way it was last called, or of tensors that have "
            "moved since. Call update() in the same way once before the capture."
        )


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
