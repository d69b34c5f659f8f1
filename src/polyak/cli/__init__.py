"""The command line: parse, one library call, print.

Each command is in its own file and is loaded when it is called, so that `polyak --help` does not
pay for importing torch. Exit codes: 0; 2 for wrong usage; 130 after Ctrl-C; 1 for the rest.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the entry point of the `polyak` script."""
    try:
        _main()
    except KeyboardInterrupt as interrupt:  # in the imports
        sys.exit(stopped(interrupt))


def stopped(interrupt: KeyboardInterrupt) -> int:
    """Say that Ctrl-C stopped the command, in its own words if it has some; the exit code."""
    sys.stderr.write(f"{str(interrupt) or 'Stopped.'}\n")
    return 130


def _main() -> None:
    try:
        import cyclopts  # noqa: F401
    except ImportError:
        from polyak.errors import MissingExtra

        sys.exit(str(MissingExtra.of("cyclopts", "cli", "The command line")))
    from polyak.cli.app import run

    sys.exit(run(sys.argv[1:]))
