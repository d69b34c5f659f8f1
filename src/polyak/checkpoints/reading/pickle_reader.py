"""What a pickle names and would build, as inert values: nothing here imports or calls anything.

The opcodes of pickle protocols 2 to 5 that checkpoints hold, as functions of the machine.

A reader of pickles that runs nothing: opcodes in, plain containers and inert names out.

Python's unpickler imports and calls what the file names, and takes nine bytes for a reason to
allocate a gigabyte. This one knows containers, numbers and text; whatever else a pickle would import
is a `Global` (a name), and whatever it would call goes to the `call` that the reader of a format
gives, by default a `Stub`. Work and memory are bounded by the length of the data, which is bounded.

Source: the opcodes of protocols 2 to 5, https://docs.python.org/3/library/pickletools.html.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from polyak.errors import FormatError


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


class StateDict(dict[Any, Any]):
    """A mapping that a pickle would build, with the attributes it would set (torch: `_metadata`)."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None


def call_stub(function: Any, args: tuple[Any, ...]) -> Any:
    """What containers need, built; anything else becomes a `Stub`."""
    name = function.name if isinstance(function, Global | Stub) else type(function).__name__
    if name in _MAPPINGS and not (args and name == "collections.OrderedDict"):
        return StateDict()
    if name in _SETS and len(args) == 1 and isinstance(args[0], list):
        return args[0]
    if name in _NEW_OBJECT and args and isinstance(args[0], Global):
        return Stub(args[0].name, args[1:])
    return Stub(name, args)


_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict"}
_SETS = {"builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"}
_NEW_OBJECT = {"copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__"}


MAX_MARKS = 100_000
"""Containers that are open at once."""

Operation = Callable[["Machine"], None]


def _number(layout: str) -> Operation:
    form = struct.Struct(layout)

    def push(machine: Machine) -> None:
        machine.stack.append(form.unpack(machine.take(form.size))[0])

    return push


def _blob(layout: str, convert: Callable[[Machine, bytes], Any]) -> Operation:
    form = struct.Struct(layout)

    def push(machine: Machine) -> None:
        length = form.unpack(machine.take(form.size))[0]
        machine.stack.append(convert(machine, machine.take(length)))

    return push


def _long(machine: Machine, raw: bytes) -> int:
    if len(raw) > 16:  # keys and sizes; also keeps the hashes of integers apart
        raise machine.error(f"an integer of {len(raw)} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _put(index: Callable[[Machine], int]) -> Operation:
    def put(machine: Machine) -> None:
        machine.memo[index(machine)] = machine.stack[-1]

    return put


def _get(size: int) -> Operation:
    def get(machine: Machine) -> None:
        index = int.from_bytes(machine.take(size), "little")
        if index not in machine.memo:
            raise machine.error(f"memo entry {index} was never written")
        machine.stack.append(machine.memo[index])

    return get


def _tuple(length: int) -> Operation:
    def build(machine: Machine) -> None:
        stack = machine.stack
        if len(stack) < length:
            raise IndexError
        stack[-length:] = [tuple(stack[-length:])]

    return build


def _global(machine: Machine) -> None:
    module = machine.line()
    machine.stack.append(Global(f"{module}.{machine.line()}"))


def _stack_global(machine: Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not (isinstance(name, str) and isinstance(module, str) and len(name) + len(module) < 1000):
        raise machine.error("a global whose name is not text")
    machine.stack.append(Global(f"{module}.{name}"))


def _reduce(machine: Machine) -> None:
    args, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(args, tuple):
        raise machine.error("a call whose arguments are not a tuple")
    machine.stack.append(machine.call(function, args))


def _new_with_keywords(machine: Machine) -> None:
    keywords = machine.stack.pop()
    _reduce(machine)
    if isinstance(machine.stack[-1], Stub):
        machine.stack[-1].contents.append(keywords)


def _build(machine: Machine) -> None:
    state = machine.stack.pop()
    if isinstance(machine.stack[-1], Stub | StateDict):  # attributes of tensors are not needed
        machine.stack[-1].state = state


def _extend(machine: Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, Stub):
        target = target.contents
    if not isinstance(target, list):
        raise machine.error(f"items for a {type(target).__name__}")
    target.extend(items)


def _set_items(machine: Machine, items: list[Any]) -> None:
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


def _two(machine: Machine) -> list[Any]:
    value, key = machine.stack.pop(), machine.stack.pop()
    return [key, value]


def _persistent(machine: Machine) -> None:
    if machine.persistent is None:
        raise machine.error("a persistent id, where none is expected")
    machine.stack.append(machine.persistent(machine.stack.pop()))


def _protocol(machine: Machine) -> None:
    if machine.take(1)[0] > 5:
        raise machine.error("a protocol after 5")


def _mark(machine: Machine) -> None:
    machine.marks.append(len(machine.stack))
    if len(machine.marks) > MAX_MARKS:
        raise machine.error(f"more than {MAX_MARKS} containers are open")


def _frame(machine: Machine) -> None:
    machine.take(8)  # its length; its bytes simply follow


def _pop(machine: Machine) -> None:
    machine.stack.pop()


def _pop_mark(machine: Machine) -> None:
    machine.since_mark()


def _text(machine: Machine, raw: bytes) -> str:
    return machine.decode(raw)


def _latin(machine: Machine, raw: bytes) -> str:
    del machine
    return raw.decode("latin-1")


def _bytes(machine: Machine, raw: bytes) -> bytes:
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
        b"\x8f": lambda machine: machine.stack.append([]),  # a set; its order is all that is lost
        b"J": _number("<i"),
        b"K": _number("<B"),
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
        b"q": _put(lambda machine: machine.take(1)[0]),
        b"r": _put(lambda machine: int.from_bytes(machine.take(4), "little")),
        b"\x94": _put(lambda machine: len(machine.memo)),
        b"h": _get(1),
        b"j": _get(4),
        b"(": _mark,
        b"0": _pop,
        b"1": _pop_mark,
        b"2": lambda machine: machine.stack.append(machine.stack[-1]),
        b"\x85": _tuple(1),
        b"\x86": _tuple(2),
        b"\x87": _tuple(3),
        b"t": lambda machine: machine.stack.append(tuple(machine.since_mark())),
        b"l": lambda machine: machine.stack.append(machine.since_mark()),
        b"\x91": lambda machine: machine.stack.append(machine.since_mark()),
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


MAX_PICKLE_BYTES = 128 << 20
"""A pickle of weights holds names and shapes; the values lie elsewhere."""

MAX_OPCODES = 16_000_000
"""A few seconds and about a gigabyte at the very worst."""

MAX_STACK = 250_000
"""Objects, or marks, that wait for their container."""

PLAIN = (str, bytes, int, float, bool, type(None))
"""Values whose hash costs no more than their length."""


def read_pickle(
    data: bytes,
    what: str,
    call: Callable[[Any, tuple[Any, ...]], Any] = call_stub,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The object that `data` describes, built without running or importing anything.

    data: protocol 2 to 5. what: its name in messages. call: gets what a pickle would call (a `Global`,
    mostly) and the arguments. persistent: gets persistent ids (torch: storages); None refuses them.
    Raises FormatError for anything torn, unknown, or larger than the limits of this module.

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
    machine = Machine(data, what, call, persistent)
    try:
        return machine.run()
    except IndexError:
        raise machine.error("it takes more from the stack than lies there") from None


class Machine:
    """The stack machine of the pickle protocol."""

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

    def take(self, length: int) -> bytes:
        """The next bytes; never more than there are."""
        end = self.position + length
        if end > len(self.data):
            raise self.error(f"{length} bytes expected, {len(self.data) - self.position} are left")
        piece = self.data[self.position : end]
        self.position = end
        return piece

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
        """Take from the stack all that was put there since the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def key(self, value: Any) -> Any:
        """A key that hashes in bounded time: hashing nested tuples can take for ever."""
        if isinstance(value, tuple):
            plain = len(value) <= 16 and all(isinstance(item, PLAIN) for item in value)
            return value if plain else Stub("builtins.tuple", value)
        if isinstance(value, list | dict):
            raise self.error(f"a {type(value).__name__} as the key of a dict")
        return value
