"""The application: its commands by import path, and how errors are printed."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from cyclopts import App

from polyak.cli import stopped
from polyak.errors import ArgumentError, PolyakError
from polyak.version import __version__

app = App(
    name="polyak",
    help="Average the weights of neural networks.",
    version=__version__,
    suppress_keyboard_interrupt=False,  # `stopped` says what can be continued
)
# One entry for each command, in the order of --help.
app.command(
    "polyak.cli.train:train",
    help="Train with SGD and with weight averaging at the same budget, and compare.",
)
app.command(
    "polyak.cli.schedule:schedule",
    help="Print or draw a learning-rate schedule and when it averages.",
)
app.command("polyak.cli.report:report", help="Write the page of a run.")
app.command("polyak.cli.report:compare", help="Put finished runs side by side.")
app.command("polyak.cli.average:average", help="Average checkpoints, or convert one.")
app.command("polyak.cli.search:search", help="Find the best average of a recorded run.")
app.command("polyak.cli.search:decay", help="What if I had decayed the learning rate from here?")
app.command("polyak.cli.search:stop", help="When could I have stopped?")
app.command("polyak.cli.soup:soup", help="Make fine-tunes of one model into one.")
app.command(
    "polyak.cli.landscape:landscape",
    name="landscape",
    help="Scores between and around checkpoints: line, plane, rays, curves, curvature.",
)
app.command(
    "polyak.cli.trajectory:thin", help="Merge neighbouring intervals of the record of a run."
)
app.command(
    "polyak.cli.adapters:merge_adapters",
    name="merge-adapters",
    help="Merge LoRA adapters of separate runs.",
)
app.command(
    "polyak.cli.update_bn:update_bn",
    name="update-bn",
    help="Set the BatchNorm statistics of averaged weights in a file.",
)
app.command("polyak.cli.inspect:inspect", help="Print what is in checkpoints.")
app.command("polyak.cli.diff:diff", help="Compare two checkpoints; exits like diff.")


def run(arguments: Sequence[str]) -> int:
    """Parse and run. polyak's errors become one message, Ctrl-C one line; returns the exit code."""
    try:
        result = app(list(arguments), exit_on_error=True, result_action="return_value")
    except PolyakError as error:
        from rich.console import Console

        message = with_flags(str(error), _options(arguments))
        Console(stderr=True).print(
            message, style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2 if isinstance(error, ArgumentError) else 1
    except KeyboardInterrupt as interrupt:
        return stopped(interrupt)
    return result if isinstance(result, int) else 0


def _options(arguments: Sequence[str]) -> set[str]:
    """The options of the command that was called, as the library spells them: max_memory."""
    command = app[arguments[0]]
    if len(arguments) > 1 and arguments[1] in command and not arguments[1].startswith("-"):
        command = command[arguments[1]]
    collection = command.assemble_argument_collection()
    flags = [name for argument in collection for name in argument.names if name.startswith("--")]
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


_KEYWORD = re.compile(r"\b([Pp]ass|[Ll]eave out) (\w+)=([^\s,.;:)]*)")
_NAME = re.compile(
    r"(^(?:Recipe field )?|\band )(\w+)(?= is | and | go | leaves? | exclude )|\b([a-z]+(?:_[a-z]+)+)\b"
)


def with_flags(message: str, options: Collection[str] = ()) -> str:
    """A message of the library in the words of the command line: for keywords, their flags.

    options: what the command takes, as the library spells it; named at the beginning of the message
    or, where the name is no plain word, anywhere.

    >>> with_flags("x exists. Choose another name, or pass overwrite=True to replace it.")
    'x exists. Choose another name, or pass --overwrite to replace it.'
    >>> with_flags("Pass max_memory=1GB, or pass exclude= with name patterns.")
    'Pass --max-memory 1GB, or pass --exclude with name patterns.'
    >>> with_flags("last is 0; expected at least 1, or raise max_memory.", {"last", "max_memory"})
    '--last is 0; expected at least 1, or raise --max-memory.'
    """

    def named(match: re.Match[str]) -> str:
        name = match[2] or match[3]
        if name not in options:
            return match[0]
        return f"{(match[1] or '').removesuffix('Recipe field ')}--{name.replace('_', '-')}"

    return _NAME.sub(named, _KEYWORD.sub(_flag, message))


def _flag(match: re.Match[str]) -> str:
    verb, name, value = match.groups()
    flag = f"{verb} --{name.replace('_', '-')}"
    return flag if value in ("", "True") else f"{flag} {value}"
