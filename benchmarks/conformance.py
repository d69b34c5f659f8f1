"""The table: each check against polyak and every peer. `python benchmarks/conformance.py [--write]`.

A check is one small function in `checks/`, a peer one thin adapter in `peers/`. A peer is not judged on
what it does not claim to do. Prints a table; `--write` also writes
`benchmarks/results/conformance.jsonl` and `docs/conformance.md`. Fails if polyak fails anywhere.

Three peers are not in the environment of the tests, and are found where these say; the rows of those that are
not there stay as they were:

    pip download --no-deps -d wheels swa-gaussian==0.1.9 torch-uncertainty==0.13.0
    git clone https://github.com/mlfoundations/model-soups
    python -m venv mk && mk/bin/pip install mergekit==0.1.5
    export SWAG_WHEELS=$PWD/wheels MODEL_SOUPS=$PWD/model-soups MERGEKIT=$PWD/mk/bin/mergekit-yaml
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from checks import (  # noqa: E402, F401
    CHECKS,
    Check,
    combinations,
    loops,
    posteriors,
    precision,
    statistics,
    tensors,
)
from peers import NotOffered, Peer, all_peers  # noqa: E402

SUBJECTS = ("precision", "tensors", "loops", "BatchNorm", "SWAG", "combinations")
RESULTS = HERE / "results" / "conformance.jsonl"


def outcome(check: Check, peer: Peer) -> dict[str, Any]:
    """One cell: passes, fails with what shows it, or not offered."""
    row = {"check": check.title, "subject": check.subject, "peer": peer.name}
    row |= {"version": peer.version}
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


def with_absent(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of before beside them, of peers that were not there and of checks that were not asked for."""
    before = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    titles = {check.title for check in CHECKS}
    found = {(row["check"], row["peer"]): row for row in [*before, *rows] if row["check"] in titles}
    return list(found.values())


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The page of the docs."""
    yield "# Conformance\n"
    yield "`python benchmarks/conformance.py --write` runs every check against polyak and each library,"
    yield "through a thin adapter, and writes this page. A dash means that the library does not claim to do"
    yield "this and is not judged on it. Where a check fails, the cell says what was found.\n"
    versions = {row["peer"]: row["version"] for row in rows}
    yield f"Versions: {', '.join(f'{peer} {found}' for peer, found in versions.items())}.\n"
    for subject in SUBJECTS:
        about = [row for row in rows if row["subject"] == subject]
        if not about:
            continue
        peers = list(dict.fromkeys(row["peer"] for row in about))
        yield f"## {subject[0].upper()}{subject[1:]}\n"
        yield f"| check | {' | '.join(peers)} |"
        yield "|---|" + "---|" * len(peers)
        for title in dict.fromkeys(row["check"] for row in about):
            cells = {row["peer"]: _cell(row) for row in about if row["check"] == title}
            yield f"| {title} | {' | '.join(cells.get(peer, '–') for peer in peers)} |"
        yield ""


def _cell(row: dict[str, Any]) -> str:
    words = {"passes": "passes", "not offered": "–"}
    return words.get(row["result"]) or f"**fails**: {row['shown']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the results and the page")
    parser.add_argument("--only", default="", help="checks whose title contains this")
    parser.add_argument("--subject", default="", help="checks of this subject")
    arguments = parser.parse_args()
    chosen = [c for c in CHECKS if arguments.only in c.title and arguments.subject in c.subject]
    rows = [outcome(check, peer) for check in chosen for peer in all_peers(check.subject)]
    if arguments.write:
        kept = with_absent(rows)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in kept))
        page = HERE.parent / "docs" / "conformance.md"
        page.write_text("\n".join(markdown(kept)).rstrip() + "\n")
    print("\n".join(markdown(rows)))
    return int(any(r["result"] == "fails" for r in rows if r["peer"] == "polyak"))


if __name__ == "__main__":
    sys.exit(main())
