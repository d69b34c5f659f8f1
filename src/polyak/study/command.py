"""An evaluation by a program of its own."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from polyak.errors import UsageError, require

_NUMBER = re.compile(
    rb"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w|\.\w)|[-+]?\b(?:nan|inf(?:inity)?)\b",
    re.IGNORECASE,
)
_COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
_TAIL = 1000


class Command:
    """An evaluation by a program: the last number that it prints is the score of the weights in {file}.

    Raises ArgumentError unless {file} is in it, UsageError if it fails, prints no number, or takes longer
    than `timeout` seconds: it is then stopped with everything that it has started.
    """

    takes_file = True

    def __init__(self, command: str, timeout: float | None = None) -> None:
        self._parts = shlex.split(command)
        require(
            any("{file}" in part for part in self._parts),
            f"The command {command!r} does not say where the file goes; expected {{file}} in it, as in "
            "'python eval.py {file}'.",
        )
        self._command, self._timeout = command, timeout
        self.__name__ = command

    @property
    def identity(self) -> str:
        """The command, and what is in the files that it names."""
        named = [path for part in self._parts if (path := Path(part)).is_file()]
        return "\n".join(
            [
                self._command,
                *(f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in named),
            ]
        )

    def __call__(self, file: Path) -> float:
        """The score of the weights in this file."""
        parts = [part.replace("{file}", str(file)) for part in self._parts]
        try:
            process = subprocess.Popen(
                parts,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise UsageError(f"The command {shlex.join(parts)} does not start: {error}.") from None
        with process:
            try:
                printed, complaints = process.communicate(timeout=self._timeout)
            except BaseException as error:
                _stop(process)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise UsageError(
                        f"The command {shlex.join(parts)} took longer than {self._timeout:g} s and was stopped. "
                        "Pass timeout= with more seconds if it needs them."
                    ) from None
                raise
        if process.returncode:
            said = complaints.decode(errors="replace")[-_TAIL:].strip()
            raise UsageError(
                f"The command {shlex.join(parts)} failed with exit code {process.returncode}:\n{said}"
            )
        numbers = _NUMBER.findall(_COLOUR.sub(b"", printed))
        if not numbers:
            said = printed.decode(errors="replace")[-_TAIL:].strip()
            raise UsageError(
                f"The command {shlex.join(parts)} printed no number; expected the score as the last one. It "
                f"printed: {said!r}"
            )
        return float(numbers[-1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with suppress(OSError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
