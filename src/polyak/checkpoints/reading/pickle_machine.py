"""The stack machine of the pickle protocol, without its opcodes, and what bounds its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from polyak.checkpoints.reading.inert import PLAIN, Stub
from polyak.errors import FormatError

MAX_PICKLE_BYTES = 128 << 20
"""A pickle of weights holds names and shapes; the values are stored elsewhere."""

MAX_OPCODES = 16_000_000
"""A few seconds and about a gigabyte in the worst case."""

MAX_STACK = 250_000
"""Objects that wait for their container."""

MAX_MARKS = 100_000
"""Containers that are open at once."""

STOP = ord(".")


class EndsTooEarlyError(FormatError):
    """The data ends before the pickle does."""


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

    def run(self, operations: Mapping[int, Operation]) -> Any:
        """Everything up to the STOP opcode, and what it leaves."""
        try:
            return self._run(operations)
        except IndexError:
            raise self.error("it takes more from the stack than is there") from None

    def _run(self, operations: Mapping[int, Operation]) -> Any:
        data, size, stack = self.data, len(self.data), self.stack
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
        raise self.ended("it ends in the middle")

    def error(self, problem: str, kind: type[FormatError] = FormatError) -> FormatError:
        """What is wrong, and where."""
        return kind(
            f"{self.what}, byte {self.position}: {problem}. "
            "The file is damaged, hostile, or not a checkpoint; nothing of it was run."
        )

    def ended(self, problem: str) -> FormatError:
        """The same, where more data could mend it."""
        return self.error(problem, EndsTooEarlyError)

    def skip(self, length: int) -> int:
        """Pass over the next bytes, if there are that many, and return where they begin."""
        start = self.position
        if start + length > len(self.data):
            raise self.ended(f"{length} bytes expected, {len(self.data) - start} are left")
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
            raise self.ended("it ends in the middle")
        self.position = position + 1
        return self.data[position]

    def line(self) -> str:
        """Text up to the end of a line."""
        return self.decode(self.raw_line(1000))

    def raw_line(self, limit: int) -> bytes:
        """The bytes up to the end of a line, at most `limit` of them."""
        end = self.data.find(b"\n", self.position, self.position + limit)
        if end < 0:
            short = len(self.data) < self.position + limit
            raise (self.ended if short else self.error)("a line without an end")
        return self.take(end + 1 - self.position)[:-1]

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


Operation: TypeAlias = Callable[[PickleMachine], None]
