"""Averages of sharded models in distributed checkpoints.

An `Average` of a model that `fully_shard` or tensor parallelism has sharded is made and used as any other.
`torch.distributed.checkpoint` saves its state; `load` brings it back, on any number of ranks.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch

from polyak.averaging import state
from polyak.averaging.average import Average
from polyak.averaging.averages import Averages
from polyak.averaging.recorder import Recorder
from polyak.averaging.tracker import Member
from polyak.errors import ArgumentError, FormatError, MismatchError, require
from polyak.tensors.names import named_tensors

__all__ = ["load"]


def load(
    average: Average | Averages | Recorder,
    checkpoint_id: str | os.PathLike[str],
    *,
    key: str = "average",
    missing: Literal["raise", "model"] = "raise",
    process_group: Any = None,
) -> bool:
    """Continue from a distributed checkpoint that holds `average.state_dict()` under `key`.

    The checkpoint may come from another number of ranks, another mesh, or an unsharded model. Every rank
    must call this. The average stays as it was if it fails.

    Args:
        average: The average, or several; their profiles must be those that were saved. Or a recorder.
        checkpoint_id: What `torch.distributed.checkpoint.save` was given.
        key: Under which name the state was saved; the names of nested ones are joined by dots.
        missing: What to do if the checkpoint has nothing under `key`: "raise", or with "model" begin a
            new average with the weights of the model at the next update; a recorder stays as it is.
        process_group: For `torch.distributed.checkpoint`; by default all ranks.

    Returns whether there was anything to load.

    Raises:
        ArgumentError: no checkpoint there.
        MismatchError: nothing under `key`; the average of another model or profile.
        FormatError: a checkpoint that cannot be read.

    >>> import tempfile, torch, polyak, torch.distributed.checkpoint as dcp
    >>> store = torch.distributed.HashStore()  # torchrun and its environment do this
    >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> model, folder = torch.nn.Linear(2, 1), tempfile.mkdtemp()
    >>> average = polyak.Average(model, polyak.SWA())
    >>> average.update()
    >>> _ = dcp.save({"average": average.state_dict()}, checkpoint_id=folder)
    >>> resumed = polyak.Average(model, polyak.SWA())
    >>> polyak.sharded.load(resumed, folder), resumed.count
    (True, 1)
    >>> torch.distributed.destroy_process_group()

    """
    require(
        isinstance(average, (Average, Averages, Recorder)),
        f"load() needs an Average, Averages or a Recorder; found {type(average).__name__}.",
    )
    require(missing in ("raise", "model"), f"missing is {missing!r}; expected 'raise' or 'model'.")
    average._tracker.refuse_during_loan("load()")
    checkpoint = _Checkpoint(checkpoint_id, process_group)
    if not checkpoint.below(key):
        if missing == "raise":
            raise MismatchError(
                f"{checkpoint_id} has no average under key={key!r}. It holds: {checkpoint.holds()}. To "
                "begin a new average there, pass missing='model'."
            )
        _begin_anew(average)
        return False
    if isinstance(average, Recorder):
        average.load_state_dict(checkpoint.read_record(key, average))
    elif isinstance(average, Averages):
        checkpoint.refuse_other_names(key, list(average))
        states = {
            name: checkpoint.read(f"{key}.{name}", one._member) for name, one in average.items()
        }
        average.load_state_dict(states)
    else:
        average.load_state_dict(checkpoint.read(key, average._member))
    return True


def _begin_anew(average: Average | Averages | Recorder) -> None:
    if isinstance(average, Recorder):
        return  # it has begun nothing yet, or goes on
    members = list(average.values()) if isinstance(average, Averages) else [average]
    for one in members:
        state.load_state(one._member, state.fresh_state(one._member))


class _Checkpoint:
    """What a distributed checkpoint holds, by names in which nested keys are joined by dots."""

    def __init__(self, checkpoint_id: str | os.PathLike[str], process_group: Any) -> None:
        from torch.distributed.checkpoint._storage_utils import _storage_setup

        self._id, self._process_group = checkpoint_id, process_group
        try:
            reader: Any = _storage_setup(None, checkpoint_id, reader=True)
            self._entries: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
        except (OSError, RuntimeError, TypeError) as error:
            raise ArgumentError(
                f"{checkpoint_id}: there is no distributed checkpoint ({error}). Expected the folder "
                "that torch.distributed.checkpoint.save wrote."
            ) from None
        except Exception as error:
            raise FormatError(f"{checkpoint_id} cannot be read: {error!r}.") from error

    def below(self, key: str) -> dict[str, Any]:
        """The entries under a key, by the rest of their names."""
        return {
            name.removeprefix(f"{key}."): entry
            for name, entry in self._entries.items()
            if name.startswith(f"{key}.")
        }

    def holds(self) -> str:
        """The keys at its top."""
        return ", ".join(sorted({name.partition(".")[0] for name in self._entries})) or "nothing"

    def refuse_other_names(self, key: str, names: list[str]) -> None:
        """Raise MismatchError unless the state of each average is there."""
        if missing := [name for name in names if not self.below(f"{key}.{name}")]:
            raise MismatchError.of(
                f"{self._id} does not hold these averages under {key!r}.",
                missing=missing,
                advice="Nothing was loaded.",
            )

    def read(self, key: str, member: Member) -> dict[str, Any]:
        """The state under a key, into tensors that are sharded as the member's model is."""
        stored = self.below(key)
        plain = {n: None for n in _PLAIN if n in stored}
        self._load({key: plain})
        state.refuse_other_profile(member, plain)
        snapshots = {int(m[1]) for n in stored if (m := re.match(r"snapshots\.(\d+)\.", n))}
        room = state.fresh_state(member, int("block.0.updates" in stored), len(snapshots))
        self._check(stored, room)
        tops = {name.partition(".")[0] for name in stored}
        room = {n: v for n, v in room.items() if n in tops or isinstance(v, dict)}
        if "parts" in stored:
            room["parts"] = 0
        self._load({key: room})
        return room

    def read_record(self, key: str, recorder: Recorder) -> dict[str, Any]:
        """The state of a recorder under a key."""
        stored = self.below(key)
        room: dict[str, Any] = dict.fromkeys(
            {name.partition(".")[0] for name in stored} - {"average"}
        )
        if carried := {n.removeprefix("carry.") for n in stored if n.startswith("carry.")}:
            slots = named_tensors(recorder.model).slots
            if unknown := carried - slots.keys():
                raise MismatchError.of(
                    f"{self._id} holds the record of another model.",
                    unexpected=unknown,
                    advice="Nothing was loaded.",
                )
            room["carry"] = {n: state.zeros(slots[n].tensor, torch.bfloat16) for n in carried}
        self._load({key: room})
        if any(name.startswith("average.") for name in stored):
            room["average"] = self.read(f"{key}.average", recorder._member)
        return room

    def _check(self, stored: Mapping[str, Any], room: Mapping[str, Any]) -> None:
        """Raise MismatchError unless the tensors there are those of this model."""
        pattern = r"(?:(?:(?:block|snapshots)\.\d+\.)?tensors|statistics)\.(.+)"
        have: dict[str, tuple[int, ...]] = {}
        for name, entry in stored.items():
            if (match := re.fullmatch(pattern, name)) and hasattr(entry, "size"):
                have[match[1]] = tuple(entry.size)
        parts = [*(room.get("block") or ()), *(room.get("snapshots") or ()), room]
        groups = [room["statistics"], *(part["tensors"] for part in parts)]
        expected = {n: tuple(t.shape) for group in groups for n, t in group.items()}
        changed = {
            n: f"{have[n]}, but this model's is {expected[n]}"
            for n in have.keys() & expected.keys()
            if have[n] != expected[n]
        }
        in_tuples = not have and "snapshots" in stored  # of an unsharded window: one entry
        if not in_tuples and (changed or have.keys() != expected.keys()):
            raise MismatchError.of(
                f"{self._id} holds the average of another model.",
                missing=expected.keys() - have.keys(),
                unexpected=have.keys() - expected.keys(),
                changed=changed,
                advice="Nothing was loaded.",
            )

    def _load(self, into: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load as load_into

        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load_into(
                    into,
                    checkpoint_id=self._id,
                    process_group=self._process_group,
                    no_dist=alone,
                )
        except CheckpointException as error:  # which is not an Exception
            reasons = {repr(failure[0]) for failure in error.failures.values()}
            raise FormatError(
                f"{self._id} cannot be read: {'; '.join(sorted(reasons))}. Nothing was loaded."
            ) from None


# The entries of a state that are not tensors, and tell what room the others need.
_PLAIN = ("version", "profile", "unit")
