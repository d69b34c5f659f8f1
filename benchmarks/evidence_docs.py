"""Where the evidence's tables go in the documentation, and what the evidence of tuned runs has in common."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from polyak.report.tables import Finals, format_estimate

DOCS = Path(__file__).parent.parent / "docs" / "should-i-average.md"


Records = list[dict[str, Any]]


def tell(
    name: str,
    described: str | None,
    results: Path,
    measure: Callable[[Path, int, bool], Records],
    summary: Callable[[Records], str],
) -> None:
    """The command line: train what is missing and print the tables, or put those of the results into the docs.

    measure: gives the records, from the folder of the runs, the number of seeds, and whether it is a smoke.
    """
    parser = argparse.ArgumentParser(
        description=described, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(f"runs/evidence-{name}"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke: a few epochs, 2 seeds")
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--write-docs", action="store_true", help="put the tables into the docs")
    given = parser.parse_args()
    if given.quick and given.output == results:
        parser.error("--quick needs a different --output: its figures are not evidence")
    if not given.write_docs:
        torch.set_num_threads(1)
        records = measure(given.work, 2 if given.quick else given.seeds, given.quick)
        given.output.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = summary([json.loads(line) for line in given.output.read_text().splitlines()])
    print(text)
    if given.write_docs:
        write_docs(name, text)


def write_docs(name: str, text: str) -> None:
    """Put a text between the marks `<!-- name:begin -->` and `<!-- name:end -->` of the page."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{DOCS} has no {begin} ... {end}. Nothing was written.")
    DOCS.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def finals_table(title: str, finals: Finals) -> list[str]:
    """A Markdown row for each arm's weights: mean and standard error of each metric."""
    columns = [f"{m.title} ({'%' if m.unit == 'points' else m.unit})" for m in finals.metrics]
    lines = [*row([title, *columns]), *row(["---"] * (len(columns) + 1))]
    for place in finals.rows:
        cells = (format_estimate(finals.mean(place, m.key), m.digits) for m in finals.metrics)
        lines += row([finals.label(place), *cells])
    return lines


def rates_table(
    title: str, tuning: list[dict[str, Any]], best: dict[str, float], metric: str, digits: int
) -> list[str]:
    """A Markdown row for each tuned arm: the metric at each rate, that of the chosen one in bold."""
    rates = sorted({trial["rate"] for trial in tuning})
    lines = [*row([title, *map(str, rates)]), *row(["---"] * (len(rates) + 1))]
    for arm, chosen in best.items():
        of_arm = {t["rate"]: f"{t[metric]:.{digits}f}" for t in tuning if t["arm"] == arm}
        lines += row([arm, *(f"**{of_arm[r]}**" if r == chosen else of_arm[r] for r in rates)])
    return lines


def row(cells: Iterable[str]) -> list[str]:
    """A line of a Markdown table, in a list."""
    return [f"| {' | '.join(cells)} |"]
