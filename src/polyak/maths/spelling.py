"""Profiles as text: how the command line and files name an average.

==================================================  ===============================================
``swa``                                             ``SWA()``
``ema:half_life=3000``, ``ema:decay=0.999``         ``EMA``; ``keep_initial=true`` may follow
``power:std=0.1``, ``power:gamma=6.94``             ``PowerEMA``
``window:length=10000``                             ``Window``
``annealed:shape=cosine``                           ``Annealed.shaped``: linear, cosine or sqrt
``ema:half_life=3000,start=50000``                  ``After``: any of them with a later start
==================================================  ===============================================

Parameters are always named: nobody can tell what ``ema:0.999`` or ``ema:500`` is meant to be.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

from polyak.errors import ArgumentError
from polyak.maths.profiles import EMA, SWA, After, Annealed, PowerEMA, Profile, Window

EXAMPLES = (
    "swa",
    "ema:half_life=3000",
    "ema:decay=0.999",
    "power:std=0.1",
    "window:length=10000",
    "annealed:shape=cosine",
)
"""One of each, for help texts and messages."""


def profile_from(text: str) -> Profile:
    """The profile that the text names; see the table of this module.

    Raises ArgumentError for an unknown method or parameter, a value without its name, and whatever
    the profile itself refuses.

    >>> profile_from("window:length=10000")
    Window(length=10000.0)
    >>> profile_from("swa:start=500")
    After(start_at=500.0, profile=SWA())
    """
    method, _, rest = text.strip().partition(":")
    if method not in _METHODS:
        raise ArgumentError(f"Unknown method {text!r}; expected one like {', '.join(EXAMPLES)}.")
    values = _values(text, method, rest)
    start = values.pop("start", None)
    profile = _build(text, method, values)
    return profile if start is None else After(start, profile)


def spell(profile: Profile) -> str:
    """The text that names the profile; `profile_from` gives it back.

    Raises ArgumentError for an annealing curve of one's own, which has no name.

    >>> spell(EMA.from_half_life(3000)), spell(EMA(0.999)), spell(After(10, SWA()))
    ('ema:half_life=3000', 'ema:decay=0.999', 'swa:start=10')
    """
    match profile:
        case After():
            inner = spell(_innermost(profile))
            text = f"{inner}{',' if ':' in inner else ':'}start={_number(profile.start)}"
        case SWA():
            text = "swa"
        case EMA():
            text = _spell_ema(profile)
        case PowerEMA(gamma):
            text = f"power:{_shortest('gamma', gamma, 'std', profile.relative_std, _gamma_of)}"
        case Window(length):
            text = f"window:length={_number(length)}"
        case Annealed() if profile.shape:
            text = f"annealed:shape={profile.shape}"
        case _:
            raise ArgumentError(f"{profile} has no spelling: {_spellable()}.")
    return text


def _values(text: str, method: str, rest: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        known = [*_METHODS[method], "start"]
        if not equals or name not in known:
            found = f"parameter {name!r}" if equals else f"a bare {part.strip()!r}"
            raise ArgumentError(
                f"{found} in {text!r}; name what you mean: {_usage(method)} "
                f"(parameters of {method}: {', '.join(known)})."
            )
        if name in values:
            raise ArgumentError(f"{name} is given twice in {text!r}.")
        values[name] = _METHODS[method].get(name, _float)(text, value)
    return values


def _build(text: str, method: str, values: dict[str, Any]) -> Profile:
    choices = _CHOICES[method]
    chosen = [name for name in choices if name in values]
    if choices and len(chosen) != 1:
        found = "both" if chosen else "neither" if len(choices) > 1 else "none"
        raise ArgumentError(
            f"{text!r} gives {found}; expected exactly one of {', '.join(choices)}: {_usage(method)}."
        )
    given = values.pop(chosen[0]) if chosen else None
    return _BUILDERS[chosen[0] if chosen else method](given, **values)


def _usage(method: str) -> str:
    return " or ".join(example for example in EXAMPLES if example.startswith(method))


def _float(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ArgumentError(f"{value!r} in {text!r} is not a number.") from None


def _bool(text: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ArgumentError(f"{value!r} in {text!r}; expected true or false.")
    return value.lower() == "true"


def _word(text: str, value: str) -> str:
    return value


_METHODS: dict[str, dict[str, Callable[[str, str], Any]]] = {
    "swa": {},
    "ema": {"half_life": _float, "decay": _float, "keep_initial": _bool},
    "power": {"std": _float, "gamma": _float},
    "window": {"length": _float},
    "annealed": {"shape": _word},
}
# Of these exactly one is given.
_CHOICES = {
    "swa": (),
    "ema": ("half_life", "decay"),
    "power": ("std", "gamma"),
    "window": ("length",),
    "annealed": ("shape",),
}
_BUILDERS: dict[str, Callable[..., Profile]] = {
    "swa": lambda _: SWA(),
    "half_life": EMA.from_half_life,
    "decay": EMA,
    "std": PowerEMA.from_relative_std,
    "gamma": PowerEMA,
    "length": Window,
    "shape": Annealed.shaped,
}


def _innermost(profile: Profile) -> Profile:
    return _innermost(profile.profile) if isinstance(profile, After) else profile


def _spell_ema(profile: EMA) -> str:
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
    """`name=value`, or the other parametrisation where its six digits say exactly the same."""
    short = float(f"{converted:.6g}")
    with contextlib.suppress(ArgumentError):  # rounded out of its domain
        if len(_number(short)) < len(_number(value)) and back(short) == value:
            return f"{other}={_number(short)}"
    return f"{name}={_number(value)}"


def _spellable() -> str:
    return f"expected one of polyak's own profiles, like {', '.join(EXAMPLES)}"


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")
