"""`polyak report`: the page of a run. `polyak compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from polyak.cli.converters import Flag, NewFile


def report(
    run: Path,
    /,
    *,
    output: Annotated[NewFile | None, Parameter(name=["--output", "-o"])] = None,
    overwrite: Annotated[bool, Flag] = False,
) -> None:
    """Write the page of a run: report.html and figures/ in its folder.

    The surface around its solutions is measured first if it is not stored in the folder yet.

    Args:
        run: Folder that polyak train wrote.
        output: Write the page there; the pictures still go into figures/ of the run.
        overwrite: Replace the page at --output if it exists; the run's own always is.

    """
    from rich.console import Console

    from polyak.files import file_target
    from polyak.reference_run import Run, measure_landscape
    from polyak.report import write_report

    if output is not None:
        file_target(output, overwrite=overwrite)
    console = Console()
    with console.status("Measuring and drawing"):
        measure_landscape(Run(run))
        path = write_report(run, output, overwrite=overwrite)
    console.print(f"Report: {path}", highlight=False, soft_wrap=True)


def compare(
    *runs: Annotated[Path, Parameter(help="Folders that polyak train wrote; two or more.")],
    output: Annotated[NewFile, Parameter(name=["--output", "-o"])] = Path("compare.html"),
    overwrite: Annotated[bool, Flag] = False,
) -> None:
    """Put finished runs side by side: a table here, and a page with their pictures.

    Args:
        runs: Folders that polyak train wrote; two or more.
        output: The page to write.
        overwrite: Replace the page if it exists.

    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from polyak.files import file_target
    from polyak.report.page import (
        metrics_of,
        named_runs,
        recipe_table,
        result_table,
        write_comparison,
    )
    from polyak.report.tables import Finals

    file_target(output, overwrite=overwrite)
    console = Console()
    chosen = named_runs(runs)
    finals = {name: Finals(run.finals()) for name, run in chosen.items()}
    for grid in [
        recipe_table(chosen),
        *(result_table(finals, metric) for metric in metrics_of(finals)),
    ]:
        columns = [Column(Text(head.text)) for head in grid.columns]
        printed = Table(*columns, title=Text(grid.caption), title_justify="left")
        for row in grid.rows:
            printed.add_row(row.label, *(Text(cell.text) for cell in row.cells))
        console.print(printed)
    path = write_comparison(runs, output, overwrite=overwrite)
    console.print(f"Page: {path}", highlight=False, soft_wrap=True)
