"""`benchmarks/evidence.py`: its words and tables from records, and that a job trains what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import evidence

    return evidence


def finals(regime, epochs, arm, weights, errors):
    return [
        {
            "job": f"{regime}{epochs}{seed}", "kind": "final", "regime": regime, "epochs": epochs,
            "seed": seed, "arm": arm, "weights": weights, "error": error, "nll": error / 30,
            "nll_scaled": error / 31, "ece": error / 3, "temperature": 1.0,
        }
        for seed, error in enumerate(errors)
    ]  # fmt: skip


def trials(arm, rate, errors, nll=0.5):
    return [
        {
            "job": f"t{arm}{rate}", "kind": "trial", "regime": "weak", "epochs": 40, "seed": seed,
            "arm": arm, "rate": rate, "error": error, "nll": nll,
        }
        for seed, error in enumerate(errors)
    ]  # fmt: skip


RECORDS = [
    *trials("sgd", 0.05, [12.0, 13.0]),
    *trials("sgd", 0.1, [12.5, 12.5], nll=0.4),
    *finals("weak", 40, "sgd", "iterate", [13.0, 14.0, 15.0]),
    *finals("weak", 40, "swa", "iterate", [15.0, 16.1, 16.9]),
    *finals("weak", 40, "swa", "swa", [12.0, 13.1, 13.9]),
    *finals("weak", 40, "swa", "ema", [14.0, 13.0, 15.0]),
    *finals("weak", 20, "swa", "swa", [14.0, 15.1, 15.9]),
]


def test_words_and_tables_say_what_the_records_hold(tmp_path):
    path = tmp_path / "evidence.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    command = [sys.executable, str(BENCHMARKS / "evidence.py"), "--summary", "--output", str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "weak: SWA −3.00 ± 0.00 points (lower)" in out
    assert "error −1.00 ± 0.25 points (lower)" in out
    assert "SWA of 20 epochs: error +1.00 ± 0.25 points (higher)" in out
    assert "| weak, 40 epochs | sgd | 0.05: 12.50, **0.1: 12.50** |" in out
    assert "**−1.00 ± 0.25**" in out


def test_the_best_rate_is_the_lowest_error_then_the_lowest_likelihood(evidence, tmp_path):
    results = evidence.Results(tmp_path / "none.jsonl")
    results.records = RECORDS
    assert results.best_rate(("weak", 40), "sgd") == 0.1


def test_it_continues_and_cuts_off_a_half_line(evidence, tmp_path):
    job = evidence.Job("trial", "weak", 40, 100, 0.05)
    path = tmp_path / "evidence.jsonl"
    results = evidence.Results(path)
    assert not results.has(job)
    results.add([{"job": job.key, "kind": "trial"}])
    with path.open("a") as file:
        file.write('{"job": "half')
    again = evidence.Results(path)
    assert again.has(job)
    assert len(again.records) == len(path.read_text().splitlines()) == 1


def test_every_arm_has_as_many_trials(evidence):
    plan = evidence.Plan()
    assert len(plan.rates) == len(plan.highs)


@pytest.mark.slow
def test_a_job_trains_every_kind_of_average(evidence, monkeypatch):
    import evidence_jobs

    from polyak.reference_run.data import Data, embedded_data

    whole = embedded_data()
    small = Data(
        *(
            type(s)(s.images[:200], s.labels[:200])
            for s in (whole.train, whole.validation, whole.test)
        )
    )
    monkeypatch.setattr(evidence_jobs, "load_data", lambda recipe: small)
    monkeypatch.setattr(evidence_jobs, "_SURFACE_IMAGES", 50)
    job = evidence.Job("final", "strong", 8, 0, 0.05, (("swa", (0.05,)), ("cyclic", (0.1,))))
    _, records = evidence_jobs.carry_out(job)
    kinds = {(r["arm"], r.get("weights", r["kind"])) for r in records}
    assert kinds == {
        ("sgd", "iterate"), ("sgd", "ema"), ("swa", "iterate"), ("swa", "swa"), ("swa", "ema"),
        ("swa", "swa-each-step"), ("swa", "swa-newest-statistics"),
        ("swa", "swa-averaged-statistics"), ("swa", "surface"), ("cyclic", "iterate"),
        ("cyclic", "swa"), ("cyclic", "ema"),
    }  # fmt: skip
    assert {record["job"] for record in records} == {job.key}
    stale, fresh = (
        next(r["error"] for r in records if r.get("weights") == kind)
        for kind in ("swa-newest-statistics", "swa")
    )
    assert stale != fresh
