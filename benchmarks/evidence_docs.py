"""Where the evidence's tables go in the documentation, and what tables of runs have in common."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from polyak.report.tables import Finals, format_estimate

DOCS = Path(__file__).parent.parent / "docs" / "should-i-average.md"


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
