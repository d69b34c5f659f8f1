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


Whole = Annotated[int | None, Parameter(converter=whole_number)]
