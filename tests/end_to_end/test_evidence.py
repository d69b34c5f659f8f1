"""`benchmarks/evidence.py`: its words and tables from records, and that a job trains what it says."""

import importlib
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
    *finals("weak", 40, "swa", "iterate", [15.0, 16.1, 16.8]),
    *finals("weak", 40, "swa", "swa", [12.0, 13.1, 13.9]),
    *finals("weak", 40, "swa", "ema", [14.0, 13.0, 15.0]),
    *finals("weak", 20, "swa", "swa", [14.0, 15.1, 15.9]),
]


def test_words_and_tables_say_what_the_records_hold(tmp_path):
    path = tmp_path / "evidence.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    command = [sys.executable, str(BENCHMARKS / "evidence.py"), "--summary", "--output", str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "weak: SWA −2.97 ± 0.14 points (lower)" in out
    assert "error −1.00 ± 0.25 points (lower)" in out
    assert "SWA of 20 epochs: error +1.00 ± 0.25 points (higher)" in out
    assert "| weak, 40 epochs | sgd | 0.05: 12.50, **0.1: 12.50** |" in out
    assert "**−1.00 ± 0.25**" in out


def afterwards(seed, errors, part):
    scored = [
        {"kind": "afterwards", "what": what, "error": e, "nll": e / 30, "nll_scaled": e / 31}
        for what, e in errors.items()
    ]
    reached = [
        {"kind": "afterwards-reached", "metric": metric, "part": found}
        for metric, found in (("error", part), ("nll_scaled", None))
    ]
    off = {what: {"error": e, "nll": 0.4, "nll_scaled": 0.4}
           for what, e in (("real", 14.0), ("forecast", 13.8), ("iterate", 16.0))}  # fmt: skip
    decay = {"kind": "afterwards-decay", "from": 10, **off}
    return [{"seed": seed, **record} for record in [*scored, *reached, decay]]


def test_what_was_chosen_afterwards_is_told_whichever_way_it_points(evidence):
    errors = {"found": 13.0, "swa": 13.2, "best-ema": 12.0, "stopped-ema": 13.0,
              "annealed": 13.1, "iterate": 15.0}  # fmt: skip
    worse = {**errors, "found": 13.4}
    said = evidence.page([*afterwards(0, errors, 0.5), *afterwards(1, worse, None)])
    assert "(2 seeds)" in said
    assert "minus the mean of the last quarter: error +0.00 ±" in said
    assert "minus the best of four live EMAs: error +1.20 ±" in said
    assert "error: 1 of 2 seeds, at 50% of the budget" in said
    assert "NLL after temperature scaling: 0 of 2 seeds." in said
    assert "off in error by 0.20 points (the iterate by 2.00)" in said
    assert "(no interval)" in evidence.page(afterwards(0, errors, 0.5))


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


def written(name):
    """What the page says between the marks of a name."""
    import evidence_docs

    page = evidence_docs.DOCS.read_text(encoding="utf-8")
    return page.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()


@pytest.mark.parametrize("name", ["words", "long"])
def test_the_page_says_what_the_records_of_a_run_say(evidence, name):
    module = importlib.import_module(f"evidence_{name}")
    records = [json.loads(line) for line in module.RESULTS.read_text().splitlines()]
    assert written(name) == module.summary(records)


def test_the_page_says_what_the_records_of_the_jobs_say(evidence):
    assert written("evidence") == evidence.page(evidence.Results(evidence.RESULTS).records)
