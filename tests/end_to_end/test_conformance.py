"""Every row of the conformance table is green for polyak."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def conformance(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import conformance

    return conformance


@pytest.mark.filterwarnings("ignore")
def test_polyak_passes_every_check_of_the_table(conformance: object) -> None:
    from peers.polyak_average import Polyak

    rows = [conformance.outcome(check, Polyak()) for check in conformance.CHECKS]
    assert len(rows) >= 25
    assert [row for row in rows if row["result"] != "passes"] == []


@pytest.mark.filterwarnings("ignore")
def test_the_table_can_tell_right_from_wrong(conformance: object) -> None:
    from peers.torch_swa_utils import Torch

    chosen = [c for c in conformance.CHECKS if c.title.startswith(("integer", "a frozen layer"))]
    assert [conformance.outcome(check, Torch())["result"] for check in chosen] == ["fails"] * 2


def test_rows_of_a_peer_that_is_not_there_stay(conformance: object) -> None:
    rows = conformance.with_absent([])
    ties = next(c.title for c in conformance.CHECKS if c.title.startswith("TIES keeps"))
    kept = {row["peer"]: row for row in rows if row["check"] == ties}
    assert set(kept) == {"polyak", "mergekit", "model-soups", "peft"}
    again = conformance.with_absent([{**kept["polyak"], "version": "2"}])
    found = {row["peer"]: row for row in again if row["check"] == ties}
    assert found == {**kept, "polyak": {**kept["polyak"], "version": "2"}}
    assert any("mergekit 0.1.5" in line for line in conformance.markdown(again))
