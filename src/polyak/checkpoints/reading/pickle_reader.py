"""A reader of pickles that runs nothing: plain containers and inert names come out.

Python's unpickler imports and calls what the file names, and nine bytes can make it allocate a
gigabyte. This one knows containers, numbers and text. Whatever else a pickle would import is a
`Global` (a name), and whatever it would call goes to the `call` that the reader of a format passes, by
default a `Stub`. Work and memory are bounded by the length of the data, which is bounded too.

Source: the opcodes of protocols 0 to 5, https://docs.python.org/3/library/pickletools.html.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from polyak.checkpoints.reading.inert import Global, SetItems, StateDict, Stub, call_stub
from polyak.checkpoints.reading.pickle_machine import (
    MAX_MARKS,
    MAX_PICKLE_BYTES,
    EndsTooEarlyError,
    Operation,
    PickleMachine,
)
from polyak.checkpoints.reading.stored import ByteFile
from polyak.errors import FormatError


def read_pickle(
    data: bytes,
    what: str,
    call: Callable[[Any, tuple[Any, ...]], Any] = call_stub,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The object that `data` describes, built without running or importing anything.

    data: of any protocol. what: its name in messages. call: gets what a pickle would call (mostly a
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
    return PickleMachine(data, what, call, persistent).run(OPERATIONS)


def read_pickle_at(
    file: ByteFile,
    start: int,
    call: Callable[[Any, tuple[Any, ...]], Any] = call_stub,
    persistent: Callable[[Any], Any] | None = None,
    *,
    window: int = 1 << 16,
) -> tuple[Any, int]:
    """The object that the pickle at `start` of a file describes, and where the pickle ends.

    Its length is not known before: `window` bytes are read at first, and eight times as many (from the
    start again) until its end is among them. call, persistent: see `read_pickle`; calls may be repeated.
    """
    what = f"{file.path} (pickle at byte {start})"
    while True:
        length = max(0, min(window, file.size - start, MAX_PICKLE_BYTES))
        machine = PickleMachine(file.read(start, length), what, call, persistent)
        try:
            return machine.run(OPERATIONS), start + machine.position
        except EndsTooEarlyError:
            if length < window:
                raise
            window *= 8


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


def _old_text(machine: PickleMachine, raw: bytes) -> str:
    """A string of Python 2, which held bytes: mostly ASCII or UTF-8."""
    del machine
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _bytes(machine: PickleMachine, raw: bytes) -> bytes:
    del machine
    return raw


# The opcodes of protocols 0 and 1, which are lines of text, and the objects of Python 2.

_DIGITS = re.compile(r"-?[0-9]{1,39}")
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"t": b"\t", b"r": b"\r"}


def _text_number(machine: PickleMachine, text: str) -> int:
    if not _DIGITS.fullmatch(text):
        raise machine.error(f"{text[:50]!r} is not an integer of at most 39 digits")
    return int(text)


def _text_integer(machine: PickleMachine) -> None:
    text = machine.line()
    truth = {"00": False, "01": True}.get(text)
    value = _text_number(machine, text.removesuffix("L")) if truth is None else truth
    machine.stack.append(value)


def _text_float(machine: PickleMachine) -> None:
    text = machine.line()
    try:
        machine.stack.append(float(text))
    except ValueError:
        raise machine.error(f"{text[:50]!r} is not a number") from None


def _quoted(machine: PickleMachine) -> None:
    raw = machine.raw_line(len(machine.data))
    if len(raw) < 2 or raw[0] != raw[-1] or raw[0] not in b"'\"":
        raise machine.error("a string without quotes")
    plain = _ESCAPE.sub(_unescaped, raw[1:-1])
    machine.stack.append(_old_text(machine, plain))


def _unescaped(match: re.Match[bytes]) -> bytes:
    code: bytes = match[1]
    return bytes([int(code[1:], 16)]) if len(code) == 3 else _ESCAPED.get(code, code)


def _raw_unicode(machine: PickleMachine) -> None:
    try:
        text = machine.raw_line(len(machine.data)).decode("raw-unicode-escape")
        text.encode()  # half a surrogate pair cannot be printed or written
    except UnicodeError:
        raise machine.error("text that is not Unicode") from None
    machine.stack.append(text)


def _text_put(machine: PickleMachine) -> None:
    machine.memo[_text_number(machine, machine.line())] = machine.stack[-1]


def _text_persistent(machine: PickleMachine) -> None:
    machine.stack.append(machine.line())
    _persistent(machine)


def _dict(machine: PickleMachine) -> None:
    items = machine.since_mark()
    machine.stack.append({})
    _set_items(machine, items)


def _old_object(machine: PickleMachine) -> None:
    kind, *args = machine.since_mark() or [None]
    if not isinstance(kind, Global):
        raise machine.error("an object without a class")
    machine.stack.append(Stub(kind.name, tuple(args)))


def _old_instance(machine: PickleMachine) -> None:
    module = machine.line()
    name = f"{module}.{machine.line()}"
    machine.stack.append(Stub(name, tuple(machine.since_mark())))


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
        b"U": _blob("<B", _old_text),
        b"T": _blob("<I", _old_text),
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
        b"P": _text_persistent,
        b"I": _text_integer,
        b"L": _text_integer,
        b"F": _text_float,
        b"S": _quoted,
        b"V": _raw_unicode,
        b"p": _text_put,
        b"g": lambda machine: _push_memo(machine, _text_number(machine, machine.line())),
        b"d": _dict,
        b"o": _old_object,
        b"i": _old_instance,
    }.items()
}
