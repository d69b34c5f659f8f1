"""`Trajectory.search`, `decay` and `stop`: what they find, keep, compare, and refuse."""

from __future__ import annotations

import importlib.util
import itertools
import json
import linecache
import math
import random
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import polyak
from polyak.errors import (
    ArgumentError,
    MismatchError,
    NonFiniteError,
    PolyakError,
    StaleStatistics,
    UsageError,
)
from polyak.study.bootstrap import MOST_DRAWN, paired_bootstrap
from polyak.study.classify import ScaledNLL
from polyak.study.command import Command
from polyak.study.evaluations import model_identity
from polyak.study.metrics import best_temperature, nll
from polyak.study.windows import search_lengths, search_windows


def make(folder, model=None, *, steps=160, interval=10, value=float):
    model = model or nn.Linear(2, 1)
    with polyak.Recorder(model, folder, interval=interval, captures=5) as recorder:
        for step in range(1, steps + 1):
            nn.init.constant_(next(model.parameters()), value(step))
            recorder.update()
    return polyak.Trajectory(folder)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make(tmp_path_factory.mktemp("record") / "record").folder


@pytest.fixture
def record(shared):
    return polyak.Trajectory(shared)


class Calls:
    """Counts what it is asked, and scores by the distance of the weights from a target."""

    minimize = True

    def __init__(self, target=100.0, examples=None):
        self.target, self.examples, self.count = target, examples, 0

    def __call__(self, state):
        self.count += 1
        score = (state["weight"][0, 0].double() - self.target).abs()
        if self.examples is None:
            return score
        noise = torch.arange(self.examples) % 7 / 7
        return score + noise


# -- what is found ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("edges", "limit"), [(21, 16), (41, 16), (65, 16)])
def test_sixteen_evaluations_come_close_to_all(edges, limit):
    draw = random.Random(0)
    worst = []
    for _ in range(60):
        a, tilt = draw.uniform(0, 0.6), draw.uniform(-0.5, 0.5)
        b = min(1.0, a + draw.uniform(0.2, 0.9))
        last = edges - 1

        def score(w, a=a, b=b, tilt=tilt, last=last):
            x, y = w[0] / last - a, w[1] / last - b
            return x * x + y * y + tilt * x * y

        known = search_windows(score, edges, limit)
        every = [score(w) for w in itertools.combinations(range(edges), 2)]
        assert len(known) == limit
        worst.append((min(known.values()) - min(every)) / (max(every) - min(every)))
    assert max(worst) < 0.03, worst
    assert sum(worst) / len(worst) < 0.003


@pytest.mark.parametrize("edges", [3, 4, 5, 6, 9])
def test_with_room_all_windows_are_evaluated_and_each_once(edges):
    seen = []
    known = search_windows(lambda w: seen.append(w) or w[0] * 3 % 7 - w[1], edges, 10**6)
    assert sorted(seen) == sorted(known) == list(itertools.combinations(range(edges), 2))


@pytest.mark.parametrize("best", [3, 9, 20, 33, 40])
def test_quick_finds_a_length(best):
    known = search_lengths(lambda w: (((w[1] - w[0]) / best) ** 0.5 - 1) ** 2, 41, 5)
    found = min(known, key=known.__getitem__)
    assert len(known) <= 5
    assert 0.6 <= (found[1] - found[0]) / best <= 1.7


def test_the_known_minimum_of_a_record(record):
    # A window's weights are the middle of it: all with the middle at 100.0 are best.
    found = record.search(Calls(101.0), cache=False, evaluations=60)
    assert found.best.score < 1e-6
    assert found.best.start + found.best.until == 200
    assert found.evaluations <= 62
    text = str(found)
    assert "best" in text
    assert "so without an interval" in text
    assert json.loads(json.dumps(found.as_dict()))["best"]["profile"] == found.best.profile


def test_maximize_turns_it_around(record):
    found = record.search(lambda state: -Calls(101.0)(state), maximize=True, cache=False)
    assert found.best == record.search(Calls(100.0), cache=False).best.__class__(
        **found.best.__dict__
    )
    assert found.best.score == max(one.score for one in found.scored)


def test_families(record):
    found = record.search(
        Calls(140.0), families=("half-lives", "power", "annealed"), cache=False, ema="ema:decay=0.9"
    )
    assert [one.family for one in found.answers] == ["half-lives", "power", "annealed"]
    assert found.evaluations <= 5 + 5 + 6 + 3
    assert set(found.references) == {"SWA of the last quarter", "EMA", "the last interval"}
    for one in found.scored:
        made = record.average(one.profile, one.until)["weight"][0, 0]
        assert one.score == pytest.approx(abs(float(made) - 140.0), rel=1e-6)


def test_since_and_until_bound_it(record):
    found = record.search(Calls(), since=52, until=118, cache=False)
    assert {one.start for one in found.scored} <= set(range(50, 121, 10))
    assert max(one.until for one in found.scored) == found.end == 120


def test_stop_is_the_earliest_end_that_does(tmp_path):
    record = make(tmp_path / "r", value=lambda step: min(step, 80))  # nothing changes after 80
    found = record.stop(Calls(80.0, examples=50), cache=False)
    assert found.best.until <= 100
    assert [one.until for one in found.answers] == [20, 40, 60, 80, 100, 120, 140, 160]
    assert found.comparisons[0].low > 0
    assert found.comparisons[-1].within_noise
    assert "Earliest that would have done" in str(found)
    assert record.stop(Calls(80.0), cache=False, points=4).best.until <= 120


def test_decay_makes_the_average_of_a_decay(record):
    found = record.decay(Calls(), length=40, shape="cosine", points=4, cache=False)
    assert [(one.start, one.until) for one in found.answers] == [
        (0, 40), (40, 80), (80, 120), (120, 160),
    ]  # fmt: skip
    made = record.average("annealed:shape=cosine,start=40", 80)["weight"][0, 0]
    assert found.answers[1].score == pytest.approx(abs(float(made) - 100.0))


def test_checkpoints_are_searched_too(tmp_path):
    files = []
    for step in range(10, 90, 10):
        files.append(tmp_path / f"step-{step}.pt")
        torch.save({"weight": torch.full((1, 2), float(step))}, files[-1])
    found = polyak.Trajectory.from_checkpoints(files).search(Calls(60.0))
    assert found.best.score <= 5
    assert "the last checkpoint" in found.references


# -- what is kept -----------------------------------------------------------------------------------


def test_nothing_is_evaluated_twice(record, tmp_path):
    options = {"cache": tmp_path / "scores", "name": "distance"}
    first, again, wider = Calls(), Calls(), Calls()
    found = record.search(first, **options)
    assert first.count == found.evaluations == 17  # 16, and the last interval
    known = record.search(again, **options)
    assert (again.count, known.evaluations, known.cached) == (0, 0, 17)
    assert known.best == found.best
    more = record.search(wider, evaluations=25, families=("windows", "half-lives"), **options)
    assert wider.count == more.evaluations == 25 - 16 + 5
    record.search(other := Calls(), **{**options, "name": "another"})
    assert other.count == 17


LAYER = "import torch\n\n\nclass Layer(torch.nn.Linear):\n    def forward(self, x):\n        return {}\n"


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_of_other_code_is_another(tmp_path, nested):
    """Its layers print as before; what they compute is another thing."""

    def built(result):
        (tmp_path / "layer.py").write_text(LAYER.format(result))
        spec = importlib.util.spec_from_file_location("layer", tmp_path / "layer.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["layer"] = module
        linecache.checkcache()
        return torch.nn.Sequential(module.Layer(2, 2)) if nested else module.Layer(2, 2)

    before = model_identity(built("super().forward(x)"))
    assert model_identity(built("super().forward(x)")) == before
    assert model_identity(built("super().forward(x).relu()")) != before
    del sys.modules["layer"]
    assert model_identity(torch.nn.Linear(2, 2)) != model_identity(torch.nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("printed", "score"),
    [
        ("epoch 3: the loss is 0.35.", 0.35),
        ("step 10\nThe score: 7.", 7.0),
        ("of 20 \x1b[32m0.5\x1b[0m", 0.5),
        ("epoch 3 -Infinity", -math.inf),
        ("0.25 by version 2.1.3", 0.25),
        ("0.25 in 12s", 0.25),
    ],
)
def test_the_last_number_is_found_as_people_print_it(tmp_path, printed, score):
    (tmp_path / "said").write_text(printed)
    assert Command(f"cat {tmp_path / 'said'} {{file}}")("/dev/null") == score


@pytest.mark.parametrize("damage", ["", "{", '{"key": 1}', "half", "values"])
def test_a_damaged_score_counts_as_none(record, tmp_path, damage):
    options = {"cache": tmp_path / "scores", "name": "distance", "quick": True}
    whole = record.search(Calls(examples=20), **options)
    file = min((tmp_path / "scores").iterdir())
    text = file.read_text()
    file.write_text(
        {"half": text[: len(text) // 2], "values": text.replace("A", "B", 5)}.get(damage, damage)
    )
    found = record.search(calls := Calls(examples=20), **options)
    assert calls.count == 1
    assert found.best == whole.best


def test_a_moved_record_keeps_its_scores(tmp_path):
    record = make(tmp_path / "a")
    record.search(Calls(), name="distance", quick=True)
    moved = (tmp_path / "a").rename(tmp_path / "b")
    polyak.Trajectory(moved).search(calls := Calls(), name="distance", quick=True)
    assert calls.count == 0


def test_other_weights_are_evaluated_again(tmp_path):
    make(tmp_path / "r").search(Calls(), name="distance", quick=True)
    for path in (tmp_path / "r").glob("interval-*"):
        path.unlink()
    make(tmp_path / "r", value=lambda step: 2.0 * step).search(
        calls := Calls(), name="distance", quick=True
    )
    assert calls.count > 0


def test_what_cannot_be_told_apart_is_not_kept(tmp_path):
    record = make(tmp_path / "r")
    found = record.search(Calls(), quick=True)
    assert not (record.folder / ".scores").exists()
    assert any("Pass name=" in note for note in found.notes)


def test_a_cache_that_is_a_file(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="which is a file"):
        record.search(Calls(), cache=tmp_path / "file", name="x")


# -- honest comparisons -----------------------------------------------------------------------------


def test_the_interval_is_that_of_a_slow_twin():
    torch.manual_seed(3)
    a, b = torch.rand(40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    mean, low, high = paired_bootstrap(a, b)
    draw, differences = random.Random(1), (a - b).tolist()
    means = sorted(sum(draw.choices(differences, k=40)) / 40 for _ in range(10_000))
    assert mean == pytest.approx(sum(differences) / 40, abs=1e-12)
    spread = means[9749] - means[249]
    assert low == pytest.approx(means[249], abs=0.04 * spread)
    assert high == pytest.approx(means[9749], abs=0.04 * spread)


def test_the_limit_of_many_examples_agrees():
    torch.manual_seed(0)
    scores = torch.rand(2 * MOST_DRAWN)
    many = paired_bootstrap(scores, torch.zeros_like(scores))
    few = paired_bootstrap(scores[:MOST_DRAWN], torch.zeros(MOST_DRAWN))
    assert (many[2] - many[1]) == pytest.approx((few[2] - few[1]) / 2**0.5, rel=0.05)


@pytest.mark.parametrize("pair", [(torch.ones(1), torch.ones(1)), (torch.ones(3), torch.ones(4))])
def test_what_has_no_interval(pair):
    with pytest.raises(ArgumentError, match="at least 2"):
        paired_bootstrap(*pair)


def test_chosen_on_one_part_and_reported_on_the_other(record):
    calls = Calls(140.0, examples=100)
    found = record.search(calls, cache=False, holdout=0.3)
    assert found.examples == (70, 30)
    assert found.best.score != found.best.held_out
    last = next(c for c in found.comparisons if c.against == "the last interval")
    assert (last.low, last.high) == pytest.approx((last.difference, last.difference))
    assert not last.within_noise


@pytest.mark.parametrize(
    ("examples", "holdout", "why"),
    [
        (None, 0.5, "One number for each average: "),
        (100, 0, "holdout is 0, so no examples are left to compare on: "),
        (100, 0.001, "holdout is 0.001 of 100 examples, which leaves too few "),
        (2, 0.9, "holdout is 0.9 of 2 examples, which leaves too few "),
    ],
)
def test_why_there_is_no_interval(record, examples, holdout, why):
    found = record.search(Calls(140.0, examples=examples), cache=False, holdout=holdout)
    assert found.examples is None
    note = found.notes[-1]
    assert note.startswith(why)
    assert note.count("One number") == (examples is None)


@pytest.mark.parametrize("examples", [None, 40])
@pytest.mark.parametrize(
    ("target", "given", "same"),
    [
        (1000.0, {}, {"the last interval"}),
        (1000.0, {"swa": "window:length=10"}, {"SWA", "the last interval"}),
        (140.5, {}, {"SWA of the last quarter"}),
        (140.5, {"ema": "window:length=40"}, {"SWA of the last quarter", "EMA"}),
        (100.0, {}, set()),
    ],
)
def test_what_the_best_itself_is_has_no_difference(record, target, given, same, examples):
    found = record.search(Calls(target, examples=examples), minimize=True, cache=False, **given)
    assert {one.against for one in found.comparisons if one.same} == same
    said = str(found)
    for one in found.comparisons:
        assert (f"best and {one.against} are one and the same average" in said) == one.same
        assert (f"best minus {one.against}: " in said) != one.same


def test_noise_is_called_noise(record):
    def coin(state):
        torch.manual_seed(int(state["weight"][0, 0]))
        return torch.rand(60)

    found = record.search(coin, minimize=True, cache=False)
    assert any(one.within_noise for one in found.comparisons)
    assert "within noise" in str(found)


def test_every_evaluation_sees_the_same_noise(record):
    model = nn.Linear(2, 1)
    before = torch.get_rng_state()
    found = record.search(lambda model: torch.rand(()), model=model, minimize=True, cache=False)
    assert len({one.score for one in found.scored}) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_scaled_nll():
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3), torch.randn(400, 4)
    labels = (model(inputs) + 0.5 * torch.randn(400, 3)).argmax(1)
    data = [(inputs[:150], labels[:150]), (inputs[150:], labels[150:])]
    scores = ScaledNLL(data)(model)
    logits = model(inputs).detach()
    expected = [
        nll(logits[one], labels[one], temperature=best_temperature(logits[other], labels[other]))
        for one, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2)))
    ]  # fmt: skip
    assert float(scores.mean()) == pytest.approx(sum(expected) / 2)
    with torch.no_grad():
        model.weight.mul_(5)
        model.bias.mul_(5)  # what calibration alone changes does not count
    assert ScaledNLL(data)(model).tolist() == pytest.approx(scores.tolist(), rel=1e-5)
    other = [(inputs[:150], labels[:150]), (inputs[150:] + 1, labels[150:])]
    assert ScaledNLL(other).identity != ScaledNLL(data).identity == ScaledNLL(data).identity


def test_scaled_nll_notices_a_shuffle():
    inputs, labels = torch.randn(40, 2), torch.arange(40) % 3
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, labels), batch_size=8, shuffle=True
    )
    evaluate, model = ScaledNLL(loader), nn.Linear(2, 3)
    evaluate(model)
    with pytest.raises(ArgumentError, match="another order"):
        evaluate(model)


@pytest.mark.parametrize("data", [3, iter([]), torch.ones(3)])
def test_scaled_nll_refuses_what_cannot_be_read_again(data):
    with pytest.raises(ArgumentError, match="read again"):
        ScaledNLL(data)


@pytest.mark.parametrize("data", [[], [torch.ones(2, 2)], [(torch.ones(2, 2), [0, 1])]])
def test_scaled_nll_refuses_other_batches(data):
    with pytest.raises(ArgumentError, match="pair"):
        ScaledNLL(data)(nn.Linear(2, 2))


# -- the model --------------------------------------------------------------------------------------


def normed():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_the_model_has_its_own_weights_and_mode_again(record):
    model = nn.Linear(2, 1).train()
    own = {n: t.clone() for n, t in model.state_dict().items()}
    seen = []

    def evaluate(model):
        seen.append(model.training)
        if len(seen) == 4:
            raise ValueError
        return model.weight.mean()

    with pytest.raises(UsageError):
        record.search(evaluate, model=model, minimize=True, cache=False)
    assert seen == [False] * 4
    assert model.training
    assert all(torch.equal(t, own[n]) for n, t in model.state_dict().items())


def test_the_last_iterate_may_be_the_model_itself(record, tmp_path):
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, 90.0)
    torch.save(model.state_dict(), tmp_path / "last.pt")

    def distance(model):
        return (model.weight[0, 0] - 100).abs()

    options = {"model": model, "minimize": True, "cache": False, "quick": True}
    for last in (model.state_dict(), tmp_path / "last.pt"):
        found = record.search(distance, last=last, **options)
        assert found.references["the last iterate"].score == 10


def test_statistics_are_refreshed_for_each(tmp_path):
    record = make(tmp_path / "r", normed())
    model, batch = normed(), torch.randn(64, 2)

    def evaluate(model):
        inside = model[0](batch)
        assert torch.allclose(model[1].running_mean, inside.mean(0), atol=1e-4)
        return 0.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record.search(evaluate, model=model, data=[batch], minimize=True, cache=False, quick=True)
    with pytest.warns(StaleStatistics, match="Pass data=") as said:
        record.search(lambda m: 0.0, model=model, minimize=True, cache=False, quick=True)
    assert len(said) == 1


def test_tied_weights(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        return model

    record = make(tmp_path / "r", tied())
    found = record.search(
        lambda m: (m[1].weight[0, 0] - 100.0).abs(), model=tied(), minimize=True, cache=False
    )
    assert found.best.score < 5


# -- bad input --------------------------------------------------------------------------------------


def test_the_record_of_another_model(record):
    with pytest.raises(MismatchError, match="is not the record of this model") as raised:
        record.search(lambda m: 0.0, model=nn.Linear(3, 1), minimize=True)
    assert "weight: [1, 2], expected [1, 3]" in str(raised.value)


def test_the_direction_has_to_be_known(record):
    with pytest.raises(ArgumentError, match=r"minimize=True .*maximize=True"):
        record.search(lambda state: 0.0)
    with pytest.raises(ArgumentError, match="Both directions"):
        record.search(lambda state: 0.0, minimize=True, maximize=True)

    def val_loss(state):
        return Calls()(state)

    def accuracy(state):
        return -Calls()(state)

    assert record.search(val_loss, quick=True, cache=False).minimize
    assert not record.search(accuracy, quick=True, cache=False).minimize


def test_a_missing_interval_costs_only_what_needs_it(tmp_path):
    record = make(tmp_path / "r")
    gone = record.intervals[3].path
    gone.write_bytes(gone.read_bytes()[:60])
    found = polyak.Trajectory(tmp_path / "r").search(Calls(), cache=False)
    assert any(str(gone) in note for note in found.notes)
    assert any(note.startswith("Left out: swa") for note in found.notes)
    assert all(not one.start <= 30 < one.until for one in found.scored)
    assert found.best.score < 10


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), torch.tensor([1.0, float("nan"), 2.0])]
)
def test_a_score_that_is_no_number_is_never_chosen(record, bad):
    def evaluate(state):
        value = float(state["weight"][0, 0])
        good = abs(value - 100) if not isinstance(bad, torch.Tensor) else torch.full((3,), value)
        return bad if 60 < value < 110 else good

    found = record.search(evaluate, minimize=True, cache=False, holdout=0)
    assert not found.best.failed
    assert any(one.failed for one in found.scored)
    assert any(note.startswith("No finite score") for note in found.notes)
    with pytest.raises(NonFiniteError, match="None of the 16"):
        record.search(lambda state: bad, minimize=True, cache=False)


def test_an_evaluation_that_fails_says_where(record, tmp_path):
    def evaluate(state):
        if calls.count == 3:
            raise KeyError("lost")
        return calls(state)

    calls = Calls()
    options = {"minimize": True, "cache": tmp_path / "s", "name": "x"}
    with pytest.raises(
        UsageError, match=r"KeyError: 'lost' \(.*test_search.py:\d+\). 3 scores are"
    ):
        record.search(evaluate, **options)
    calls.count = 10
    assert record.search(evaluate, **options).cached == 3


def test_scores_of_another_length(record):
    sizes = itertools.count(5)
    with pytest.raises(ArgumentError, match=r"6 scores for .*, and 5 scores before"):
        record.search(lambda state: torch.ones(next(sizes)), minimize=True, cache=False)


@pytest.mark.parametrize(
    "result", [None, "good", torch.ones(2, 2), torch.ones(3) + 1j, 1j, [], {"loss": 1.0}]
)
def test_results_that_are_no_scores(record, result):
    with pytest.raises(ArgumentError, match="expected a number, or a 1-D tensor"):
        record.search(lambda state: result, minimize=True, cache=False)


def test_an_evaluation_that_hangs_is_stopped(record):
    def evaluate(state):
        try:
            time.sleep(60)
        except Exception:
            return 0.0

    begun = time.monotonic()
    with pytest.raises(UsageError, match=r"longer than 0.1 s"):
        record.search(evaluate, minimize=True, cache=False, timeout=0.1)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"until": 0}, "until is 0; the record is from 10 to 160 steps"),
        ({"until": 4}, "until is 4; the record is from 10"),
        ({"until": 170}, "until is 170"),
        ({"since": -1}, "since is -1"),
        ({"since": 100, "until": 90}, "no interval of the record is between"),
        ({"since": 150}, "a search needs at least 2"),
        ({"evaluations": 0}, "evaluations"),
        ({"families": "windows"}, "families is 'windows'"),
        ({"families": ("moons",)}, "expected some of windows"),
        ({"holdout": 1}, "holdout is 1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"data": [torch.ones(1)]}, "needs the model"),
        ({"model": nn.Linear}, "needs a torch module"),
        ({"speed": 3}, "There is no option speed"),
        ({"last": 3}, "last is a int"),
        ({"swa": "swap"}, "swap"),
    ],
)
def test_options_outside_their_domain(record, options, words):
    with pytest.raises(PolyakError, match=words):
        record.search(Calls(), cache=False, **options)


@pytest.mark.parametrize("evaluate", [None, 3, nn.Linear(1, 1), Calls])
def test_what_is_no_evaluation(record, evaluate):
    with pytest.raises(ArgumentError, match="expected a function"):
        record.search(evaluate, minimize=True)


@pytest.mark.parametrize("options", [{"length": 0}, {"length": 500}, {"points": 0}, {"shape": "x"}])
def test_decays_that_cannot_be(record, options):
    with pytest.raises(ArgumentError):
        record.decay(Calls(), cache=False, **options)


def test_files_of_a_model_without_batchnorm_need_no_refreshing(tmp_path):
    class Reads:
        takes_file = True

        def __call__(self, path):
            return float(load_file(path)["weight"].square().sum())

    model = nn.Linear(2, 1)
    recorder = polyak.Recorder(model, tmp_path / "record", interval=1, captures=1)
    for _ in range(3):
        recorder.update()
    recorder.close()
    found = polyak.Trajectory(tmp_path / "record").search(
        Reads(), model=model, data=[torch.ones(4, 2)], minimize=True, quick=True
    )
    assert found.best.score == pytest.approx(float(model.weight.detach().square().sum()))
