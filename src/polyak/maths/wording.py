"""Reads ``method:name=value,name=value``, the way profiles and schedules are written as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polyak.errors import ArgumentError

Reader = Callable[[str, str], Any]
"""From the whole text, for the message, and one value of it, to that value."""


@dataclass(frozen=True)
class Method:
    """What may follow a method's name, and what is made of it."""

    build: Callable[[dict[str, Any]], Any]
    readers: Mapping[str, Reader]
    needs: tuple[tuple[str, ...], ...] = ()
    """Of each of these exactly one must be given."""
    examples: tuple[str, ...] = field(default=())


def read(text: str, methods: Mapping[str, Method]) -> Any:
    """What the text stands for.

    Raises ArgumentError for an unknown method or parameter, a value without its name, one that is
    missing or given twice, and whatever the thing itself refuses.
    """
    name, _, rest = text.strip().partition(":")
    if name not in methods:
        examples = ", ".join(example for method in methods.values() for example in method.examples)
        raise ArgumentError(f"Unknown method {text!r}; expected one like {examples}.")
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
            found = f"parameter {name!r}" if equals else f"a bare {part.strip()!r}"
            raise ArgumentError(
                f"{found} in {text!r}; name what you mean: {_usage(method)} "
                f"(parameters: {', '.join(method.readers)})."
            )
        if name in values:
            raise ArgumentError(f"{name} is given twice in {text!r}.")
        values[name] = method.readers[name](text, value)
    return values


def _usage(method: Method) -> str:
    return " or ".join(method.examples)


def a_number(text: str, value: str) -> float:
    """A float."""
    try:
        return float(value)
    except ValueError:
        raise ArgumentError(f"{value!r} in {text!r} is not a number.") from None


def a_count(text: str, value: str) -> int:
    """A whole number."""
    try:
        return int(value)
    except ValueError:
        raise ArgumentError(f"{value!r} in {text!r} is not a whole number.") from None


def a_choice(text: str, value: str) -> bool:
    """True or false."""
    if value.lower() not in ("true", "false"):
        raise ArgumentError(f"{value!r} in {text!r}; expected true or false.")
    return value.lower() == "true"


def a_word(text: str, value: str) -> str:
    """As it stands."""
    return value


def number(value: float) -> str:
    """The shortest text that `a_number` reads as exactly this."""
    return repr(float(value)).removesuffix(".0")
