"""The time of an average: how far it has come, and with what share the next weights enter.

Time counts from the start of averaging. The first weights enter with share 1, at time `dt`; for a
profile whose first weights are an atom at 0 (`EMA(keep_initial=True)`) their time is 0.

On the host all of it are Python numbers. Once a step may have been skipped on an accelerator (the
fused optimizers under a `GradScaler`), or an update is captured in a CUDA graph, time lives there
as 0-d float64 tensors: a skipped step moves it by 0 and enters with share 0, and nothing waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from polyak.errors import ArgumentError
from polyak.maths.profile import Profile

Number = float | Tensor


@dataclass(frozen=True, slots=True)
class Clock:
    """One moment of an average. `advance` gives the next; nothing here changes in place."""

    profile: Profile
    time: Number = 0.0
    dt: Number = 1.0
    share: Number = 0.0  # with what share the weights of this moment enter
    count: Number = 0  # weights averaged so far
    sum_squared_shares: Number = 0.0  # sum of squared shares of all that entered
    time_if_none_skipped: float = 0.0  # on the host: the time if no step was skipped

    @property
    def on_device(self) -> bool:
        """Whether time lives in tensors."""
        return isinstance(self.time, Tensor)

    def advance(self, dt: float, real: Tensor | None = None) -> Clock:
        """The moment `dt` later; `real` (0-d) is the part of `dt` that was not skipped, 0 to 1.

        Raises ArgumentError unless `dt` is positive and finite.
        """
        if not 0 < dt < math.inf:
            raise ArgumentError(f"dt is {dt}; expected the positive time since the last update.")
        if real is not None or isinstance(self.time, Tensor):
            return self._advanced_on_device(dt, real)
        return self._advanced_on_host(dt)

    def to(self, device: torch.device) -> Clock:
        """The same moment with its numbers in tensors on a device."""
        return replace(
            self,
            time=_scalar(self.time, device),
            count=_scalar(self.count, device),
            sum_squared_shares=_scalar(self.sum_squared_shares, device),
        )

    def copied_into(self, before: Clock) -> Clock:
        """The same moment in the memory of the one before, as the replays of a graph need it."""
        kept: list[Any] = [before.time, before.count, before.sum_squared_shares]
        now: list[Any] = [self.time, self.count, self.sum_squared_shares]
        torch._foreach_copy_(kept, now)
        return replace(self, time=kept[0], count=kept[1], sum_squared_shares=kept[2])

    def on_host(self) -> Clock:
        """The same moment with all numbers on the host: the one place that waits for a device."""
        if not self.on_device:
            return self
        dt, share = float(self.dt), float(self.share)
        sum_squared_shares = float(self.sum_squared_shares)
        return replace(
            self,
            time=float(self.time),
            dt=dt,
            share=share,
            count=int(self.count),
            sum_squared_shares=sum_squared_shares,
        )

    def share_since(self, start: Number) -> Number:
        """The share of everything after `start`, seen from this moment."""
        if not isinstance(self.time, Tensor):
            return self.profile.share(self.time, self.time - float(start))
        elapsed = self.time - start
        share = self.profile.share(cast("float", self.time), cast("float", elapsed))
        return torch.where(elapsed > 0, share, 0.0)

    def _advanced_on_host(self, dt: float) -> Clock:
        first = self.count == 0
        waits = first and self.profile.initial_mass(0.0) == 1
        step = 0.0 if waits else dt
        time, if_none_skipped = float(self.time) + step, self.time_if_none_skipped + step
        share, count, squares = 0.0, self.count, self.sum_squared_shares
        if waits or time > self.profile.start:
            share = 1.0 if first else self.profile.share(time, dt)
            squares = float(squares) * (1 - share) ** 2 + share**2
            count = int(count) + 1
        return Clock(self.profile, time, dt, share, count, squares, if_none_skipped)

    def _advanced_on_device(self, dt: float, real: Tensor | None) -> Clock:
        # As on the host, but every `if` is a `where`: nothing may wait to learn what was skipped. The
        # branch that does not count may hold a NaN (0 / 0 before the first real step); `where` drops
        # it. A skipped step has step = 0, so the time stays and the weights enter with share 0.
        before = self if self.on_device or real is None else self.to(real.device)
        time, count, sum_squared_shares = map(
            _as_tensor, (before.time, before.count, before.sum_squared_shares)
        )
        step = torch.full_like(time, dt) if real is None else real.to(time.dtype) * dt
        first = count == 0
        waits = self.profile.initial_mass(0.0) == 1
        now = time + torch.where(first, 0.0, step) if waits else time + step
        enters = (step > 0) & ((now > self.profile.start) | waits)
        known: Any = torch.where(
            first, 1.0, self.profile.share(cast("float", now), cast("float", step))
        )
        share = torch.where(enters, known, 0.0)
        sum_squared_shares = sum_squared_shares * (1 - share) ** 2 + share**2
        return replace(
            before,
            time=now,
            dt=step,
            share=share,
            count=count + enters,
            sum_squared_shares=sum_squared_shares,
            time_if_none_skipped=self.time_if_none_skipped + dt,
        )


def _as_tensor(number: Number) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64)


def _scalar(number: Number, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be written to later
        return torch.as_tensor(number, dtype=torch.float64, device=device)
