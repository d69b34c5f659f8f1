"""A reader of pickles that runs nothing: opcodes in, plain containers and inert names out.

Python's unpickler imports and calls what the file names, and takes nine bytes for a reason to
allocate a gigabyte. This one knows containers, numbers and text; whatever else a pickle would import
is a `Global` (a name), and whatever it would call goes to the `call` that the reader of a format
gives, by default a `Stub`. Work and memory are bounded by the length of the data, which is bounded.

Source: the opcodes of protocols 2 to 5, https://docs.python.org/3/library/pickletools.html.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyak.checkpoints.reading.inert import Stub, call_stub
from polyak.checkpoints.reading.opcodes import OPERATIONS, STOP
from polyak.errors import FormatError

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
