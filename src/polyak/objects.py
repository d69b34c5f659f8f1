"""Objects named on the command line: `package.module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from polyak.errors import ArgumentError


def object_at(spelling: str) -> Callable[..., Any]:
    """Import the callable at `package.module:function`; the working folder is searched too.

    Raises ArgumentError where there is none.

    >>> object_at("math:sqrt")(4)
    2.0
    """
    module_name, colon, name = spelling.partition(":")
    if not (colon and module_name and name):
        raise ArgumentError(f"{spelling!r} names nothing; expected package.module:function.")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - as sys.path spells it
        sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"{spelling!r}: there is no module {error.name!r}, here or installed."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise ArgumentError(
            f"{spelling!r}: {module_name} has {what} at {name}; expected a function."
        )
    result: Callable[..., Any] = found
    return result
