"""`Averages`: several averages of the same weights, for about the price of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.lr_scheduler import LRScheduler

from polyak.averaging import state
from polyak.averaging.average import Average
from polyak.averaging.hook import Attachment, Members
from polyak.averaging.tracker import Tracker
from polyak.errors import ArgumentError
from polyak.maths.profile import Profile


class Averages(Mapping[str, Average]):
    """Several averages that are updated in one pass over the weights, each an `Average` by name.

    Each piece of the weights is read once and enters every average while it is in the cache, so K
    of them cost about (2K + 1) / 3 of one. The options are those of `Average`, for all of them.

    Raises ArgumentError if there is no profile, or one that cannot be averaged during training.

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
        profiles: Mapping[str, Profile | str],
        *,
        unit: str | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        nonfinite: Literal["skip", "raise"] | None = None,
        average_buffers: str | Iterable[str] | None = None,
        capturable: bool = False,
    ) -> None:
        if not hasattr(profiles, "items") or not profiles:
            raise ArgumentError(
                "Averages needs profiles by name, such as {'swa': polyak.SWA()}; found "
                f"{profiles!r}."
            )
        self._tracker = Tracker(
            model,
            unit=unit,
            include=include,
            exclude=exclude,
            dtype=dtype,
            device=device,
            nonfinite=nonfinite,
            average_buffers=average_buffers,
            capturable=capturable,
        )
        self._averages = {
            name: Average._of(self._tracker.join(profile), name)
            for name, profile in profiles.items()
        }

    def __getitem__(self, name: str) -> Average:
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    @property
    def empty(self) -> bool:
        """Whether nothing has been averaged yet in any of them."""
        return all(average.empty for average in self.values())

    @property
    def lent(self) -> bool:
        """Whether the model holds one of its averages now: `applied()`."""
        return self._tracker.owner_of_loan() is not None

    def update(self, dt: float = 1, *, real: bool | Tensor = True) -> None:
        """Update every average with the model's current weights; see `Average.update`."""
        self._tracker.take_due()
        self._tracker.update(dt, real)

    def attach(
        self,
        optimizer: Any,
        *,
        every: int | None = None,
        at: LRScheduler | None = None,
        before_next_step: bool = False,
        by_hand: bool = False,
    ) -> Attachment:
        """Update automatically all members without a timing of their own; see `Average.attach`.

        A member gets its own by `averages["swa"].attach(optimizer, at=lr)`, before or after this.
        """
        return Attachment(
            Members(self._tracker),
            optimizer,
            every=every,
            at=at,
            before_next_step=before_next_step,
            by_hand=by_hand,
        )

    def detach(self) -> None:
        """Remove every attachment, those of single members included."""
        for average in self.values():
            average.detach()
        if self._tracker.attachment is not None:
            self._tracker.attachment.remove()

    def state_dict(self) -> dict[str, Any]:
        """The state of each average, by name."""
        return {name: average.state_dict() for name, average in self.items()}

    def load_state_dict(self, state_dicts: Mapping[str, Any]) -> None:
        """Continue from a state; all are checked before the first is changed."""
        self._tracker.refuse_during_loan("load_state_dict()")
        state.check_names(state_dicts, self.keys())
        for name, average in self.items():
            state.check_state(average._member, state_dicts[name])
        for name, average in self.items():
            state.load_state(average._member, state_dicts[name])

    def reset(self) -> None:
        """Forget everything that was averaged, in all of them; see `Average.reset`."""
        for average in self.values():
            average.reset()

    def __repr__(self) -> str:
        return f"Averages({', '.join(f'{n}: {a!r}' for n, a in self.items())})"
