"""A reader of pickles that runs nothing: plain containers and inert names come out.

Python's unpickler imports and calls what the file names, and nine bytes can make it allocate a
gigabyte. This one knows containers, numbers and text. Whatever else a pickle would import is a
`Global` (a name), and whatever it would call goes to the `call` that the reader of a format passes, by
default a `Stub`. Work and memory are bounded by the length of the data, which is bounded too.

Source: the opcodes of protocols 2 to 5, https://docs.python.org/3/library/pickletools.html.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from polyak.errors import FormatError

MAX_PICKLE_BYTES = 128 << 20
"""A pickle of weights holds names and shapes; the values are stored elsewhere."""

MAX_OPCODES = 16_000_000
"""A few seconds and about a gigabyte in the worst case."""

MAX_STACK = 250_000
"""Objects that wait for their container."""

MAX_MARKS = 100_000
"""Containers that are open at once."""

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
    """The items of a set, in the order of the pickle."""

    __slots__ = ()


def call_stub(function: Any, args: tuple[Any, ...]) -> Any:
    """Containers of the standard library are built; anything else becomes a `Stub`."""
    name = function.name if isinstance(function, (Global, Stub)) else type(function).__name__
    if name in _MAPPINGS and not (args and name == "collections.OrderedDict"):
        return StateDict()
    if name in _SETS and len(args) == 1 and isinstance(args[0], list):
        return SetItems(args[0])
    if name in _NEW_OBJECT and args and isinstance(args[0], Global):
        return Stub(args[0].name, args[1:])
    return Stub(name, args)


_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict"}
_SETS = {"builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"}
_NEW_OBJECT = {"copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__"}


def read_pickle(
    data: bytes,
    what: str,
    call: Callable[[Any, tuple[Any, ...]], Any] = call_stub,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The object that `data` describes, built without running or importing anything.

    data: of protocol 2 to 5. what: its name in messages. call: gets what a pickle would call (mostly a
    `Global`) and the arguments. persistent: gets persistent ids (torch: storages); None refuses them.
    Raises FormatError for anything damaged, unknown, or larger than the limits of this module.

    >>> import pickle
    >>> read_pickle(pickle.dumps({"a": [1, 2.5, None]}), "example")
    {'a': [1, 2.5, None]}
    >>> read_pickle(pickle.dumps(print), "example").name  # a name; nothing was imported
    'builtins.print'
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise FormatError(
            f"{what}: {len(data)} bytes of pickle; at most {MAX_PICKLE_BYTES} are read."
        )
    machine = PickleMachine(data, what, call, persistent)
    try:
        return machine.run()
    except IndexError:
        raise machine.error("it takes more from the stack than is there") from None


class PickleMachine:
    """The stack machine of the pickle protocol."""

    __slots__ = ("call", "data", "marks", "memo", "persistent", "position", "stack", "what")

    def __init__(
        self,
        data: bytes,
        what: str,
        call: Callable[[Any, tuple[Any, ...]], Any],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.data, self.what, self.call, self.persistent = data, what, call, persistent
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Everything up to the STOP opcode, and what it leaves."""
        data, size, operations, stack = self.data, len(self.data), OPERATIONS, self.stack
        for _ in range(min(MAX_OPCODES, size)):
            if self.position == size:
                break
            code = data[self.position]
            self.position += 1
            if code == STOP:
                return stack.pop()
            operation = operations.get(code)
            if operation is None:
                raise self.error(f"opcode {bytes([code])!r} is not one that checkpoints hold")
            operation(self)
            if len(stack) > MAX_STACK:
                raise self.error(f"more than {MAX_STACK} objects wait on the stack")
        if self.position < size:
            raise self.error(f"more than {MAX_OPCODES} opcodes")
        raise self.error("it ends in the middle")

    def error(self, problem: str) -> FormatError:
        """What is wrong, and where."""
        return FormatError(
            f"{self.what}, byte {self.position}: {problem}. "
            "The file is damaged, hostile, or not a checkpoint; nothing of it was run."
        )

    def skip(self, length: int) -> int:
        """Pass over the next bytes, if there are that many, and return where they begin."""
        start = self.position
        if start + length > len(self.data):
            raise self.error(f"{length} bytes expected, {len(self.data) - start} are left")
        self.position = start + length
        return start

    def take(self, length: int) -> bytes:
        """The next bytes."""
        start = self.skip(length)
        return self.data[start : start + length]

    def byte(self) -> int:
        """The next byte."""
        position = self.position
        if position == len(self.data):
            raise self.error("it ends in the middle")
        self.position = position + 1
        return self.data[position]

    def line(self) -> str:
        """Text up to the end of a line."""
        end = self.data.find(b"\n", self.position, self.position + 1000)
        if end < 0:
            raise self.error("a name without an end")
        raw = self.take(end + 1 - self.position)[:-1]
        return self.decode(raw)

    def decode(self, raw: bytes) -> str:
        """UTF-8 as text."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error("text that is not UTF-8") from None

    def since_mark(self) -> list[Any]:
        """Take everything from the stack that was put there since the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def key(self, value: Any) -> Any:
        """The value as a key that hashes in bounded time.

        A tuple's hash visits every element again at every use, so that a few bytes of nested tuples that
        share their elements would take forever: only short tuples of plain values stay tuples.
        """
        if isinstance(value, tuple):
            plain = len(value) <= 16 and all(isinstance(item, PLAIN) for item in value)
            return value if plain else Stub("builtins.tuple", value)
        if isinstance(value, (list, dict)):
            raise self.error(f"a {type(value).__name__} as the key of a dict")
        return value


Operation = Callable[[PickleMachine], None]

_uint32 = struct.Struct("<I").unpack_from


def _number(layout: str) -> Operation:
    form = struct.Struct(layout)
    size, unpack = form.size, form.unpack_from

    def push(machine: PickleMachine) -> None:
        machine.stack.append(unpack(machine.data, machine.skip(size))[0])

    return push


def _blob(layout: str, convert: Callable[[PickleMachine, bytes], Any]) -> Operation:
    form = struct.Struct(layout)
    size, unpack = form.size, form.unpack_from

    def push(machine: PickleMachine) -> None:
        length = unpack(machine.data, machine.skip(size))[0]
        machine.stack.append(convert(machine, machine.take(length)))

    return push


def _long(machine: PickleMachine, raw: bytes) -> int:
    if len(raw) > 16:  # keys and sizes; also keeps the hashes of integers apart
        raise machine.error(f"an integer of {len(raw)} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _put(machine: PickleMachine) -> None:
    machine.memo[machine.byte()] = machine.stack[-1]


def _long_put(machine: PickleMachine) -> None:
    machine.memo[_uint32(machine.data, machine.skip(4))[0]] = machine.stack[-1]


def _memoize(machine: PickleMachine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: PickleMachine) -> None:
    _push_memo(machine, machine.byte())


def _long_get(machine: PickleMachine) -> None:
    _push_memo(machine, _uint32(machine.data, machine.skip(4))[0])


def _push_memo(machine: PickleMachine, index: int) -> None:
    try:
        machine.stack.append(machine.memo[index])
    except KeyError:
        raise machine.error(f"memo entry {index} was never written") from None


def _tuple(length: int) -> Operation:
    def build(machine: PickleMachine) -> None:
        stack = machine.stack
        if len(stack) < length:
            raise IndexError
        stack[-length:] = [tuple(stack[-length:])]

    return build


def _global(machine: PickleMachine) -> None:
    module = machine.line()
    machine.stack.append(Global(f"{module}.{machine.line()}"))


def _stack_global(machine: PickleMachine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not (isinstance(name, str) and isinstance(module, str) and len(name) + len(module) < 1000):
        raise machine.error("a global whose name is not text")
    machine.stack.append(Global(f"{module}.{name}"))


def _reduce(machine: PickleMachine) -> None:
    args, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(args, tuple):
        raise machine.error("a call whose arguments are not a tuple")
    machine.stack.append(machine.call(function, args))


def _new_with_keywords(machine: PickleMachine) -> None:
    keywords = machine.stack.pop()
    _reduce(machine)
    if isinstance(machine.stack[-1], Stub):
        machine.stack[-1].contents.append(keywords)


def _build(machine: PickleMachine) -> None:
    state = machine.stack.pop()
    if isinstance(machine.stack[-1], (Stub, StateDict)):  # attributes of tensors are not needed
        machine.stack[-1].state = state


def _extend(machine: PickleMachine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, Stub):
        target = target.contents
    if not isinstance(target, list):
        raise machine.error(f"items for a {type(target).__name__}")
    target.extend(items)


def _set_items(machine: PickleMachine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if len(items) % 2:
        raise machine.error("a key without a value")
    if isinstance(target, Stub):
        target.contents.extend(items)
    elif isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[machine.key(key)] = value
    else:
        raise machine.error(f"keys for a {type(target).__name__}")


def _two(machine: PickleMachine) -> list[Any]:
    value, key = machine.stack.pop(), machine.stack.pop()
    return [key, value]


def _persistent(machine: PickleMachine) -> None:
    if machine.persistent is None:
        raise machine.error("a persistent id, where none is expected")
    machine.stack.append(machine.persistent(machine.stack.pop()))


def _protocol(machine: PickleMachine) -> None:
    if machine.byte() > 5:
        raise machine.error("a protocol after 5")


def _mark(machine: PickleMachine) -> None:
    machine.marks.append(len(machine.stack))
    if len(machine.marks) > MAX_MARKS:
        raise machine.error(f"more than {MAX_MARKS} containers are open")


def _frame(machine: PickleMachine) -> None:
    machine.skip(8)  # its length; its bytes simply follow


def _pop(machine: PickleMachine) -> None:
    machine.stack.pop()


def _pop_mark(machine: PickleMachine) -> None:
    machine.since_mark()


def _text(machine: PickleMachine, raw: bytes) -> str:
    return machine.decode(raw)


def _latin(machine: PickleMachine, raw: bytes) -> str:
    del machine
    return raw.decode("latin-1")


def _bytes(machine: PickleMachine, raw: bytes) -> bytes:
    del machine
    return raw


STOP = ord(".")

OPERATIONS: dict[int, Operation] = {
    code[0]: operation
    for code, operation in {
        b"\x80": _protocol,
        b"\x95": _frame,
        b"N": lambda machine: machine.stack.append(None),
        b"\x88": lambda machine: machine.stack.append(True),
        b"\x89": lambda machine: machine.stack.append(False),
        b"]": lambda machine: machine.stack.append([]),
        b"}": lambda machine: machine.stack.append({}),
        b")": lambda machine: machine.stack.append(()),
        b"\x8f": lambda machine: machine.stack.append(SetItems()),
        b"J": _number("<i"),
        b"K": lambda machine: machine.stack.append(machine.byte()),
        b"M": _number("<H"),
        b"G": _number(">d"),
        b"\x8a": _blob("<B", _long),
        b"\x8b": _blob("<I", _long),
        b"X": _blob("<I", _text),
        b"\x8c": _blob("<B", _text),
        b"\x8d": _blob("<Q", _text),
        b"U": _blob("<B", _latin),
        b"T": _blob("<I", _latin),
        b"B": _blob("<I", _bytes),
        b"C": _blob("<B", _bytes),
        b"\x8e": _blob("<Q", _bytes),
        b"\x96": _blob("<Q", _bytes),
        b"q": _put,
        b"r": _long_put,
        b"\x94": _memoize,
        b"h": _get,
        b"j": _long_get,
        b"(": _mark,
        b"0": _pop,
        b"1": _pop_mark,
        b"2": lambda machine: machine.stack.append(machine.stack[-1]),
        b"\x85": _tuple(1),
        b"\x86": _tuple(2),
        b"\x87": _tuple(3),
        b"t": lambda machine: machine.stack.append(tuple(machine.since_mark())),
        b"l": lambda machine: machine.stack.append(machine.since_mark()),
        b"\x91": lambda machine: machine.stack.append(SetItems(machine.since_mark())),
        b"a": lambda machine: _extend(machine, [machine.stack.pop()]),
        b"e": lambda machine: _extend(machine, machine.since_mark()),
        b"\x90": lambda machine: _extend(machine, machine.since_mark()),
        b"s": lambda machine: _set_items(machine, _two(machine)),
        b"u": lambda machine: _set_items(machine, machine.since_mark()),
        b"c": _global,
        b"\x93": _stack_global,
        b"R": _reduce,
        b"\x81": _reduce,
        b"\x92": _new_with_keywords,
        b"b": _build,
        b"Q": _persistent,
    }.items()
}
