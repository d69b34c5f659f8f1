"""`make_soup`: against float64 twins, how often files are read, what is kept, and what is refused."""

from __future__ import annotations

import collections
import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from reference import combining, programs, soups
from safetensors.torch import load_file, save_file
from torch import nn

import polyak
from polyak.checkpoints import ModelStock, average_checkpoints, open_checkpoint
from polyak.checkpoints.reading.storage import LocalFile
from polyak.errors import (
    ArgumentError,
    MismatchError,
    NonFiniteError,
    OutputError,
    PolyakError,
    PolyakWarning,
    StaleStatistics,
    UsageError,
)
from polyak.study import Command, make_soup
from polyak.study.coefficients import best_mix, curvature_of

SIZE = 600


def vectors(count=5, seed=0):
    numbers = np.random.default_rng(seed)
    base = numbers.normal(size=SIZE)
    return [base + scale * numbers.normal(size=SIZE) for scale in np.linspace(0.5, 1.2, count)]


def written(folder, arrays, suffix=".safetensors", dtype=torch.float32):
    paths = []
    for number, array in enumerate(arrays):
        state = {
            "layer.weight": torch.from_numpy(array[:400].reshape(20, 20).copy()).to(dtype),
            "layer.bias": torch.from_numpy(array[400:].copy()).to(dtype),
            "steps": torch.tensor(number),
        }
        path = folder / f"run-{'abcdefghij'[number]}{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        paths.append(path)
    return paths


def flat(state):
    parts = [state["layer.weight"].double().reshape(-1), state["layer.bias"].double()]
    return torch.cat(parts).numpy()


class Distance:
    """The squared distance to a target, and how often it was asked for."""

    minimize = True
    identity = "distance"

    def __init__(self, target, *, examples=False):
        self.target, self.examples, self.asked = target, examples, 0

    def __call__(self, state):
        self.asked += 1
        squares = (flat(state) - self.target) ** 2
        return torch.from_numpy(squares) if self.examples else float(squares.sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_greedy_is_that_of_the_paper(tmp_path, seed, suffix):
    arrays = vectors(6, seed)
    target = vectors(1, seed)[0] * 0 + np.mean(arrays[:4], axis=0) + 0.2
    arrays = [a.astype(np.float32).astype(np.float64) for a in arrays]
    paths = written(tmp_path, arrays, suffix)
    shuffled = random.Random(seed).sample(paths, len(paths))
    soup = make_soup(shuffled, tmp_path / f"soup{suffix}", Distance(target))
    chosen, mean = soups.greedy(arrays, lambda w: float(((w - target) ** 2).sum()))
    assert 1 < len(chosen) < 6
    taken = {one.path: one.coefficient for one in soup.ingredients}
    assert taken == {
        str(p): pytest.approx(1 / len(chosen) if n in chosen else 0) for n, p in enumerate(paths)
    }
    opened = open_checkpoint(tmp_path / f"soup{suffix}")
    state = {name: tensor.load() for name, tensor in opened.tensors.items()}
    assert np.abs(flat(state) - mean).max() < 3e-7 * np.abs(mean).max()
    assert state["steps"].item() == chosen[-1]
    assert soup.score == pytest.approx(float(((mean - target) ** 2).sum()), rel=1e-5)
    assert soup.evaluations == 11


def test_what_does_not_lower_the_score_is_added(tmp_path):
    array = vectors(1)[0]
    paths = written(tmp_path, [array, array, array + 1])
    soup = make_soup(paths, tmp_path / "soup.pt", Distance(array))
    assert [one.coefficient for one in soup.ingredients] == [0.5, 0.5, 0]
    torch.testing.assert_close(
        torch.load(tmp_path / "soup.pt")["layer.bias"], load_file(paths[0])["layer.bias"], rtol=0, atol=0
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_running_means_do_not_round_to_the_inputs_dtype(tmp_path, dtype):
    arrays = vectors(7, 3)
    paths = written(tmp_path, arrays, ".pt", dtype)
    stored = [flat(torch.load(path)) for path in paths]
    make_soup(paths, tmp_path / "soup.pt", lambda state: 1.0, minimize=True)
    found = torch.load(tmp_path / "soup.pt")
    assert found["layer.weight"].dtype == dtype
    exact = np.mean(stored, axis=0)
    limit = torch.finfo(dtype).eps / 2 + 3e-7 * (dtype != torch.float64)
    assert (np.abs(flat(found) - exact) / np.abs(exact).clip(1e-2)).max() <= max(limit, 1e-14)


def test_every_ingredient_is_read_twice_and_nothing_is_left_beside(tmp_path, monkeypatch):
    numbers = np.random.default_rng(0)
    paths = []
    for name in "abcd":
        paths.append(tmp_path / f"{name}.safetensors")
        weights = torch.from_numpy(numbers.normal(size=(1000, 1000)).astype(np.float32))
        save_file({"w": 1 + 0.1 * weights}, paths[-1])
    bytes_read = collections.Counter()
    original = LocalFile.read_into

    def counting(self, offset, buffer):
        bytes_read[self.path] += len(buffer)
        original(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "read_into", counting)
    soup = make_soup(
        paths, tmp_path / "soup.safetensors", lambda state: float(state["w"].var()), minimize=True
    )
    assert soup.reads == 2
    for (
        path
    ) in paths:  # and the samples by which ingredients are told apart, and unrelated ones are found
        assert 2 <= bytes_read[str(path)] / 4e6 < 2.02
    assert sum(one.coefficient > 0 for one in soup.ingredients) == 4
    assert {path.name for path in tmp_path.iterdir()} == {
        *(path.name for path in paths), "soup.safetensors", ".scores",
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_learned_coefficients_are_exact_where_the_model_is(tmp_path, seed):
    numbers = np.random.default_rng(seed)
    arrays = [a.astype(np.float32).astype(float) for a in vectors(5, seed)]
    target = numbers.dirichlet(np.ones(5) / 2) @ arrays + 0.1 * numbers.normal(size=SIZE)
    paths = written(tmp_path, arrays)
    soup = make_soup(paths, tmp_path / "soup.pt", Distance(target), method="learned")
    wanted = soups.nearest_mix(arrays, target)
    taken = {one.path: one.coefficient for one in soup.ingredients}
    assert [taken[str(path)] for path in paths] == pytest.approx(wanted, abs=1e-4)
    exact = np.array(wanted) @ arrays
    assert np.abs(flat(torch.load(tmp_path / "soup.pt")) - exact).max() < 2e-4


@pytest.mark.parametrize("seed", range(20))
def test_the_best_mix_is_that_of_every_support(seed):
    numbers = np.random.default_rng(seed)
    points, target, curvature = numbers.normal(size=(6, 4)), numbers.normal(size=4), 0.7
    losses = [curvature / 2 * np.sum((p - target) ** 2) + 3 for p in points]
    distances = ((points[:, None] - points) ** 2).sum(-1)
    found = best_mix(losses, distances, curvature)
    nearest = np.array(soups.nearest_mix(points, target))
    assert np.linalg.norm(np.array(found) @ points - nearest @ points) < 1e-5
    mix = numbers.dirichlet(np.ones(6))
    loss = curvature / 2 * np.sum((mix @ points - target) ** 2) + 3
    assert curvature_of(losses, distances, mix, loss) == pytest.approx(curvature)


def test_a_mix_of_equal_ingredients_is_one_of_them():
    assert best_mix([1.0, 1.0], np.zeros((2, 2)), 1.0) == (1.0, 0.0)
    assert curvature_of([1.0, 1.0], np.zeros((2, 2)), (0.5, 0.5), 1.0) == 0.0


def share_of_the_mean(base, paths):
    """What Model Stock takes of it, over all values."""
    start, runs = torch.load(base), [load_file(path) for path in paths]
    shares = [
        start[name].numel() * combining.stock_share(start[name], [run[name] for run in runs])
        for name in ("layer.weight", "layer.bias")
    ]
    return sum(shares) / SIZE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scored", [True, False])
def test_uniform_and_model_stock_are_those_of_the_average(tmp_path, dtype, scored):
    paths = written(tmp_path, vectors(3), dtype=dtype)
    (base,) = written(tmp_path / "..", [vectors(4)[3]], ".pt", dtype)
    evaluate = Distance(0.0) if scored else None
    make_soup(paths, tmp_path / "uniform.pt", evaluate, method="uniform")
    stock = make_soup(paths, tmp_path / "stock.pt", evaluate, method="model-stock", base=base)
    exact = share_of_the_mean(base, paths)
    assert stock.ingredients[0].coefficient == pytest.approx(exact / 3)
    assert f"Model Stock: {exact:.1%} of the mean of the inputs" in str(stock)
    thirds = [1 / 3] * 3
    average_checkpoints(paths, {tmp_path / "mean.pt": thirds})
    average_checkpoints(paths, tmp_path / "by-engine.pt", method=ModelStock(), base=base)
    for ours, theirs in (("uniform", "mean"), ("stock", "by-engine")):
        found, expected = torch.load(tmp_path / f"{ours}.pt"), torch.load(tmp_path / f"{theirs}.pt")
        torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


def test_the_comparison_is_on_examples_that_did_not_choose(tmp_path):
    arrays = vectors(4, 1)
    target = np.mean(arrays, axis=0)
    paths = written(tmp_path, arrays)
    soup = make_soup(paths, tmp_path / "soup.pt", Distance(target, examples=True))
    assert soup.examples == (300, 300)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))[:300].numpy()
    made, best = flat(torch.load(tmp_path / "soup.pt")), flat(load_file(soup.ingredients[0].path))
    difference = ((made - target) ** 2 - (best - target) ** 2)[order]
    assert soup.comparison.difference == pytest.approx(difference.mean(), rel=1e-4)
    assert soup.comparison.low < soup.comparison.difference < soup.comparison.high < 0
    assert "Chosen on 300 examples, compared on 300 others" in str(soup)


def test_scores_are_kept_by_content(tmp_path):
    paths = written(tmp_path, vectors(4, 1))
    evaluate = Distance(vectors(1, 1)[0])
    first = make_soup(paths, tmp_path / "soup.pt", evaluate)
    asked = evaluate.asked
    again = make_soup(paths, tmp_path / "again.pt", evaluate)
    assert (evaluate.asked, again.evaluations, again.cached) == (asked, 0, 7)
    assert (tmp_path / "soup.pt").read_bytes() == (tmp_path / "again.pt").read_bytes()
    assert again.ingredients == first.ingredients
    changed = load_file(paths[2])
    changed["layer.bias"][0] += 1
    save_file(changed, paths[2])
    make_soup(paths, tmp_path / "changed.pt", evaluate)
    assert asked < evaluate.asked <= asked + 1 + 3
    make_soup(paths, tmp_path / "uncached.pt", Distance(vectors(1, 1)[0]), cache=False)


def test_scores_of_part_of_the_tensors_are_others(tmp_path):
    paths = written(tmp_path, vectors(3, 1))
    evaluate = Distance(0.0)
    make_soup(paths, tmp_path / "whole.pt", evaluate, method="uniform")
    soup = make_soup(
        paths, tmp_path / "part.pt", evaluate, method="uniform", include=["layer.bias"]
    )
    assert (soup.cached, soup.evaluations) == (3, 1)
    newest = load_file(paths[-1])
    assert torch.equal(torch.load(tmp_path / "part.pt")["layer.weight"], newest["layer.weight"])


@pytest.mark.parametrize("change", ["exclude", "base"])
def test_what_another_soup_left_behind_is_not_taken_for_this_one(tmp_path, change):
    """What a killed process leaves, its mixes and its scores, counts for the same soup only."""
    *paths, base, other = written(tmp_path, vectors(5, 1))
    options = {
        "exclude": [{}, {"exclude": ["*.bias"]}],
        "base": [{"method": "model-stock", "base": one} for one in (base, other)],
    }[change]

    class Killed(Distance):
        def __call__(self, state):
            if self.asked == 3:  # the folder of mixes is as a killed process leaves it
                shutil.copytree(tmp_path / ".soup.pt.soup", tmp_path / "left")
            return super().__call__(state)

    make_soup(paths, tmp_path / "soup.pt", Killed(0.0), cache=False, **options[0])
    (tmp_path / "left").rename(tmp_path / ".soup.pt.soup")
    make_soup(paths, tmp_path / "first.pt", Distance(0.0), **options[0])
    found = make_soup(paths, tmp_path / "soup.pt", Distance(0.0), overwrite=True, **options[1])
    fresh = make_soup(paths, tmp_path / "fresh.pt", Distance(0.0), cache=False, **options[1])
    assert (tmp_path / "soup.pt").read_bytes() == (tmp_path / "fresh.pt").read_bytes()
    assert (found.score, found.cached) == (fresh.score, len(paths))


def test_an_evaluation_that_fails_leaves_its_scores_and_no_more(tmp_path):
    paths = written(tmp_path, vectors(4, 1))
    evaluate = Distance(vectors(1, 1)[0])

    class Failing(Distance):
        def __call__(self, state):
            if self.asked == 5:
                raise RuntimeError("out of luck")
            return super().__call__(state)

    with pytest.raises(
        UsageError, match=r"out of luck.*\n?.*5 scores are kept: the same soup continues"
    ):
        make_soup(paths, tmp_path / "soup.pt", Failing(vectors(1, 1)[0]))
    assert {path.name for path in tmp_path.iterdir()} == {*(p.name for p in paths), ".scores"}
    soup = make_soup(paths, tmp_path / "soup.pt", evaluate)
    assert (soup.evaluations, soup.cached) == (2, 5)


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def test_batchnorm_statistics_are_those_of_the_soup(tmp_path):
    torch.manual_seed(0)
    base, paths = Net(), []
    for number in range(3):
        other = Net()
        other.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        other[1].running_mean.fill_(number)
        paths.append(tmp_path / f"{'abc'[number]}.pt")
        torch.save(other.state_dict(), paths[-1])
    data = [torch.randn(8, 3) for _ in range(4)]
    model = Net()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []

    def evaluate(model):
        seen.append(model[1].running_mean.clone())
        return -float(len(seen))

    make_soup(paths, tmp_path / "soup.pt", evaluate, model=model, data=data, minimize=True)
    assert [float(mean[0]) for mean in seen[:3]] == [0, 1, 2]  # an ingredient's are its own
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    found = torch.load(tmp_path / "soup.pt")
    check = Net()
    check.load_state_dict(found)
    polyak.update_bn(check, data)
    torch.testing.assert_close(check[1].running_mean, found["1.running_mean"])
    torch.testing.assert_close(seen[-1], found["1.running_mean"])
    with open_checkpoint(tmp_path / "soup.pt") as opened:
        assert opened.metadata["batchnorm"] == "refreshed"
    with (
        pytest.warns(StaleStatistics, match="statistics of the last ingredient"),
        pytest.warns(StaleStatistics, match="Set them before use: polyak update-bn"),
    ):
        make_soup(paths, tmp_path / "stale.pt", lambda m: 0.0, model=model, minimize=True)
    with pytest.raises(ArgumentError, match="a folder, and BatchNorm statistics are set in files"):
        make_soup(paths, tmp_path / "folder", evaluate, model=model, data=data, minimize=True)


EVAL = (
    programs.READS
    + """
dtype, bias = read(sys.argv[1], "layer.bias")
open("asked", "a").write(sys.argv[1] + " " + dtype + "\\n")
print("score", sum(value * value for value in bias))
"""
)


def test_a_program_gets_files_of_the_form_of_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = written(tmp_path, vectors(3, 1), ".pt", torch.bfloat16)
    (tmp_path / "eval.py").write_text(EVAL)
    command = Command(f"{sys.executable} -I -S eval.py {{file}}")
    soup = make_soup(paths, "soup.safetensors", command, minimize=True)
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert len(asked) == 5
    assert all(path.endswith(".safetensors") for path, _ in asked)
    assert [dtype for _, dtype in asked] == ["BF16"] * 3 + ["F32"] * 2
    assert load_file("soup.safetensors")["layer.bias"].dtype == torch.bfloat16
    assert soup.reads == 2


@pytest.mark.parametrize(
    ("suffix", "wrapped"),
    [(".ckpt", lambda state: {"state_dict": state, "epoch": 3}), (".pt", lambda state: {"model": state})],
)  # fmt: skip
def test_a_program_that_reads_torch_files_can_read_all_of_them(tmp_path, suffix, wrapped):
    class Reads:
        takes_file = True

        def __call__(self, path):
            assert path.suffix == suffix
            return float(torch.load(path)["layer.bias"].double().square().sum())

    paths = written(tmp_path, vectors(3, 1), suffix)
    for path in paths:
        torch.save(wrapped(torch.load(path)), path)
    soup = make_soup(paths, tmp_path / f"soup{suffix}", Reads(), minimize=True)
    assert torch.load(tmp_path / f"soup{suffix}")["layer.bias"].shape == (200,)
    assert soup.reads <= 2


def test_the_output_says_what_it_is_made_of(tmp_path):
    paths = written(tmp_path, vectors(4, 1))
    make_soup(paths, tmp_path / "soup.safetensors", Distance(np.mean(vectors(4, 1), axis=0)))
    with open_checkpoint(tmp_path / "soup.safetensors") as opened:
        assert opened.metadata["profile"] == "greedy soup"
        assert opened.metadata["format"] == "pt"
        assert opened.metadata["inputs"].count('"weight": 0.25') == 4
    with pytest.raises(ArgumentError, match="would count twice"):
        make_soup([*paths, tmp_path / "soup.safetensors"], tmp_path / "again.pt", method="uniform")


def unlike(folder):
    paths = written(folder, vectors(2))
    save_file(
        {
            "layer.weight": torch.ones(20, 21),
            "layer.bias": torch.ones(200),
            "steps": torch.tensor(0),
        },
        paths[0],
    )
    return paths


def not_finite(folder):
    paths = written(folder, vectors(3))
    state = load_file(paths[1])
    state["layer.bias"][3] = float("inf")
    save_file(state, paths[1])
    return paths


def two(folder):
    return written(folder, vectors(2))


def written_thrice(folder):
    return written(folder, vectors(3))


def own_only(state):
    """NaN for what is the mean of several: the newest's count of steps, and other weights."""
    first = next(iter(vectors(3)))
    known = any(np.allclose(flat(state), v, atol=1e-5) for v in vectors(3))
    return float(np.square(flat(state) - first).sum()) if known else float("nan")


REFUSED = {
    "unlike shapes": (unlike, Distance(0.0), {}, MismatchError, r"layer.weight \(in .*F32 \[20, 2"),
    "weights that are not finite": (not_finite, lambda s: 1.0, {"minimize": True}, NonFiniteError, "run-b"),
    "a score that is NaN": (two, lambda s: float("nan"), {"minimize": True}, NonFiniteError, r"score of .*run-a.safetensors is nan"),
    "an infinite score": (two, lambda s: float("inf"), {"minimize": True}, NonFiniteError, "is inf"),
    "a mean that is NaN": (written_thrice, own_only, {"minimize": True, "method": "uniform"}, NonFiniteError, "the uniform soup is nan"),
    "one input": (lambda f: written(f, vectors(1)), Distance(0.0), {}, ArgumentError, "there is one"),
    "no input": (lambda f: [], Distance(0.0), {}, ArgumentError, "there are none"),
    "one twice": (lambda f: two(f)[:1] * 2, Distance(0.0), {}, ArgumentError, "Given twice"),
    "no evaluation": (two, None, {}, ArgumentError, "greedy soup is chosen by scores"),
    "nothing to learn from": (two, None, {"method": "learned"}, ArgumentError, "learned soup is chosen"),
    "an unknown method": (two, None, {"method": "broth"}, ArgumentError, "expected one of greedy, uni"),
    "a base for another method": (two, Distance(0.0), {"base": "b.pt"}, ArgumentError, "with model-stock only"),
    "no base": (two, Distance(0.0), {"method": "model-stock"}, ArgumentError, "Pass base=PATH"),
    "no direction": (two, lambda s: 1.0, {}, ArgumentError, "Pass minimize=True"),
    "another model": (two, Distance(0.0), {"model": nn.Linear(2, 2)}, MismatchError, "not a checkpoint of this model"),
    "no file": (lambda f: [f / "none.pt", f / "nothing.pt"], Distance(0.0), {}, ArgumentError, "There is no file or folder"),
    "a word for a score": (two, lambda s: "good", {"minimize": True}, ArgumentError, "expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_writes_nothing(tmp_path, case):
    prepare, evaluate, options, kind, message = REFUSED[case]
    paths = prepare(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(kind, match=message) as caught:
        make_soup(paths, tmp_path / "soup.pt", evaluate, **options)
    assert isinstance(caught.value, PolyakError)
    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".scores"}
    assert after == before


def test_inputs_are_not_replaced(tmp_path):
    paths = two(tmp_path)
    before = paths[0].read_bytes()
    evaluate = Distance(0.0)
    with pytest.raises(ArgumentError, match="is an input, or holds one"):
        make_soup(paths, paths[0], evaluate, overwrite=True)
    (tmp_path / "soup.pt").write_text("mine")
    with pytest.raises(OutputError, match=r"soup.pt exists"):
        make_soup(paths, tmp_path / "soup.pt", evaluate)
    assert (paths[0].read_bytes(), evaluate.asked) == (before, 0)
    make_soup(paths, tmp_path / "soup.pt", evaluate, overwrite=True)
    assert torch.load(tmp_path / "soup.pt")


def test_an_ingredient_whose_soup_has_no_finite_score_is_left_out(tmp_path):
    array = vectors(1)[0]
    paths = written(tmp_path, [array, array + 1])

    def evaluate(state):
        near = abs(flat(state) - array).max()
        return float("inf") if 0.1 < near < 0.9 else near

    soup = make_soup(paths, tmp_path / "soup.pt", evaluate, minimize=True)
    assert [one.coefficient for one in soup.ingredients] == [1, 0]
    assert "No other ingredient helped" in str(soup)


def test_runs_that_share_no_basin_are_told(tmp_path):
    paths = []
    for name in "ab":
        paths.append(tmp_path / f"{name}.safetensors")
        save_file({"w": torch.randn(64, 64)}, paths[-1])
    with pytest.warns(PolyakWarning, match="are unrelated"):
        make_soup(paths, tmp_path / "soup.pt", lambda s: 1.0, minimize=True)


def test_two_processes_do_not_make_one_output(tmp_path):
    paths = two(tmp_path)
    (tmp_path / ".soup.pt.soup").mkdir()
    held = os.open(tmp_path / ".soup.pt.soup", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="Another process is writing this output"):
        make_soup(paths, tmp_path / "soup.pt", Distance(0.0))
    os.close(held)
    make_soup(paths, tmp_path / "soup.pt", Distance(0.0))
    assert not (tmp_path / ".soup.pt.soup").exists()


@pytest.mark.parametrize("late", ["flock", "open"])
def test_a_process_that_ends_in_between_takes_nothing_from_this_one(tmp_path, monkeypatch, late):
    """It removes the hidden folder, before this process opens it or before it has the lock on it."""
    module = {"flock": fcntl, "open": os}[late]
    original, removed = getattr(module, late), []

    def removing(first, *more, **options):
        folder = tmp_path / ".soup.pt.soup"
        if not removed and folder.exists() and (late == "flock" or first == folder):
            removed.append(folder.rmdir())
        return original(first, *more, **options)

    monkeypatch.setattr(module, late, removing)
    make_soup(two(tmp_path), tmp_path / "soup.pt", Distance(0.0))
    assert len(removed) == 1
    assert (tmp_path / "soup.pt").exists()


@pytest.mark.parametrize("method", ["greedy", "uniform"])
def test_a_full_disk_is_told_without_an_option_that_there_is_not(tmp_path, method):
    paths = two(tmp_path)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(
            OutputError, match=r"File too large.*and make the soup again\.$"
        ) as caught:
            make_soup(paths, tmp_path / "soup.pt", Distance(0.0), method=method, cache=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "soup.pt").exists()
    make_soup(paths, tmp_path / "soup.pt", Distance(0.0), method=method)
