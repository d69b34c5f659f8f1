"""The tensors of one model that averages track: bound once by name, checked at every update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from polyak.errors import ArgumentError, MismatchError, UsageError
from polyak.tensors.fsdp import reshard
from polyak.tensors.memory import META, in_shared_memory, odd_form
from polyak.tensors.names import Named, Slot, named_modules, named_tensors
from polyak.tensors.policy import FROZEN, Decision, Kind, Policy, decisions
from polyak.tensors.ranks import ShardRanks
from polyak.tensors.sharding import (
    is_sharded,
    layout,
    local,
    refuse_flat_modules,
    refuse_partitioned,
)

_requires_grad = attrgetter("requires_grad")
_shape = attrgetter("shape")
_address = torch.Tensor.data_ptr
_shard = attrgetter("_local_tensor")
_length = torch.Tensor.numel
_strides = torch.Tensor.stride


class BoundTensors:
    """Which tensors of a model are averaged, kept as statistics, or shared; and where they are now.

    The model may change freely until `bind`. From then on `refresh` notices every tensor that
    appeared, vanished, was reshaped, converted, moved, sharded or unfrozen, before anything is written.

    `whole` are the averaged tensors as the model holds them; `live`, `statistics` and `others` are
    values on this rank: of a DTensor its shard, of any other tensor the tensor itself.
    """

    def __init__(self, model: Module, policy: Policy) -> None:
        refuse_flat_modules(model)
        self.model = model
        self.policy = policy
        self.generation = 0  # grows whenever `live` holds other tensors or memory than before
        self._release()

    def _release(self) -> None:
        self.bound = False
        self.kinds: dict[str, Decision] = {}
        self.names: list[str] = []
        self.whole: list[Tensor] = []
        self.live: list[Tensor] = []
        self.statistic_names: list[str] = []
        self.statistics: list[Tensor] = []
        self.norms: dict[str, Module] = {}  # what holds the statistics, by name
        self.others: list[Tensor] = []  # neither averaged nor statistics
        self.ranks = ShardRanks(())  # over which the averaged tensors are sharded
        self._frozen: list[Tensor] = []
        self._noted: dict[int, int] | None = None  # of frozen tensors at a capture: their versions
        self._shared_at = -1
        self._ties: dict[str, str] = {}  # of the model as it was bound

    def inspect(self) -> tuple[Named, dict[str, Decision]]:
        """The model's tensors as they are now; bound ones keep what was decided for them."""
        refuse_flat_modules(self.model)
        named = named_tensors(self.model)
        for name, slot in named.slots.items():
            refuse_partitioned(name, slot.tensor)
        kinds = {**decisions(named, self.policy), **self.kinds}
        _refuse_odd_forms(named, kinds)
        return named, kinds

    def settle(self) -> None:
        """Bring parameters that FSDP has gathered back to their shards, which are what is averaged."""
        reshard(self.model)

    def are_sharded(self) -> bool:
        """Whether each rank has a part of the model, which need not be bound yet."""
        if self.bound:
            return bool(self.ranks)
        self.settle()
        return any(is_sharded(slot.tensor) for slot in named_tensors(self.model).slots.values())

    def bind(self) -> None:
        """Bind the model's tensors as they are now. Raises ArgumentError if none is averaged."""
        self.settle()
        named, kinds = self.inspect()
        if not any(d.kind is Kind.AVERAGED for d in kinds.values()):
            raise ArgumentError(
                f"Nothing to average in {type(self.model).__name__}: none of its "
                f"{len(kinds)} tensors is a floating-point parameter that trains. "
                "Pass include= to average frozen ones."
            )
        _refuse_without_values(named, kinds)
        self.kinds = kinds
        self._take(named)
        self.bound = True

    @contextmanager
    def bound_temporarily(self) -> Iterator[None]:
        """Bind for the block; stay bound only if it succeeds."""
        was_bound = self.bound
        if not was_bound:
            self.bind()
        try:
            yield
        except BaseException:
            if not was_bound:
                self._release()
            raise

    def refresh(self) -> None:
        """Check that the model is the one that was bound. Raises MismatchError, naming all changes."""
        if self._is_unchanged():
            return
        self.settle()
        if self._is_unchanged():
            return
        named, kinds = self.inspect()
        self._refuse_changes(named, kinds)
        self.kinds = kinds
        self._take(named)

    def trained_parameters(self) -> dict[str, Tensor]:
        """The parameters that are averaged and take gradients, as the model is now."""
        refuse_flat_modules(self.model)
        self.settle()
        slots = [slot for slot in named_tensors(self.model).slots.values() if slot.is_parameter]
        return {
            slot.name: slot.tensor
            for slot in slots
            if slot.tensor.requires_grad
            and (self.kinds.get(slot.name) or self.policy.decide(slot)).kind is Kind.AVERAGED
        }

    def note_frozen(self) -> None:
        """Weights are about to be taken: note in what state frozen parameters are, as constants."""
        if self._noted is None:
            self._noted = {id(tensor): _version(local(tensor)) for tensor in self._frozen}

    def unfrozen(self) -> list[str]:
        """Names of parameters that were frozen when they were bound and require gradients now."""
        if not any(map(_requires_grad, self._frozen)):
            return []
        self.settle()
        slots = named_tensors(self.model).slots
        return [n for n, s in slots.items() if self._is_unfrozen(n, s)]

    def frozen(self) -> dict[str, Tensor]:
        """The parameters that are shared because they were frozen when they were bound."""
        slots = named_tensors(self.model).slots
        return {n: s.tensor for n, s in slots.items() if self.kinds[n].reason == FROZEN}

    def add(self, names: Iterable[str], *, constant: bool = True) -> list[Tensor]:
        """Average these from now on; return their tensors, which have been constant so far.

        Raises MismatchError if one has been written to since weights were first taken, unless it does
        not matter that it was `constant`, because its average is known.
        """
        self.settle()
        named, _ = self.inspect()
        taken = [name for name in names if name in named.slots]
        if constant:
            self._refuse_written({name: named.slots[name].tensor for name in taken})
        for name in taken:
            self.kinds[name] = Decision(
                Kind.AVERAGED, "a parameter that trains since it was unfrozen"
            )
        self._take(named, order=[*self.names, *taken])
        return [local(named.slots[name].tensor) for name in taken]

    def everything(self) -> list[Tensor]:
        """The values of all tensors of the model, each once."""
        return [*self.live, *self.statistics, *self.others]

    def shares_memory(self) -> set[int]:
        """Ids of values whose contents are exchanged, not pointers: shards, and what shares its storage."""
        if self._shared_at != self.generation:
            self._shared, self._shared_at = self._find_shared(), self.generation
        return self._shared

    def _find_shared(self) -> set[int]:
        slots = named_tensors(self.model).slots.values()
        sharded = {id(local(s.tensor)) for s in slots if is_sharded(s.tensor)}
        tensors = [local(s.tensor) for s in slots if not odd_form(s.tensor)]
        users = Counter(map(_storage, tensors))
        return sharded | {
            id(t)
            for t in tensors
            if users[_storage(t)] > 1
            or in_shared_memory(t)
            or t.untyped_storage().nbytes() > t.numel() * t.element_size()
        }

    def _take(self, named: Named, order: list[str] | None = None) -> None:
        of_kind = {kind: [n for n in named.slots if self.kinds[n].kind is kind] for kind in Kind}
        self.names = order or self.names or of_kind[Kind.AVERAGED]
        self.whole = [named.slots[name].tensor for name in self.names]
        self.live = list(map(local, self.whole))
        self.ranks = ShardRanks(self.whole)
        self.statistic_names = of_kind[Kind.STATISTIC]
        self.statistics = [local(named.slots[name].tensor) for name in self.statistic_names]
        self.norms = {n.rpartition(".")[0]: named.slots[n].module for n in self.statistic_names}
        bound = {*self.names, *self.statistic_names}
        self.others = [
            local(slot.tensor) for name, slot in named.slots.items() if name not in bound
        ]
        self._frozen = [
            slot.tensor
            for name, slot in named.slots.items()
            if self.kinds[name].reason == FROZEN  # an update must not find them training
        ]
        self._noted = None
        self._ties = dict(named.ties)
        self._signatures = {n: _signature(named.slots[n].tensor) for n in self._tracked_names()}
        self._structure = Structure.of(self.model)
        # For 1-D tensors numel() determines the shape and is cheaper to query: the check runs before
        # every update, and a model has more vectors than matrices.
        self._vectors = [tensor for tensor in self.live if tensor.dim() == 1]
        self._matrices = [tensor for tensor in self.live if tensor.dim() != 1]
        self._lengths = list(map(_length, self._vectors))
        self._shapes = list(map(_shape, self._matrices))
        self._strides = list(map(_strides, self.live))
        self._addresses = list(map(_address, self.live))
        self._sharded = [tensor for tensor in self.whole if is_sharded(tensor)]
        self._shards = list(map(local, self._sharded))
        self.generation += 1

    def _is_unchanged(self) -> bool:
        return (
            self._structure.holds()
            and all(map(is_, map(_shard, self._sharded), self._shards))
            and list(map(_address, self.live)) == self._addresses
            and list(map(_length, self._vectors)) == self._lengths
            and list(map(_shape, self._matrices)) == self._shapes
            and list(map(_strides, self.live)) == self._strides
            and not any(map(_requires_grad, self._frozen))
        )

    def _tracked_names(self) -> list[str]:
        return [*self.names, *self.statistic_names]

    def _is_unfrozen(self, name: str, slot: Slot) -> bool:
        known = self.kinds.get(name)
        return known is not None and known.reason == FROZEN and slot.tensor.requires_grad

    def _refuse_changes(self, named: Named, kinds: dict[str, Decision]) -> None:
        tracked = set(self._tracked_names())
        now = {n for n in named.slots if kinds[n].kind is not Kind.NEWEST}
        changed = {n: how for n in sorted(tracked & now) if (how := self._change(named.slots[n]))}
        changed |= {n: _UNFROZEN for n, s in named.slots.items() if self._is_unfrozen(n, s)}
        if missing := tracked - now:
            changed |= {n: f"is tied to {named.ties[n]} now" for n in missing & named.ties.keys()}
        changed |= {n: f"was tied to {self._ties[n]}" for n in (now - tracked) & self._ties.keys()}
        missing = tracked - now - named.ties.keys()
        unexpected = now - tracked - self._ties.keys()
        if missing or unexpected or changed:
            raise MismatchError.of(
                f"{type(self.model).__name__} has changed since averaging began.",
                missing=missing,
                unexpected=unexpected,
                changed=changed,
                advice=_CHANGED,
            )

    def _refuse_written(self, tensors: dict[str, Tensor]) -> None:
        noted = self._noted
        if noted is None:
            return
        written = [n for n, t in tensors.items() if noted.get(id(t)) != _version(local(t))]
        if written:
            raise MismatchError.of(
                f"Frozen parameters of this {type(self.model).__name__} train now.",
                changed=dict.fromkeys(written, _WRITTEN),
                advice="Nothing was averaged; freeze them again to read the average.",
            )

    def _change(self, slot: Slot) -> str:
        was, now = self._signatures[slot.name], _signature(slot.tensor)
        return "" if was == now else f"{now}, was {was}"


_CHANGED = (
    "Nothing was changed. Make a new Average for the changed model (of a sharded one, after it is "
    "sharded), or undo the change."
)


_UNFROZEN = (
    "was frozen when averaging began and trains now, and its value from before its first step is "
    "gone. Attach the average to the optimizer (its hook adds it in time), or name it in "
    "include= from the start"
)


_WRITTEN = (
    "was frozen when weights were first taken and has been changed since, before the attached "
    "optimizer stepped it: its earlier values are gone. Attach every optimizer, attach([first, "
    "second]), or name it in include= from the start"
)


@dataclass(frozen=True)
class Structure:
    """What every module of the model holds, by identity: whether it still does is fast to tell."""

    holders: list[dict[str, Any]]
    counts: list[int]
    filled: Sequence[Callable[[], Iterable[Any]]]
    contents: list[Any]

    @classmethod
    def of(cls, model: Module) -> Structure:
        """That of the model as it is now."""
        modules = {id(module): module for _, module in named_modules(model)}.values()
        holders = [h for m in modules for h in (m._modules, m._parameters, m._buffers)]
        filled = [holder.values for holder in holders if holder]
        contents = list(chain.from_iterable(values() for values in filled))
        return cls(holders, list(map(len, holders)), filled, contents)

    def holds(self) -> bool:
        """Whether every module still holds the same tensors and modules."""
        if list(map(len, self.holders)) != self.counts:
            return False
        return all(map(is_, chain.from_iterable([v() for v in self.filled]), self.contents))


def _signature(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    text = f"{shape} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
    return f"{text}, {how}" if (how := layout(tensor)) else text


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int:
    # Tensors without values share nothing.
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _refuse_odd_forms(named: Named, kinds: dict[str, Decision]) -> None:
    forms = {n: form for n, form in _odd_forms(named, kinds).items() if form != META}
    if forms:
        listed = ", ".join(f"{name} ({form})" for name, form in forms.items())
        raise ArgumentError(
            f"Average works on dense tensors in plain memory; not on {listed}. Pass "
            f"exclude={list(forms)} to leave these as they are in the model, or make them dense first "
            "(to_dense(), dequantize(), contiguous())."
        )


def _refuse_without_values(named: Named, kinds: dict[str, Decision]) -> None:
    if names := [n for n, form in _odd_forms(named, kinds).items() if form == META]:
        raise UsageError(
            f"{', '.join(names)}: on the meta device there are no values to average. Give the model its "
            "weights first (to_empty() and an initialisation, or load_state_dict(..., assign=True)); "
            "the average binds them at its first update."
        )


def _odd_forms(named: Named, kinds: dict[str, Decision]) -> dict[str, str]:
    """Tensors that the average would hold, but that do not hold dense values of their own."""
    held = {n: local(s.tensor) for n, s in named.slots.items() if kinds[n].kind is not Kind.NEWEST}
    return {n: form for n, t in held.items() if (form := odd_form(t) or _expanded(t))}


def _expanded(tensor: Tensor) -> str:
    repeats = any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return "expanded: several of its values are one" if repeats else ""
