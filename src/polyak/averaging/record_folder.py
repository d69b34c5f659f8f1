"""The folder of a record while it grows: one file at a time, written by a thread of its own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyak.averaging import saving
from polyak.averaging.tracker import Member
from polyak.errors import OutputError, PolyakError
from polyak.maths.planning import Span
from polyak.tensors.finite import refuse_nonfinite
from polyak.tensors.memory import copy_on_write, odd_form
from polyak.tensors.names import named_tensors
from polyak.tensors.sharding import is_sharded, local

if TYPE_CHECKING:
    from polyak.checkpoints.intervals import Interval


@dataclass
class Contents:
    """What one interval file will hold; tensors are read by the thread that writes it.

    averaged: the accumulators themselves, which nobody changes until the thread is done.
    whole: by name the tensors of the model, which say of what sharded values are a part.
    """

    span: Span
    averaged: dict[str, Tensor]
    others: dict[str, Tensor]
    ties: dict[str, str]
    metadata: dict[str, str]
    whole: dict[str, Tensor]
    ready: Any = None  # an event of the device that holds the accumulators


@dataclass
class Outcome:
    """What came of writing: the error, if there was one, and how long the training waited."""

    error: Exception | None = None
    merge_error: Exception | None = None
    waited: float = 0.0
    carry: dict[str, Tensor] = field(default_factory=dict)


class RecordFolder:
    """Writes, replaces and merges the files of one record: this process alone, or all after `join`."""

    def __init__(self, path: Path, dtype: torch.dtype | None) -> None:
        self.path = path
        self.id = ""
        self.narrow = dtype if dtype is torch.bfloat16 else None
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[Outcome] | None = None
        self._group: Any = None  # of the ranks that write together, and their
        self._ranks: Any = None
        # What ends after it is of a run that was given up, or was left by writing that failed.
        self._stale_from: float | None = None

    def join(self) -> None:
        """Each rank has a part of the weights, and all write one file, as soon as all have called this.

        The thread speaks to the other ranks in a group of its own, for training goes on meanwhile.
        """
        if self._ranks is None:
            from polyak.checkpoints.writing.ranks import Ranks

            self._group = torch.distributed.new_group(backend="gloo")
            self._ranks = Ranks(self._group)

    def begin(self, record: str) -> None:
        """The first file will be written. Raises OutputError if the folder holds a record."""
        self.id = self._once(lambda: self._begin(record))

    def _once(self, act: Callable[[], Any]) -> Any:
        """What `act` returns, which the first rank does for all; its error is that of all."""
        ranks = self._ranks
        if ranks is None:
            return act()
        return ranks.gather(ranks.together(lambda: act() if ranks.leader else None))[0]

    def _everywhere(self, act: Callable[[], Any]) -> None:
        """Call it here; an error on any rank is one on all."""
        act() if self._ranks is None else self._ranks.together(act)

    def _begin(self, record: str) -> str:
        there = sorted(self.path.glob("interval-*.safetensors"))
        if there:
            raise OutputError(
                f"{self.path} holds another record ({there[0].name} and {len(there) - 1} more). To "
                "continue it, load the recorder's state_dict() first; for a new record choose another "
                "folder, or remove this one."
            )
        self._make()
        return record

    def check(self, record: str) -> None:
        """Raise OutputError if the folder holds the files of another record."""
        self._once(lambda: self._check(record))

    def resume(self, record: str, start: float) -> None:
        """Continue a record that was checked: what ends after `start` is rewritten as it is reached."""
        self.id = record
        self._stale_from = start

    def _check(self, record: str) -> None:
        from polyak.checkpoints.intervals import scan_intervals

        foreign = [one for one in scan_intervals(self.path).intervals if one.record != record]
        if foreign:
            raise OutputError(
                f"{self.path} holds another record than the state: {foreign[0].path.name} is not of "
                "this run. Nothing was loaded. Choose the folder that the state was saved with."
            )
        self._make()

    def start(
        self,
        contents: Contents,
        number: int,
        carry: Mapping[str, Tensor],
        merge: Callable[[], None],
    ) -> None:
        """Begin to write an interval, then call `merge`; `wait` says what came of it."""
        pool = self._pool or ThreadPoolExecutor(1, "polyak-recorder")
        # A pool whose thread could not be started is not kept: a later thread would do what waits in it.
        self._future = pool.submit(self._write, contents, number, carry, merge)
        self._pool = pool

    def wait(self) -> Outcome | None:
        """The outcome of what was written last; None if nothing was. It can be asked again."""
        if self._future is None:
            return None
        begin = time.perf_counter()
        outcome = self._future.result()
        outcome.waited = time.perf_counter() - begin
        return outcome

    def forget(self) -> None:
        """What was written last is settled."""
        self._future = None

    def merge(self, interval: float, protected: float) -> None:
        """Merge all that is within one interval, which has become longer.

        protected: the start of the interval in which the last state was taken. If a merge straddles it,
        the file that ends there is kept under a hidden name, so that a resume finds it.
        """
        from polyak.checkpoints.intervals import merge_intervals, scan_intervals

        cells: dict[int, list[Interval]] = {}
        for one in scan_intervals(self.path).intervals:
            cells.setdefault(int(one.start / interval + 1e-9), []).append(one)
        for group in cells.values():
            kept = [one for one in group[:-1] if one.end == protected]
            for one in kept:
                hidden = _hidden(one.path)
                hidden.unlink(missing_ok=True)
                hidden.hardlink_to(one.path)
            merge_intervals(group)

    def close(self) -> None:
        """Let the thread end."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"Could not make the folder {self.path}: {error.strerror}. Choose another one."
            ) from None
        for part in self.path.glob(".interval-*.part"):
            part.unlink(missing_ok=True)

    def _write(
        self,
        contents: Contents,
        number: int,
        carry: Mapping[str, Tensor],
        merge: Callable[[], None],
    ) -> Outcome:
        outcome = Outcome()
        try:
            outcome.carry = self._write_file(contents, number, carry)
        except PolyakError as error:
            outcome.error = error
        except OSError as error:
            outcome.error = OutputError(f"Could not write to {self.path}: {error.strerror}.")
        except Exception as error:  # raised or told by whoever waits
            outcome.error = error
        if outcome.error is not None:
            stale_from = contents.span.start if self._stale_from is None else self._stale_from
            self._stale_from = min(stale_from, contents.span.start)  # its file may be there
            return outcome
        try:
            self._once(merge)
        except Exception as error:  # the file is written, and merging is tried again
            outcome.merge_error = error
        return outcome

    def _write_file(
        self, contents: Contents, number: int, carry: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Write the file of an interval; what rounding has left of it for the next one."""
        from polyak.checkpoints.intervals import interval_path

        if contents.ready is not None:
            contents.ready.synchronize()
        averaged, left = contents.averaged, dict[str, Tensor]()
        self._everywhere(
            lambda: refuse_nonfinite(averaged.items(), "An interval of the record", "")
        )
        if self.narrow is not None:
            averaged, left = _rounded(averaged, carry, self.narrow)
        path = interval_path(self.path, number)
        self._put(path, {**averaged, **contents.others}, contents)
        self._once(lambda: self._remove_stale(path))
        return left

    def _put(self, path: Path, tensors: Mapping[str, Tensor], contents: Contents) -> None:
        described: dict[str, Any] = {"ties": contents.ties, "metadata": contents.metadata}
        if self._ranks is None:
            from polyak.checkpoints.writing.save import write_checkpoint

            write_checkpoint(path, tensors, overwrite=True, **described)
            return
        from polyak.checkpoints.writing.collective import Boxes, write_collectively

        boxes = {n: Boxes(*saving.boxed(t, contents.whole.get(n, t))) for n, t in tensors.items()}
        write_collectively(path, boxes, overwrite=True, group=self._group, **described)

    def _remove_stale(self, written: Path) -> None:
        """Remove what a run that is given up has written after the state, or writing that failed."""
        from polyak.checkpoints.intervals import scan_intervals
        from polyak.checkpoints.reading.folders import INTERVAL

        start = self._stale_from
        if start is None:
            return
        for one in self.path.iterdir():
            hidden = one.name.removeprefix(".") if one.name.startswith(".interval-") else ""
            if INTERVAL.fullmatch(hidden):
                self._restore(one, start)
        for found in scan_intervals(self.path).intervals:
            if found.end > start and found.path != written:
                found.path.unlink(missing_ok=True)
        self._stale_from = None

    def _restore(self, hidden: Path, start: float) -> None:
        from polyak.checkpoints.reading.opening import open_checkpoint

        with open_checkpoint(hidden) as opened:
            ends_there = opened.metadata.get("interval", "").endswith(f" {start!r}]")
        if ends_there:
            # Its name is that of an end, which no later file has.
            hidden.replace(hidden.with_name(hidden.name.removeprefix(".")))


def contents_of(member: Member, span: Span, record: str) -> Contents:
    """What the file of an interval holds: the mean, the newest statistics, all else as it is now."""
    from polyak.checkpoints.intervals import interval_metadata

    tracker = member.tracker
    tracker.finish()
    squares = float(member.clock.on_host().sum_squared_shares)
    metadata = interval_metadata(span, tracker.unit or "", record, squares)
    tensors, held = tracker.tensors, member.accumulator
    tensors.settle()
    assert held is not None, "something was captured"  # noqa: S101 - for the type checker
    averaged = {name: held.value(i, member.clock) for i, name in enumerate(tensors.names)}
    statistics = dict(zip(tensors.statistic_names, member.statistics, strict=True))
    named = named_tensors(tensors.model)
    others = {n: statistics[n] for n in statistics if named.slots[n].persistent}
    for name, slot in named.slots.items():
        if slot.persistent and name not in averaged and name not in statistics:
            others[name] = _as_it_is(slot.tensor)
    averaged = {name: t for name, t in averaged.items() if named.slots[name].persistent}
    extra = saving.extra_state(tensors.model)
    others |= {name: value.detach().clone() for name, value in extra.items() if _is_plain(value)}
    kept = averaged.keys() | others.keys()
    ties = {alias: name for alias, name in named.ties.items() if name in kept}
    said = {**metadata, "batchnorm": "stale" if tensors.statistics else "none"}
    whole = {name: slot.tensor for name, slot in named.slots.items()}
    return Contents(span, averaged, others, ties, said, whole, _event(averaged.values()))


def bytes_of_one(member: Member, *, narrow: bool) -> int:
    """How large the file of an interval is; `narrow` if what is averaged is rounded to 16 bits."""
    held, tensors = member.accumulator, member.tracker.tensors
    kept_as = held.tensors_held()[0] if held else []
    averaged = dict(zip(tensors.names, kept_as, strict=bool(held)))
    total = 0
    for name, slot in named_tensors(tensors.model).slots.items():
        kept = averaged.get(name, slot.tensor)
        is_narrow = narrow and name in averaged and kept.is_floating_point()
        total += slot.tensor.numel() * (2 if is_narrow else kept.element_size()) * slot.persistent
    return total


def record_id(tensors: Sequence[Tensor]) -> str:
    """Twelve hex digits of a few values of every weight: equal runs have equal ones."""
    few = [t.detach()[(0,) * max(t.dim() - 1, 0)].reshape(-1)[:8] for t in tensors if t.numel()]
    values = [
        str(one.to(torch.complex128 if one.is_complex() else torch.float64).tolist()) for one in few
    ]
    return hashlib.sha256("".join(values).encode()).hexdigest()[:12]


def _as_it_is(tensor: Tensor) -> Tensor:
    """The values of now, whatever is written to the tensor later: no copy where that can be had."""
    if is_sharded(tensor):
        return local(tensor).detach().clone()
    shared = None if odd_form(tensor) else copy_on_write(tensor)
    return tensor.detach().clone() if shared is None else shared


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and not odd_form(value)


def _event(tensors: Any) -> Any:
    device = next((t.device for t in tensors if t.device.type == "cuda"), None)
    return None if device is None else torch.cuda.current_stream(device).record_event()


def _rounded(
    values: Mapping[str, Tensor], carry: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`round(mean + carry)` of each, and what that leaves for the next interval."""
    written: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    for name, value in values.items():
        if not value.is_floating_point():
            written[name] = value
            continue
        exact = value + carry[name].to(value.dtype) if name in carry else value
        written[name] = exact.to(dtype)
        left[name] = (exact - written[name].to(exact.dtype)).to(dtype)
    return written, left


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}")
