"""What a pickle names and would build, as inert values: nothing here imports or calls anything."""

from __future__ import annotations

from typing import Any


class Global:
    """What a pickle would import: `module.name`, never imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Stub:
    """An object that a pickle would build: what builds it, from what, and what was put into it."""

    __slots__ = ("args", "contents", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.contents: list[Any] = []


def call_stub(function: Any, args: tuple[Any, ...]) -> Any:
    """What containers need, built; anything else becomes a `Stub`."""
    name = function.name if isinstance(function, Global | Stub) else type(function).__name__
    if name in _MAPPINGS and not (args and name == "collections.OrderedDict"):
        return {}
    if name in _SETS and len(args) == 1 and isinstance(args[0], list):
        return args[0]
    if name in _NEW_OBJECT and args and isinstance(args[0], Global):
        return Stub(args[0].name, args[1:])
    return Stub(name, args)


_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict"}
_SETS = {"builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"}
_NEW_OBJECT = {"copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__"}
