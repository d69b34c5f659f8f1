"""Everything polyak raises and warns about.

The tree (each also is the built-in in brackets, so `except ValueError` keeps working)::

    PolyakError
    ├── ArgumentError   [ValueError]    a value outside its domain, or two that exclude each other
    ├── MismatchError   [ValueError]    tensors that do not line up: missing, unexpected, reshaped
    ├── NonFiniteError  [ValueError]    a NaN or an infinity about to leave or to enter
    ├── FormatError     [ValueError]    a file that is not what it should be: cut short, hostile, foreign
    ├── UsageError      [RuntimeError]  a call that does not fit the moment: an update inside `applied`
    ├── OutputError     [OSError]       a result that cannot be written: it exists, no room, no right
    └── MissingExtra    [ImportError]   an optional dependency that is not installed

    PolyakWarning       [UserWarning]
    ├── EmptyAverage                    an average was used before anything was averaged
    └── StaleStatistics                 BatchNorm statistics that do not belong to the averaged weights

A message says what was wrong, what was found, what was expected, and what to do. Where that is to pass a
keyword, it says "pass name=value": the command line shows these words as "pass --name value".
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any


class PolyakError(Exception):
    """What polyak raises; every other of its errors derives from it."""


class ArgumentError(PolyakError, ValueError):
    """A value outside its domain, or two arguments that exclude each other."""


class MismatchError(PolyakError, ValueError):
    """Tensors that do not line up; the message names every one of them."""

    @classmethod
    def of(
        cls,
        what: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        changed: Mapping[str, str] | None = None,
        advice: str = "",
    ) -> MismatchError:
        """Build the message from the three lists: names sorted, all of them, one kind a line."""
        lines = [what]
        if names := sorted(missing):
            lines.append(f"  missing ({len(names)}): {', '.join(names)}")
        if names := sorted(unexpected):
            lines.append(f"  unexpected ({len(names)}): {', '.join(names)}")
        for name, how in sorted((changed or {}).items()):
            lines.append(f"  {name}: {how}")
        if advice:
            lines.append(advice)
        return cls("\n".join(lines))


class NonFiniteError(PolyakError, ValueError):
    """A NaN or an infinity where only finite weights may pass."""


class FormatError(PolyakError, ValueError):
    """A file that is not what it should be."""


class UsageError(PolyakError, RuntimeError):
    """A call that does not fit the moment."""


class OutputError(PolyakError, OSError):
    """A result that cannot be written."""


class MissingExtra(PolyakError, ImportError):  # noqa: N818 - reads as what it is
    """An optional dependency that is not installed."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtra:
        """One sentence, with the command that installs it."""
        return cls(
            f"{purpose} needs {package}, which is not installed: pip install 'polyak[{extra}]'"
        )


class PolyakWarning(UserWarning):
    """What polyak warns about."""


class EmptyAverage(PolyakWarning):
    """An average was used before anything was averaged; the model is left as it is."""


class StaleStatistics(PolyakWarning):
    """BatchNorm statistics that do not belong to the averaged weights."""


def require(condition: bool, message: str) -> None:
    """Raise ArgumentError with the message unless the condition holds."""
    if not condition:
        raise ArgumentError(message)


def some(names: Iterable[str]) -> str:
    """The first four of several names, for a message that would be too long with all.

    >>> some("abcde")
    'a, b, c, d, ...'
    """
    several = list(names)
    return ", ".join(several[:4]) + (", ..." if len(several) > 4 else "")


def check_match(
    have: Mapping[str, Any],
    expected: Mapping[str, Any],
    what: str,
    advice: str = "",
    *,
    allow_unexpected: bool = False,
) -> None:
    """Raise MismatchError that names every difference between two mappings from names.

    The values are whatever must be equal, as it should read in the message: shapes, dtypes.
    """
    changed = {
        name: f"{have[name]}, expected {expected[name]}"
        for name in have.keys() & expected.keys()
        if have[name] != expected[name]
    }
    missing = expected.keys() - have.keys()
    unexpected = set() if allow_unexpected else have.keys() - expected.keys()
    if missing or unexpected or changed:
        raise MismatchError.of(
            what, missing=missing, unexpected=unexpected, changed=changed, advice=advice
        )


# Packages whose frames may stand between the user's call and the warning that it causes: our own,
# hooks that torch and frameworks call, and the standard library's context managers, copying and pickling.
_STANDARD = {"contextlib", "copy", "functools", "multiprocessing", "pickle"}
_NOT_THE_CALLER = {"polyak", "torch", "lightning", "transformers", *_STANDARD}


def warn(message: str, category: type[PolyakWarning] = PolyakWarning) -> None:
    """Warn at the line outside polyak whose call led here, however deep inside polyak this is."""
    depth = 1
    frame = sys._getframe(1)
    while frame.f_back and _package_of(frame) in _NOT_THE_CALLER:
        frame = frame.f_back
        depth += 1
    warnings.warn(message, category, stacklevel=depth + 1)


def _package_of(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
