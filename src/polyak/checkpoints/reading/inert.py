"""What a pickle would import, build or call, as objects that do nothing: names and their arguments."""

from __future__ import annotations

from typing import Any

PLAIN = (str, bytes, int, float, bool, type(None))
"""Values whose hash costs no more than their length."""


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
    """The items of a set, in the order of the pickle; hashing them could take forever."""

    __slots__ = ()


def call_stub(function: Any, args: tuple[Any, ...]) -> Any:
    """Containers and byte strings of the standard library are built; anything else becomes a `Stub`."""
    name = function.name if isinstance(function, (Global, Stub)) else type(function).__name__
    if name in _MAPPINGS:
        return _mapping(name, args)
    if name in _SETS and len(args) == 1 and isinstance(args[0], list):
        return SetItems(args[0])
    if name in _NEW_OBJECT and args and isinstance(args[0], Global):
        return Stub(args[0].name, args[1:])
    if name in _BYTES and not args:
        return b""
    if name == "_codecs.encode" and len(args) == 2 and isinstance(args[0], str):
        return _byte_string(args)
    return Stub(name, args)


def _mapping(name: str, args: tuple[Any, ...]) -> Any:
    """An empty mapping, or (as Python 2 wrote them) an OrderedDict of a list of pairs."""
    found = StateDict()
    if not args or name != "collections.OrderedDict":
        return found
    pairs = args[0] if isinstance(args[0], list) else [args[0]]
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], PLAIN)):
            return Stub(name, args)
        found[pair[0]] = pair[1]
    return found


def _byte_string(args: tuple[Any, ...]) -> Any:
    """`bytes` as Python writes them up to protocol 2: the text that encodes to them."""
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError:
        return Stub("_codecs.encode", args)


_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict"}
_BYTES = {"builtins.bytes", "__builtin__.bytes"}
_SETS = {"builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"}
_NEW_OBJECT = {"copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__"}
