"""The application and its commands, by import path."""

from __future__ import annotations

from collections.abc import Sequence

from cyclopts import App

import polyak
from polyak.errors import PolyakError

app = App(name="polyak", help="Average the weights of neural networks.", version=polyak.__version__)
# One line a command: app.command("polyak.cli.train:train"), in the order of --help.


def run(arguments: Sequence[str]) -> int:
    """Parse and run; an error of ours becomes one message and exit code 1."""
    try:
        result = app(list(arguments), exit_on_error=True, result_action="return_value")
    except PolyakError as error:
        from rich.console import Console

        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        return 1
    return result if isinstance(result, int) else 0
