"""`Recorder`: the mean of every interval of training, from which any average is made afterwards."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.lr_scheduler import LRScheduler

from polyak.averaging import saving, state
from polyak.averaging.hook import Attachment, Members
from polyak.averaging.record_folder import (
    Outcome,
    RecordFolder,
    bytes_of_one,
    contents_of,
    record_id,
)
from polyak.averaging.recorder_options import (
    TINY,
    VERSION,
    checked_carry,
    checked_interval,
    checked_keep,
    checked_state,
    expected,
    no_average,
    size,
)
from polyak.averaging.tracker import Member, Tracker
from polyak.errors import (
    ArgumentError,
    NonFiniteError,
    PolyakError,
    UsageError,
    require,
    warn,
)
from polyak.files import as_path
from polyak.maths.arguments import at_least_one, number
from polyak.maths.planning import Span
from polyak.maths.profiles import SWA
from polyak.tensors.names import named_tensors
from polyak.tensors.ranks import rank
from polyak.tensors.sharding import is_sharded, sharded_as

SLOW_SECONDS = 1.0
"""How long a capture may wait for the disk before a warning says so."""


class Recorder:
    r"""Records the mean of the weights over each interval of training, one file per interval.

    Afterwards `polyak.Trajectory` makes any average from them: any window, decay and profile, seen from
    any moment. While it trains a model needs one more set of its weights in float32, takes them about 20
    times an interval, and writes `interval-<k>.safetensors` in the background: an ordinary averaged file
    with its edges and the newest buffers. What 64 intervals cost in precision stands in
    `Trajectory.plan`; it is far below what a validation set can tell.

    Args:
        model: the model that trains; tensors are matched by name.
        folder: where the record goes. One that holds a record already is refused, unless the state that
            is loaded is that record's own.
        interval: how long an interval is, in `unit`.
        total: how long training will be, to be divided into `intervals`; instead of `interval`.
        intervals: into how many.
        captures: how often an interval takes the weights, at even distances; once per update if there
            are fewer. With 1 each file holds the weights at the end of its interval.
        keep: for training of unknown length: at most so many files, an even number. When time is `keep`
            intervals long, neighbours are merged in pairs and the interval doubles.
        dtype: of the files: float32 by default (float64 for float64 weights), or torch.bfloat16, where
            what rounding leaves is carried into the next interval; that takes another set of weights.
        device: where to keep the mean; "cpu" beside a GPU takes no memory there.
        unit: what time is counted in. `attach` counts "steps", or "captures" with `at=`.

    Raises:
        ArgumentError: options out of their domain; a model that FSDP1 has sharded.

    Under `torch.distributed` rank 0 records, which is right for DDP. Of a sharded model every rank keeps the
    mean of its shards, and all write one file together: `update`, `close` and the first capture are called
    on all ranks, which see the same folder. `polyak.sharded.load` brings its state back.

    >>> import tempfile, torch, polyak
    >>> model = torch.nn.Linear(2, 1)
    >>> folder = tempfile.mkdtemp()
    >>> with polyak.Recorder(model, folder, interval=10) as recorder:
    ...     for value in range(40):
    ...         _ = torch.nn.init.constant_(model.weight, value)
    ...         recorder.update()
    >>> polyak.Trajectory(folder).average(polyak.Window(20))["weight"]
    tensor([[29.5000, 29.5000]])

    """

    def __init__(  # noqa: PLR0913 - keyword-only
        self,
        model: Module,
        folder: str | os.PathLike[str],
        *,
        interval: float | None = None,
        total: float | None = None,
        intervals: int = 64,
        captures: int = 20,
        keep: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        unit: str = "steps",
    ) -> None:
        require(isinstance(unit, str), f"unit is {unit!r}; expected a word such as 'steps'.")
        require(
            dtype in (None, torch.float32, torch.float64, torch.bfloat16),
            f"dtype is {dtype}; a record is kept as torch.float32, torch.bfloat16 or torch.float64.",
        )
        wide = None if dtype is torch.bfloat16 else dtype
        self._tracker = Tracker(model, unit=unit, dtype=wide, device=device)
        self._member = self._tracker.join(SWA())
        self._member.unit = unit
        self.unit = unit
        self._base = self._interval = checked_interval(interval, total, intervals)
        self._total = total
        self._per_interval = at_least_one("captures", captures)
        self._keep = checked_keep(keep)
        self._folder = RecordFolder(as_path(folder), dtype)
        self._begun = False  # the folder is known to be ours
        self._closed = False
        self._time = 0.0
        self._unread: Tensor | float = 0.0  # time that the device knows, as steps may be skipped
        self._latest = 0.0  # the time if none was
        self._next_middle = self._next_edge = 0.0  # nothing is due before either
        self._start = 0.0  # of the present interval,
        self._covered = 0.0  # up to where captures stand for it,
        self._captures = 0  # and how many
        self._carry: dict[str, Tensor] = {}
        self._writing: Span | None = None
        self._tried = 0.0  # when writing failed: it is tried again at the next edge
        self._merges = False  # neighbours are to be merged, as the interval has doubled
        self._state_start = -1.0  # of the interval in which the last state was taken

    @property
    def model(self) -> Module:
        """The model whose weights are recorded."""
        return self._tracker.tensors.model

    @property
    def interval(self) -> float:
        """How long an interval is now."""
        return self._interval

    @property
    def time(self) -> float:
        """Time since the start of the record, in `unit`."""
        self._tracker.take_due()
        self._read_time()
        return self._time

    def update(self, dt: float = 1.0, *, real: bool | Tensor = True) -> None:
        """The weights have moved on by `dt`, in `unit`; `real` as for `Average.update`.

        Call it after every step: when weights are due they are taken. A file that could not be written
        is said in a warning (PolyakWarning), and its interval goes on as a longer one.

        Raises OutputError if the folder holds another record; MismatchError if the model has changed;
        UsageError inside `applied()`, or after `close()`.
        """
        if self._closed:
            raise UsageError("update() after close(): the record is complete. Make a new Recorder.")
        if self._member.attachment is not None:
            self._tracker.take_due()
        self._advance(dt, real)

    def attach(
        self,
        optimizer: Any,
        *,
        every: int | None = None,
        at: LRScheduler | None = None,
        before_next_step: bool = False,
    ) -> Attachment:
        """Update automatically: see `Average.attach`, whose arguments and rules these are.

        `every` only says how often to look whether weights are due. With `at` (and `unit="captures"`)
        the averaging points of a schedule are the captures: `interval=1, captures=1` makes a file of each.
        """
        if self._closed:
            raise UsageError("attach() after close(): the record is complete. Make a new Recorder.")
        return Attachment(
            _Hooked(self, self._tracker, self._member),
            optimizer,
            every=every,
            at=at,
            before_next_step=before_next_step,
        )

    def close(self) -> None:
        """Take the last weights, write the unfinished interval with its true edges, and detach.

        Raises OutputError if the last file cannot be written. A second call does nothing.
        """
        if self._closed:
            return
        self._tracker.refuse_during_loan("close()")
        self._detach()
        self._read_time()
        self._settle()
        if self._time > max(self._covered, self._start):
            self._capture(self._time)
        if self._captures:
            self._write()
            self._settle(last=True)
        self._closed = True
        self._folder.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bitwise in the middle of an interval; waits for the disk.

        As plain values that `torch.load(weights_only=True)` reads; the tensors are the recorder's own.
        """
        average = state.state_dict(self._member)  # takes what is due
        self._read_time()
        self._settle()
        saved = {
            "version": VERSION,
            "record": self._folder.id,
            "base": self._base,
            "interval": self._interval,
            "time": self._time,
            "start": self._start,
            "captured": self._covered,
            "captures": self._captures,
            "carry": self._carry_to_save(),
            "average": average if self._captures else {**average, **no_average(average)},
        }
        self._state_start = self._start
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue a record: files from after the state are rewritten as their time comes again.

        Raises FormatError if it is not a recorder's state, MismatchError if it belongs to another model
        or other intervals, OutputError if the folder holds another record; nothing is changed then.
        """
        self._tracker.refuse_during_loan("load_state_dict()")
        self._settle()
        found = checked_state(state_dict, self._base)
        state.check_state(self._member, found["average"])
        slots = named_tensors(self.model).slots
        carry = checked_carry(dict(found["carry"]), {n: s.tensor for n, s in slots.items()})
        takes_part = bool(found["record"]) and self._takes_part()
        if takes_part:
            self._folder.check(found["record"])
        state.load_state(self._member, found["average"])
        if takes_part:
            self._folder.resume(found["record"], found["start"])
        self._begun = bool(found["record"])
        self._interval, self._time = found["interval"], found["time"]
        self._start, self._covered = found["start"], found["captured"]
        self._captures, self._carry = found["captures"], carry
        self._unread, self._latest = 0.0, self._time
        self._next_middle = self._next_edge = self._tried = 0.0
        self._merges = self._interval > self._base  # it may not have been done
        self._state_start = self._start
        self._closed = False

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self.close()
            return
        self._closed = True
        self._detach()
        self._folder.wait()  # what is finished stays; a resume goes on from the last state
        self._folder.close()

    def __repr__(self) -> str:
        return (
            f"Recorder({type(self.model).__name__}, {str(self._folder.path)!r}, "
            f"interval={self._interval:g}, time={self._time:g} {self.unit})"
        )

    def _carry_to_save(self) -> Any:
        slots = named_tensors(self.model).slots
        if not any(is_sharded(slots[name].tensor) for name in self._carry):
            return tuple(self._carry.items())
        return {n: sharded_as(t, slots[n].tensor) for n, t in self._carry.items()}

    def _takes_part(self) -> bool:
        """Whether this rank records: the first does for all, or each its part of a sharded model."""
        if self._tracker.tensors.are_sharded():
            self._folder.join()
            return True
        return rank() == 0

    def _advance(self, dt: float, real: bool | Tensor = True) -> None:
        if type(dt) is not float:
            dt = float(number("dt", dt))
        if not 0 < dt < math.inf:
            raise ArgumentError(f"dt is {dt}; expected the positive time since the last update.")
        if real is False:
            return
        latest = self._latest + dt
        # Where only the device knows what was skipped, it is asked when something is due, not every step.
        may_be_due = latest >= self._next_edge or latest - dt / 2 >= self._next_middle
        if may_be_due:
            self._tracker.refuse_during_loan("update()")
        if isinstance(real, Tensor):
            self._unread = self._unread + real.detach().reshape(()).to(torch.float64) * dt
        else:
            self._time += dt
        self._latest = latest
        if may_be_due:
            self._take_if_due(dt)

    def _read_time(self) -> None:
        now = self._time + float(self._unread)
        self._time, self._unread, self._latest = now, 0.0, now

    def _take_if_due(self, dt: float) -> None:
        if isinstance(self._unread, Tensor):
            self._read_time()
        cells = self._cells(self._time, dt)
        is_due = cells > self._covered_cells
        if is_due or self._ends():
            self._settle()
            if is_due:
                self._capture(self._time if dt >= self._cell else cells * self._cell)
            if self._ends() and self._captures:
                self._write()
        self._note_when_due()

    def _ends(self) -> bool:
        """Whether the present interval has ended."""
        return self._place(self._time) > self._place(self._last_edge)

    @property
    def _last_edge(self) -> float:
        """Up to where intervals are written, or are being written, or could not be."""
        return max(self._start, self._tried, 0.0 if self._writing is None else self._writing.end)

    def _note_when_due(self) -> None:
        """Nothing is due before the next cell has its middle behind it, or the interval its end."""
        safely = 2 * TINY * self._interval
        self._next_edge = (self._place(self._last_edge) + 1) * self._interval - safely
        self._next_middle = math.inf
        if self._per_interval > 1:
            self._next_middle = (self._covered_cells + 0.5) * self._cell - safely

    def _cells(self, time: float, dt: float) -> int:
        """How many of the cells that captures stand for have their middle behind them.

        Weights taken in the middle of a cell are its mean if they drift evenly; at its end they would all
        be half a cell too new, which is most of what few captures cost.
        """
        if self._per_interval == 1:
            return self._place(time)
        return math.floor((time - dt / 2) / self._cell + 0.5 + TINY)

    @property
    def _cell(self) -> float:
        return self._interval / self._per_interval

    @property
    def _covered_cells(self) -> int:
        return math.floor(self._covered / self._cell + TINY)

    def _capture(self, until: float) -> None:
        """The present weights stand for the time from the last ones to `until`."""
        if self._takes_part():
            self._tracker.update(until - self._covered, True, [self._member])
            try:
                self._begin()
            except BaseException:
                self._member.restart()  # these weights are not counted
                raise
        self._covered = until
        self._captures += 1

    def _place(self, time: float) -> int:
        return math.floor(time / self._interval + TINY)

    def _begin(self) -> None:
        """At the first capture: the folder must be ours, and how large the record will be is said."""
        if self._begun:
            return
        saving.refuse_odd_forms(self._member, self._folder.path)
        self._folder.begin(record_id(self._tracker.tensors.live))
        self._begun = True
        if rank() != 0:
            return
        each = bytes_of_one(self._member, narrow=self._folder.narrow is not None)
        said, most = expected(each, self._total, self._base, self._keep)
        sys.stderr.write(f"polyak: recording to {self._folder.path}, {said}.\n")
        free = shutil.disk_usage(self._folder.path).free
        if most > free:
            warn(
                f"The record in {self._folder.path} will take {size(most)}, and {size(free)} are free. "
                "Make room, record fewer intervals, pass keep=, or dtype=torch.bfloat16."
            )
        lost = [n for n, v in saving.extra_state(self.model).items() if not isinstance(v, Tensor)]
        if lost:
            warn(
                f"The record holds tensors only, and is without state that is no tensor: {', '.join(lost)}."
            )

    def _write(self) -> None:
        """Hand the mean of the interval to the thread that writes; captures wait for it from now on."""
        span = Span(self._start, self._time, self._captures)
        interval, protected, merges = self._interval, self._state_start, self._merges
        if self._keep is not None and self._place(self._time) >= self._keep:
            interval, merges = 2 * interval, True
        contents = None
        if self._takes_part():
            contents = contents_of(self._member, span, self._folder.id)

        def merge() -> None:
            if merges:
                self._folder.merge(interval, protected)

        # Nothing above has changed anything, for it can fail.
        self._folder.forget()
        self._writing, self._covered = span, self._time
        self._interval, self._merges = interval, merges
        if contents is not None:
            self._folder.start(contents, self._number(span), self._carry, merge)

    def _number(self, span: Span) -> int:
        """Of intervals of the first length, those that have ended, and one that has not."""
        ended = math.floor(span.end / self._base + TINY)
        return ended if ended > math.floor(span.start / self._base + TINY) else ended + 1

    def _settle(self, *, last: bool = False) -> None:
        """Wait for what is being written; begin the next interval, or go on with one that was not."""
        span = self._writing
        if span is None:
            return
        outcome = self._folder.wait()  # an interrupt here leaves all to the next call
        if outcome is None and self._takes_part():
            self._writing = None  # it was never handed over
            return
        outcome = outcome or Outcome()
        error = outcome.error
        if error is None or isinstance(error, NonFiniteError):
            self._carry = outcome.carry or self._carry
            self._merges = self._merges and outcome.merge_error is not None
            self._start, self._captures = span.end, 0
            self._member.restart()
        else:
            self._tried = span.end
        self._writing = None
        # A warning may be raised as an error: it comes when all is done.
        self._tell(span, outcome, last=last)

    def _tell(self, span: Span, outcome: Outcome, *, last: bool) -> None:
        where = f"the interval from {span.start:g} to {span.end:g} {self.unit}"
        error = outcome.error
        if error is not None and not isinstance(error, NonFiniteError):
            if last or not isinstance(error, PolyakError):
                raise error
            warn(
                f"{error} The{where[3:]} is not lost: it goes on as a longer one, and writing is tried "
                "again at its end."
            )
            return
        if error is not None:
            warn(f"{outcome.error} It is missing from the record: {where}.")
        if outcome.merge_error is not None:
            warn(f"Neighbours were not merged, which is tried again: {outcome.merge_error}")
        if outcome.waited > SLOW_SECONDS:
            warn(
                f"Training waited {outcome.waited:.1f} s for the disk to take {where}. Record longer "
                "intervals, pass dtype=torch.bfloat16, or record to a faster disk."
            )

    def _detach(self) -> None:
        if self._member.attachment is not None:
            self._member.attachment.remove()


class _Hooked(Members):
    """The recorder as what an attachment updates."""

    def __init__(self, recorder: Recorder, tracker: Tracker, member: Member) -> None:
        super().__init__(tracker, member)
        self._recorder = recorder

    def update(self, dt: float, real: bool | Tensor = True) -> None:
        """Take the weights if they are due."""
        self._recorder._advance(dt, real)

    def is_empty(self) -> bool:
        """Whether no time has passed yet."""
        return self._recorder._latest == 0
