"""What happens to each tensor of a model: averaged, kept with the average, or taken from the newest."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from polyak.errors import ArgumentError, UsageError
from polyak.tensors.memory import shape_of
from polyak.tensors.names import Named, Slot
from polyak.tensors.spectral import is_spectral_vector

RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Kind(Enum):
    """What may happen to a tensor."""

    AVERAGED = "averaged"
    STATISTIC = "statistic"  # a copy of the newest at each update; `update_bn` replaces it
    NEWEST = "newest"  # the live tensor itself: shared, nothing is stored


@dataclass(frozen=True)
class Decision:
    """What happens to a tensor, and why."""

    kind: Kind
    reason: str


@dataclass(frozen=True)
class Policy:
    """Name patterns (as in the shell, `*` crosses dots): what is averaged and what is not.

    `include` limits averaging to what matches, frozen or not; `exclude` takes out what matches;
    `buffers` are the floating buffers that are averaged like weights; the vectors of spectral norm only
    where they are named in full, since a mean of unit vectors is none.
    """

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()

    def decide(self, slot: Slot) -> Decision:
        """What happens to one tensor."""
        floating = slot.tensor.is_floating_point() or slot.tensor.is_complex()
        if _matches(slot.name, self.exclude):
            return Decision(Kind.NEWEST, "excluded by name")
        if slot.is_parameter:
            return self._of_parameter(slot) if floating else _NOT_FLOATING
        named = _matches(slot.name, self.buffers)
        if floating and named and (slot.name in self.buffers or not _is_spectral(slot)):
            return Decision(Kind.AVERAGED, "a buffer averaged by name")
        return _of_buffer(slot, floating=floating)

    def _of_parameter(self, slot: Slot) -> Decision:
        if self.include is not None:
            if _matches(slot.name, self.include):
                return Decision(Kind.AVERAGED, "included by name")
            return Decision(Kind.NEWEST, "not included by name")
        if not slot.tensor.requires_grad:
            return Decision(Kind.NEWEST, FROZEN)
        return Decision(Kind.AVERAGED, "a parameter that trains")

    def check(self, named: Named) -> None:
        """Raise ArgumentError for a pattern that matches no tensor: it is most likely misspelled."""
        parameters = [s.name for s in named.slots.values() if s.is_parameter]
        buffers = [
            s.name
            for s in named.slots.values()
            if not s.is_parameter and (s.tensor.is_floating_point() or s.tensor.is_complex())
        ]
        _refuse_unused("include", self.include or (), parameters)
        _refuse_unused("exclude", self.exclude, named.slots)
        _refuse_unused("average_buffers", self.buffers, buffers)


FROZEN = "frozen: shared with the model, costs nothing"
_NOT_FLOATING = Decision(Kind.NEWEST, "not a floating-point tensor: taken from the newest")


def decisions(named: Named, policy: Policy) -> dict[str, Decision]:
    """What happens to every tensor, by name.

    Raises UsageError where a lazy module has not made its tensors yet.
    """
    if lazy := [n for n, s in named.slots.items() if _is_lazy(s)]:
        raise UsageError(
            f"{', '.join(lazy)}: a lazy module has not made its tensors yet. Run one batch through "
            "the model first; the average binds them at its first update."
        )
    policy.check(named)
    return {name: policy.decide(slot) for name, slot in named.slots.items()}


def patterns(given: object, argument: str) -> tuple[str, ...] | None:
    """One pattern or several, as a tuple; None stays None. ArgumentError for anything else."""
    if given is None:
        return None
    several: tuple[object, ...] = (given,)
    if isinstance(given, Iterable) and not isinstance(given, str):
        with suppress(TypeError):  # torch's, of tensors without dimensions
            several = tuple(given)
    names = tuple(pattern for pattern in several if isinstance(pattern, str))
    if len(names) < len(several):
        raise ArgumentError(
            f"{argument} is {given!r}; expected a name pattern such as '*lora_*', or a list of them."
        )
    return names


def _of_buffer(slot: Slot, *, floating: bool) -> Decision:
    if slot.key in RUNNING_STATISTICS and {"running_mean", "running_var"} <= set(
        slot.module._buffers.keys()
    ):
        return Decision(
            Kind.STATISTIC,
            "a normalisation statistic: from the newest, until update_bn replaces it",
        )
    if not floating:
        return _NOT_FLOATING
    if _is_spectral(slot):
        return Decision(Kind.NEWEST, "a vector of spectral norm: taken from the newest")
    return Decision(Kind.NEWEST, "a buffer: taken from the newest (average_buffers= averages it)")


def _is_spectral(slot: Slot) -> bool:
    prefix = slot.name.removesuffix(slot.key)
    names = {prefix + key for key in slot.module._parameters}
    shape = () if _is_lazy(slot) else shape_of(slot.tensor)
    return is_spectral_vector(slot.name, names, shape)


def _is_lazy(slot: Slot) -> bool:
    return isinstance(slot.tensor, (UninitializedParameter, UninitializedBuffer))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unused(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise ArgumentError(
                f"{argument}={pattern!r} matches no tensor of this model. It has: {shown or 'none'}."
            )
