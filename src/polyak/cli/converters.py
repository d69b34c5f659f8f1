"""Converters of what is typed on the command line, where the parser's own are too generous."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
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


def file_name(type_: Any, tokens: Sequence[Token]) -> Path:
    """A file to be written: `Path` would forget the slash by which a folder is named."""
    from polyak.files import names_folder

    (token,) = tokens
    if names_folder(token.value):
        raise ValueError(f"{token.value!r} names a folder; expected the name of a file.")
    return Path(token.value)


def file_or_folder(type_: Any, tokens: Sequence[Token]) -> Path:
    """As `file_name` where the suffix is a file's; another name is that of a folder."""
    from polyak.checkpoints.writing.layouts import TORCH_SUFFIXES

    (token,) = tokens
    path = Path(token.value)
    is_file = path.suffix.lower() in (".safetensors", *TORCH_SUFFIXES)
    return file_name(type_, tokens) if is_file else path


def each(converter: Callable[[Any, Sequence[Token]], Path]) -> Callable[..., list[Path]]:
    """A converter of an option that is repeated; the parser would drop the message of an element's own."""
    return lambda type_, tokens: [converter(Path, [token]) for token in tokens]


Whole = Annotated[int, Parameter(converter=whole_number)]
MaybeWhole = Annotated[int | None, Parameter(converter=whole_number)]
NewFile = Annotated[Path, Parameter(converter=file_name)]
"""A file to be written."""
New = Annotated[Path, Parameter(converter=file_or_folder)]
"""What is written: a file, or a folder, as its suffix says."""
Flag = Parameter(negative="")
"""Of a switch without a --no-...."""
Many = Parameter(negative="", consume_multiple=False)
"""Of an option that is repeated, with one value each."""
