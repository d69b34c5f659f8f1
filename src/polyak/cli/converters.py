"""Converters of what is typed on the command line, where the parser's own are too generous."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token


def whole_number(type_: Any, tokens: Sequence[Token]) -> int:
    """A whole number as it is typed: the parser would round 2.5."""
    (token,) = tokens
    try:
        return int(token.value)
    except ValueError:
        raise ValueError(f"{token.value!r} is not a whole number.") from None


def seed_range(type_: Any, tokens: Sequence[Token]) -> dict[str, int]:
    """The recipe's fields: `3` says how many, `3:8`, which is 3, ..., 7, with which they begin as well."""
    (token,) = tokens
    first, colon, end = token.value.partition(":")
    if not colon:
        return {"seeds": whole_number(type_, tokens)}
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"{token.value!r} is not a range of seeds; 3:8 is 3, 4, 5, 6, 7.")
    return {"first_seed": int(first), "seeds": int(end) - int(first)}


Whole = Annotated[int | None, Parameter(converter=whole_number)]
Flag = Parameter(negative="")
"""Of a switch without a --no-...."""
Many = Parameter(negative="", consume_multiple=False)
"""Of an option that is repeated, with one value each."""
