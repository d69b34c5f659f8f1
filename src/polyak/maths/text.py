"""Profiles and schedules as text, `method:name=value,name=value`, for the command line and for files.

==================================================  ===============================================
``swa``                                             ``SWA()``
``ema:half_life=3000``, ``ema:decay=0.999``         ``EMA``; ``keep_initial=true`` may follow
``power:std=0.1``, ``power:gamma=6.94``             ``PowerEMA``
``polynomial:c=1,k=0.5``                            ``PolynomialEMA``
``window:length=10000``                             ``Window``
``annealed:shape=cosine``                           ``Annealed.from_shape``: linear, cosine or sqrt
``ema:half_life=3000,start=50000``                  ``After``: any of these with a later start
==================================================  ===============================================

Parameters are always named: what ``ema:0.999`` or ``ema:500`` means would be a guess. A schedule is
a list of pieces, each with its number of steps (`parse_schedule`). First the grammar, then profiles,
then schedules.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polyak.errors import ArgumentError
from polyak.maths import schedules
from polyak.maths.profile import Profile, check_profile
from polyak.maths.profiles import (
    EMA,
    SWA,
    After,
    Annealed,
    PolynomialEMA,
    PowerEMA,
    Window,
)

Reader = Callable[[str, str], Any]
"""Reads one value; it also gets the whole text, for its error message."""


@dataclass(frozen=True)
class Method:
    """A method's parameters, and what is built from them."""

    build: Callable[[dict[str, Any]], Any]
    readers: Mapping[str, Reader]
    needs: tuple[tuple[str, ...], ...] = ()
    """Groups of parameters; exactly one of each group is required."""
    examples: tuple[str, ...] = field(default=())


def parse(text: str, methods: Mapping[str, Method], kind: str = "method") -> Any:
    """The object that the text describes; `kind` is the word for it in messages.

    Raises ArgumentError for an unknown method or parameter, a value without its name, one that is
    missing or given twice, and a value that the object itself refuses.
    """
    if not isinstance(text, str):
        raise ArgumentError(f"Expected the text of a {kind}; found {text!r}.")
    name, _, rest = text.strip().partition(":")
    if name not in methods:
        examples = ", ".join(example for method in methods.values() for example in method.examples)
        raise ArgumentError(f"Unknown {kind} {text!r}; expected one like {examples}.")
    method = methods[name]
    values = _values(text, method, rest)
    for group in method.needs:
        chosen = [one for one in group if one in values]
        if len(chosen) != 1:
            found = " and ".join(chosen) or "none of them"
            raise ArgumentError(
                f"{text!r} needs {' or '.join(group)}; found {found}. Write {_usage(method)}."
            )
    return method.build(values)


def _values(text: str, method: Method, rest: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in method.readers:
            found = f"Unknown parameter {name!r}" if equals else f"A bare {part.strip()!r}"
            raise ArgumentError(
                f"{found} in {text!r}. Name the parameter, as in {_usage(method)} "
                f"(parameters: {', '.join(method.readers)})."
            )
        if name in values:
            raise ArgumentError(f"{name} is given twice in {text!r}.")
        values[name] = method.readers[name](text, value)
    return values


def _usage(method: Method) -> str:
    return " or ".join(method.examples)


def parse_float(text: str, value: str) -> float:
    """A float."""
    try:
        return float(value)
    except ValueError:
        raise ArgumentError(f"{value!r} in {text!r} is not a number.") from None


def parse_int(text: str, value: str) -> int:
    """A whole number."""
    try:
        return int(value)
    except ValueError:
        raise ArgumentError(f"{value!r} in {text!r} is not a whole number.") from None


def parse_bool(text: str, value: str) -> bool:
    """A boolean: true or false."""
    if value.lower() not in ("true", "false"):
        raise ArgumentError(f"{value!r} in {text!r}; expected true or false.")
    return value.lower() == "true"


def parse_str(text: str, value: str) -> str:
    """The text itself."""
    return value


def number(value: float) -> str:
    """The shortest text that `parse_float` reads as exactly this."""
    return repr(float(value)).removesuffix(".0")


def parse_profile(text: str) -> Profile:
    """The profile that the text names; see the table of this module.

    Raises ArgumentError for an unknown method or parameter, a value without its name, and a value
    that the profile itself refuses.

    >>> parse_profile("window:length=10000")
    Window(length=10000.0)
    >>> parse_profile("swa:start=500")
    After(start_at=500.0, profile=SWA())
    """
    profile: Profile = parse(text, _PROFILES)
    return profile


def as_profile(profile: Profile | str) -> Profile:
    """The profile itself, or the one that the text names.

    Raises ArgumentError for anything else: `SWA` where `SWA()` was meant, a number.

    >>> as_profile("ema:decay=0.9")
    EMA(decay=0.9, keep_initial=False)
    """
    if isinstance(profile, str):
        return parse_profile(profile)
    check_profile(profile)
    return profile


def format_profile(profile: Profile) -> str:
    """The text from which `parse_profile` builds the same profile.

    Raises ArgumentError for a custom profile or annealing curve, which has no name.

    >>> format_profile(EMA.from_half_life(3000)), format_profile(EMA(0.999)), format_profile(After(10, SWA()))
    ('ema:half_life=3000', 'ema:decay=0.999', 'swa:start=10')
    """
    match profile:
        case After():
            inner = format_profile(profile.innermost)
            text = f"{inner}{',' if ':' in inner else ':'}start={number(profile.start)}"
        case SWA():
            text = "swa"
        case EMA():
            text = _format_ema(profile)
        case PowerEMA(gamma):
            text = f"power:{_shortest('gamma', gamma, 'std', profile.relative_std, _gamma_of)}"
        case PolynomialEMA(c, k):
            text = f"polynomial:c={number(c)},k={number(k)}"
        case Window(length):
            text = f"window:length={number(length)}"
        case Annealed() if profile.shape:
            text = f"annealed:shape={profile.shape}"
        case _:
            raise ArgumentError(
                f"{profile} cannot be written as text; expected one like {', '.join(EXAMPLES)}."
            )
    return text


def profile_text(profile: Profile) -> str:
    """The profile as the command line spells it; a custom one as it prints."""
    try:
        return format_profile(profile)
    except ArgumentError:
        return repr(profile)


def parse_schedule(pieces: Iterable[str]) -> schedules.Chain:
    """The chain of these pieces: constant, linear, cosine, cyclic, sawtooth or triangular.

    Raises ArgumentError as `parse_profile` does.

    >>> schedule = parse_schedule(["linear:start=0.1,end=0.05,steps=8",
    ...                           "cyclic:high=0.05,low=0.01,cycle=2,steps=4"])
    >>> schedule.averaging_points()
    (8, 10, 12)
    """
    if isinstance(pieces, str) or not isinstance(pieces, Iterable):
        raise ArgumentError(f"Expected a list of schedule pieces; found {pieces!r}.")
    return schedules.chain(*(parse(piece, _PIECES, "schedule piece") for piece in pieces))


def _profile(build: Callable[..., Profile]) -> Callable[[dict[str, Any]], Profile]:
    """A builder of this profile, wrapped in `After` if there is a start."""

    def make(values: dict[str, Any]) -> Profile:
        start = values.pop("start", None)
        profile = build(**values)
        return profile if start is None else After(start, profile)

    return make


def _ema(**values: Any) -> Profile:
    return EMA.from_half_life(**values) if "half_life" in values else EMA(**values)


def _power(std: float | None = None, **values: Any) -> Profile:
    return PowerEMA(**values) if std is None else PowerEMA.from_relative_std(std)


_START = {"start": parse_float}
_PROFILES = {
    "swa": Method(_profile(SWA), _START, examples=("swa",)),
    "ema": Method(
        _profile(_ema),
        {"half_life": parse_float, "decay": parse_float, "keep_initial": parse_bool, **_START},
        needs=(("half_life", "decay"),),
        examples=("ema:half_life=3000", "ema:decay=0.999"),
    ),
    "power": Method(
        _profile(_power),
        {"std": parse_float, "gamma": parse_float, **_START},
        needs=(("std", "gamma"),),
        examples=("power:std=0.1",),
    ),
    "polynomial": Method(
        _profile(PolynomialEMA),
        {"c": parse_float, "k": parse_float, **_START},
        needs=(("c",), ("k",)),
        examples=("polynomial:c=1,k=0.5",),
    ),
    "window": Method(
        _profile(Window),
        {"length": parse_float, **_START},
        needs=(("length",),),
        examples=("window:length=10000",),
    ),
    "annealed": Method(
        _profile(Annealed.from_shape),
        {"shape": parse_str, **_START},
        needs=(("shape",),),
        examples=("annealed:shape=cosine",),
    ),
}
EXAMPLES = tuple(example for method in _PROFILES.values() for example in method.examples)
"""One of each profile, for help texts and messages."""


def _piece(build: Callable[..., schedules.Schedule], example: str) -> Method:
    names = [part.split("=")[0] for part in example.partition(":")[2].split(",")]
    readers = {name: parse_int if name in ("cycle", "steps") else parse_float for name in names}

    def make(values: dict[str, Any]) -> tuple[int, schedules.Schedule]:
        return values.pop("steps"), build(**values)

    return Method(make, readers, needs=tuple((name,) for name in names), examples=(example,))


_CYCLE = "high=0.05,low=0.01,cycle=10,steps=40"
_PIECES = {
    "constant": _piece(schedules.Constant, "constant:rate=0.1,steps=50"),
    "linear": _piece(schedules.Linear, "linear:start=0.1,end=0.01,steps=50"),
    "cosine": _piece(schedules.Cosine, "cosine:start=0.1,end=0.01,steps=50"),
    "cyclic": _piece(schedules.CyclicLinear, f"cyclic:{_CYCLE}"),
    "sawtooth": _piece(schedules.Sawtooth, f"sawtooth:{_CYCLE}"),
    "triangular": _piece(schedules.Triangular, f"triangular:{_CYCLE}"),
}


def _format_ema(profile: EMA) -> str:
    half_life = -1 / math.log2(profile.decay)
    text = _shortest("decay", profile.decay, "half_life", half_life, _decay_of)
    return f"ema:{text}{',keep_initial=true' if profile.keep_initial else ''}"


def _decay_of(half_life: float) -> float:
    return EMA.from_half_life(half_life).decay


def _gamma_of(std: float) -> float:
    return PowerEMA.from_relative_std(std).gamma


def _shortest(
    name: str, value: float, other: str, converted: float, back: Callable[[float], float]
) -> str:
    """`name=value`, or the other parametrisation if its six digits give exactly the same value."""
    short = float(f"{converted:.6g}")
    with contextlib.suppress(ArgumentError):  # outside its domain after rounding
        if len(number(short)) < len(number(value)) and back(short) == value:
            return f"{other}={number(short)}"
    return f"{name}={number(value)}"
