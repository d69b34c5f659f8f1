"""`polyak report`: the page of a run, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def report(run: Annotated[Path, Parameter(help="Folder that polyak train wrote.")], /) -> None:
    """Make the page of a finished run again: report.html and figures/ in its folder.

    The surface around its solutions is measured anew; the run itself is only read.
    """
    from rich.console import Console

    from polyak.report.page import write_report

    console = Console()
    with console.status("Measuring and drawing"):
        path = write_report(run)
    console.print(f"Report: {path}", highlight=False, soft_wrap=True)
