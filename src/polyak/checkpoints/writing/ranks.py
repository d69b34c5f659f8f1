"""The processes that write one file together: they hear of each other's errors before they continue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from polyak import errors
from polyak.errors import OutputError, PolyakError, require

Found = TypeVar("Found")


class Ranks:
    """The ranks of a process group, the default one if `group` is None; this process alone without one.

    Every method is a collective: all ranks call it, in the same order. rank: of this process, within the
    group. leader: whether it is the group's rank 0.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        started = distributed.is_available() and distributed.is_initialized()
        self.size = distributed.get_world_size(group) if started else 1
        self.rank = distributed.get_rank(group) if started else 0
        self.leader = self.rank == 0
        require(
            self.rank >= 0, "This rank is not in the group. Call it on the ranks of the group only."
        )

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self._group)
        return found

    def gather_to_leader(self, value: Any) -> list[Any]:
        """The values of all ranks on the leader, nothing elsewhere."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.leader else None
        distributed.gather_object(value, found, group=self._group, group_dst=0)
        return found or []

    def together(self, act: Callable[[], Found]) -> Found:
        """What `act` returns, when it has succeeded on every rank; an error on any is an error on all.

        A rank that failed raises its own error, the others one of the same class that names the rank.
        """
        own: Exception | None = None
        try:
            result = act()
        except Exception as error:  # raised below, when all ranks know
            own = error
        failures = self.gather(None if own is None else (type(own).__name__, str(own)))
        if own is not None:
            raise own
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise _told(rank, *failure)
        return result


def _told(rank: int, kind: str, text: str) -> PolyakError:
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, PolyakError):
        return found(f"Rank {rank} failed: {text}")
    return OutputError(f"Rank {rank} failed with {kind}: {text}")
