"""Objects by their names: `package.module:function`, and packages that load theirs when asked."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from polyak.errors import ArgumentError


def load_object(spelling: str) -> Callable[..., Any]:
    """Import the callable at `package.module:function`; the working folder is searched too.

    Raises ArgumentError where there is none.

    >>> load_object("math:sqrt")(4)
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


def call_object(spelling: str) -> Any:
    """What the function at `package.module:function` returns, called without arguments.

    Raises ArgumentError where there is none, or it needs arguments; its own errors pass.
    """
    function = load_object(spelling)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ArgumentError(
            f"{spelling!r} is called without arguments, and needs some: {error}. Name a function that "
            "fills them in."
        ) from None
    except ValueError:  # built into the interpreter: it has no signature
        pass
    return function()


def lazy_names(
    package: str, home_of: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package that loads its names on first use (PEP 562).

    `home_of` says in which module each name is defined. Modules of the package are found as well.
    """
    names = sorted(home_of)

    def load(name: str) -> Any:
        if name in home_of:
            value = getattr(importlib.import_module(home_of[name]), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}"):
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: list(names), names
