"""The table: each check against polyak and every peer. `python benchmarks/conformance.py [--write]`.

A check is one small function in `checks/`, a peer one thin adapter in `peers/`. A peer is not judged on
what it does not claim to do. Prints a table; `--write` also writes
`benchmarks/results/conformance.jsonl` and `docs/conformance.md`. Fails if polyak fails anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from checks import CHECKS, Check, loops, precision, statistics, tensors  # noqa: E402, F401
from peers import NotOffered, Peer, all_peers  # noqa: E402

SUBJECTS = ("precision", "tensors", "loops", "BatchNorm")


def outcome(check: Check, peer: Peer) -> dict[str, Any]:
    """One cell: passes, fails with what shows it, or not offered."""
    row = {"check": check.title, "subject": check.subject, "peer": peer.name}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            result = check.run(peer)
    except NotOffered:
        return {**row, "result": "not offered"}
    except (Exception, SystemExit) as error:
        return {**row, "result": "fails", "shown": f"{type(error).__name__}"}
    if result.passed:
        return {**row, "result": "passes"}
    return {**row, "result": "fails", "shown": result.shown}


def markdown(rows: list[dict[str, Any]], peers: list[str]) -> Iterator[str]:
    """The page of the docs."""
    versions = ", ".join(f"{p} {version(p)}" for p in peers)
    yield "# Conformance\n"
    yield "`python benchmarks/conformance.py --write` runs every check against polyak and each library,"
    yield "through a thin adapter, and writes this page. A dash means that the library does not claim to do"
    yield "this and is not judged on it. Where a check fails, the cell says what was found.\n"
    yield f"Versions: {versions}.\n"
    for subject in SUBJECTS:
        yield f"## {subject.capitalize() if subject.islower() else subject}\n"
        yield f"| check | {' | '.join(peers)} |"
        yield "|---|" + "---|" * len(peers)
        for title in dict.fromkeys(r["check"] for r in rows if r["subject"] == subject):
            cells = {r["peer"]: r for r in rows if r["check"] == title}
            yield f"| {title} | {' | '.join(_cell(cells[p]) for p in peers)} |"
        yield ""


def _cell(row: dict[str, Any]) -> str:
    words = {"passes": "passes", "not offered": "–"}
    return words.get(row["result"]) or f"**fails**: {row['shown']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the results and the page")
    parser.add_argument("--only", default="", help="checks whose title contains this")
    arguments = parser.parse_args()
    peers = all_peers()
    chosen = [check for check in CHECKS if arguments.only in check.title]
    rows = [outcome(check, peer) for check in chosen for peer in peers]
    names = [peer.name for peer in peers]
    print("\n".join(markdown(rows, names)))
    if arguments.write:
        results = HERE / "results" / "conformance.jsonl"
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
        page = HERE.parent / "docs" / "conformance.md"
        page.write_text("\n".join(markdown(rows, names)).rstrip() + "\n")
    return int(any(r["result"] == "fails" for r in rows if r["peer"] == "polyak"))


if __name__ == "__main__":
    sys.exit(main())
