"""What a pickle would import, build or call, as objects that do nothing: names and their arguments."""

from __future__ import annotations

from typing import Any


class Global:
    """What a pickle would import, `module.name`; it is never imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Stub:
    """An object that a pickle would build: the name of its builder, its arguments, and its contents."""

    __slots__ = ("args", "contents", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.contents: list[Any] = []


class StateDict(dict[Any, Any]):
    """A mapping that a pickle would build, with the attributes it would set (torch: `_metadata`)."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None


class SetItems(list[Any]):
    """The items of a set; hashing them could take forever."""

    __slots__ = ()


def call_stub(function: Any, args: tuple[Any, ...]) -> Any:
    """Containers and byte strings of the standard library are built; anything else becomes a `Stub`."""
    name = function.name if isinstance(function, (Global, Stub)) else type(function).__name__
    if name in _MAPPINGS and not (args and name == "collections.OrderedDict"):
        return StateDict()
    if name in _SETS and len(args) == 1 and isinstance(args[0], list):
        return SetItems(args[0])
    if name in _NEW_OBJECT and args and isinstance(args[0], Global):
        return Stub(args[0].name, args[1:])
    if name == "_codecs.encode" and len(args) == 2 and isinstance(args[0], str):
        return _byte_string(args)
    return Stub(name, args)


def _byte_string(args: tuple[Any, ...]) -> Any:
    """`bytes` as Python writes them up to protocol 2: the text that encodes to them."""
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError:
        return Stub("_codecs.encode", args)


_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict"}
_SETS = {"builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"}
_NEW_OBJECT = {"copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__"}
