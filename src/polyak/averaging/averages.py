"""`Averages`: several averages of the same weights, for the price of about one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch.nn import Module

from polyak.averaging.attaching import Attachment
from polyak.averaging.average import Average, update
from polyak.averaging.following import Following
from polyak.averaging.held import Options
from polyak.averaging.lr_schedule import LRSchedule
from polyak.averaging.state import check_state, load_into, state_of
from polyak.errors import ArgumentError, MismatchError
from polyak.maths.profiles import Profile
from polyak.tensors.policies import Policy, patterns


class Averages(Mapping[str, Average]):
    """Several averages that are updated in one pass over the weights, each an `Average` by name.

    Each piece of the weights is read once and enters every average while it is in the cache, so K
    of them cost about (2K + 1) / 3 of one. The options are those of `Average`, for all of them.

    Raises ArgumentError where there is no profile, or one that cannot be followed.

    >>> import torch, polyak
    >>> model = torch.nn.Linear(2, 1)
    >>> averages = polyak.Averages(model, {"swa": polyak.SWA(), "ema": polyak.EMA(decay=0.9)})
    >>> averages.update()
    >>> with averages["ema"].applied():
    ...     _ = model(torch.zeros(1, 2))
    """

    def __init__(  # noqa: PLR0913 - as Average
        self,
        model: Module,
        profiles: Mapping[str, Profile],
        *,
        unit: str | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        nonfinite: Literal["skip", "raise"] | None = None,
        average_buffers: str | Iterable[str] | None = None,
    ) -> None:
        if not profiles:
            raise ArgumentError("Averages needs at least one profile, as {'swa': polyak.SWA()}.")
        policy = Policy(patterns(include), patterns(exclude) or (), patterns(average_buffers) or ())
        options = Options(dtype, None if device is None else torch.device(device), nonfinite)
        self._following = Following(model, policy, options, unit=unit)
        self._averages = {n: Average._of(self._following, p) for n, p in profiles.items()}

    def __getitem__(self, name: str) -> Average:
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    def update(self, dt: float = 1) -> None:
        """Let the present weights enter every average; see `Average.update`."""
        update(self._following, dt)

    def attach(
        self, optimizer: Any, *, every: int | None = None, at: LRSchedule | None = None
    ) -> Attachment:
        """Update all by themselves; see `Average.attach`."""
        return Attachment(self._following, optimizer, every=every, at=at)

    def state_dict(self) -> dict[str, Any]:
        """The state of each average, by name."""
        return {name: state_of(self._following, a._held) for name, a in self._averages.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on from a state; all are checked before the first is changed."""
        self._following.refuse_during_loan("load_state_dict()")
        if states.keys() != self._averages.keys():
            raise MismatchError.of(
                "This is the state of other averages.",
                missing=self._averages.keys() - states.keys(),
                unexpected=states.keys() - self._averages.keys(),
                advice="Nothing was loaded.",
            )
        for name, average in self._averages.items():
            check_state(self._following, average._held, states[name])
        for name, average in self._averages.items():
            load_into(self._following, average._held, states[name])

    def __repr__(self) -> str:
        return f"Averages({', '.join(f'{n}: {a!r}' for n, a in self._averages.items())})"
