"""TIES, DARE, Model Stock and SLERP against their float64 twins, through the streaming engine."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch
from reference import combining
from safetensors.torch import load_file, save_file

from polyak.checkpoints import Dare, ModelStock, Slerp, Ties, average_checkpoints
from polyak.checkpoints.merging import measure
from polyak.checkpoints.merging.deltas import kept_at_random, parse_method, share_kept
from polyak.errors import ArgumentError, NonFiniteError

DELTAS = Path(__file__).parents[2] / "data" / "mergekit" / "deltas"
SHAPES = {"embedding": (997, 211), "w": (61, 7), "b": (61,), "scale": ()}
# 997 * 211 float32 values are more than one chunk, and none of these is a multiple of anything.


def runs(folder, count=3, dtype=torch.float32, shapes=SHAPES, noise=0.02):
    """A base and runs that began from it, with a part that all have changed alike; the paths."""
    torch.manual_seed(3)
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    shared = {name: torch.randn(shape) * noise for name, shape in shapes.items()}
    save_file({name: w.to(dtype) for name, w in base.items()}, folder / "base.safetensors")
    for i in range(count):
        run = {n: (w + shared[n] + noise * torch.randn(w.shape)).to(dtype) for n, w in base.items()}
        save_file(run, folder / f"run-{i}.safetensors")
    return folder / "base.safetensors", [folder / f"run-{i}.safetensors" for i in range(count)]


def made(folder, base, inputs, method, **options):
    average_checkpoints(inputs, folder / "out.safetensors", method=method, base=base, **options)
    return load_file(folder / "out.safetensors")


def close(found, base, inputs, twin, rtol=2e-6):
    states = [load_file(path) for path in inputs]
    start = {} if base is None else load_file(base)
    for name, tensor in found.items():
        expected = twin(name, start.get(name), [state[name] for state in states])
        torch.testing.assert_close(tensor.double(), expected, rtol=rtol, atol=2e-7)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 0.25)])
def test_ties_is_its_twin(tmp_path, density, weights):
    base, inputs = runs(tmp_path)
    found = made(tmp_path, base, inputs, Ties(density, 0.8, weights))
    close(found, base, inputs, lambda _, b, x: combining.ties(b, x, density, 0.8, weights))


@pytest.mark.parametrize("size", [1e-140, 1e-40, 0.3, 1e38])
@pytest.mark.parametrize("method", [Ties, lambda **given: Dare(0.5, elect=True, **given)])
def test_only_the_ratios_of_weights_count_where_they_are_divided_by_what_agrees(
    tmp_path, size, method
):
    base, inputs = runs(tmp_path, shapes={"w": (61, 7)})
    expected = made(tmp_path, base, inputs, method(weights=(2.0, 1.0, 0.5)))["w"]
    given = method(weights=(2 * size, size, size / 2))
    found = made(tmp_path, base, inputs, given, overwrite=True)["w"]
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-7)


def test_ties_trims_large_tensors_by_a_sample_to_the_same_values(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_SAMPLE", 4096)
    monkeypatch.setattr(measure, "_RUN", 64)
    monkeypatch.setattr(measure, "_PIECE", 5000)
    base, inputs = runs(tmp_path)
    for density in (0.0005, 0.2, 0.9995):
        found = made(tmp_path, base, inputs, Ties(density), overwrite=True)
        close(found, base, inputs, lambda _, b, x, k=density: combining.ties(b, x, k))


@pytest.mark.parametrize("changed", [0.0, 0.01, 0.5])
def test_ties_of_layers_that_hardly_changed(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(measure, "_SAMPLE", 2048)
    monkeypatch.setattr(measure, "_RUN", 32)
    base, inputs = runs(tmp_path, shapes={"w": (300, 301)})
    start = (load_file(base)["w"] * 256).round() / 256  # so that differences are exact
    save_file({"w": start}, base)
    for index, path in enumerate(inputs):
        torch.manual_seed(index)
        mask = torch.rand(start.shape) < changed
        # Equal magnitudes: many values are the smallest that is kept.
        save_file({"w": torch.where(mask, start + 0.25 * torch.randn(()).sign(), start)}, path)
    found = made(tmp_path, base, inputs, Ties(0.2))
    close(found, base, inputs, lambda _, b, x: combining.ties(b, x, 0.2))


@pytest.mark.parametrize("elect", [False, True])
def test_dare_is_its_twin(tmp_path, elect):
    base, inputs = runs(tmp_path)
    found = made(tmp_path, base, inputs, Dare(0.3, 1.5, elect=elect, seed=7))

    def twin(name, start, states):
        masks = [
            kept_at_random(7, name, i + 1, 0, start.numel(), 0.3).reshape(start.shape)
            for i in range(len(states))
        ]
        return combining.dare(start, states, masks, share_kept(0.3), 1.5, elect=elect)

    close(found, base, inputs, twin, rtol=5e-6)


def test_dare_keeps_what_it_says_at_random():
    """Of 10^6 values; a share of 0.3 is off by more than 0.0023 once in 2 million seeds (5 sigma)."""
    kept = kept_at_random(1, "w", 1, 0, 1_000_000, 0.3)
    assert abs(kept.double().mean().item() - 0.3) < 0.0023
    assert abs(share_kept(0.3) / 0.3 - 1) < 2e-5
    for density in (0.3, 1e-3):  # of 16 and of 32 bits
        whole = kept_at_random(1, "w", 1, 0, 20_000, density)
        for begin in range(12_345, 12_350):
            part = kept_at_random(1, "w", 1, begin, 1_000, density)
            assert torch.equal(part, whole[begin : begin + 1_000])
    for other in ((2, "w", 1), (1, "v", 1), (1, "w", 2)):
        again = kept_at_random(*other, 0, 1_000_000, 0.3)
        assert abs((kept * again).double().mean().item() - 0.09) < 0.0015
    assert kept_at_random(1, "w", 1, 0, 1000, 1.0).all()
    few = kept_at_random(1, "w", 1, 0, 1_000_000, 1e-3).double().mean().item()
    assert abs(few - 1e-3) < 1.6e-4  # 5 sigma
    assert share_kept(1e-3) == pytest.approx(1e-3, rel=1e-6)


def test_model_stock_is_its_twin(tmp_path):
    base, inputs = runs(tmp_path)
    close(
        made(tmp_path, base, inputs, ModelStock()),
        base,
        inputs,
        lambda _, b, x: combining.model_stock(b, x),
    )


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("shape", [(7,), (1000, 300)])
def test_angles_of_tensors_of_any_size(tmp_path, size, shape):
    """In float32 the squares of the first are 0, and those of the last infinite."""
    base, inputs = runs(tmp_path, shapes={"w": shape}, noise=0.5)
    for path in (base, *inputs):
        save_file({"w": load_file(path)["w"] * size}, path)
    states = [load_file(path)["w"] for path in inputs]
    start = load_file(base)["w"]
    stock = made(tmp_path, base, inputs, ModelStock(), overwrite=True)["w"].double()
    between = made(tmp_path, None, inputs[:2], Slerp(0.3), overwrite=True)["w"].double()
    twins = combining.model_stock(start, states), combining.slerp(None, states[:2], 0.3)
    for found, twin in zip((stock, between), twins, strict=True):
        assert ((found - twin).abs().max() / twin.abs().max()).item() < 5e-7


def off_by(rows):
    """How far the products of rows are from exact ones, as a share of the product of two norms."""
    exact = rows.double() @ rows.double().T
    norms = exact.diagonal().sqrt()
    found = torch.from_numpy(measure._products(rows))
    return ((found - exact) / (norms[:, None] * norms)).abs().max().item()


@pytest.mark.parametrize("inputs", [4, 32])
@pytest.mark.parametrize("values", [300, 512, 1000, 4096, 65_000])
def test_products_are_as_near_as_they_say(inputs, values):
    torch.manual_seed(0)
    sizes = torch.tensor([1.0, 1e-4, 1e4, 0.3]).repeat(inputs // 4)[:, None]
    for shift in (0.0, 1.0):  # of one sign, errors do not cancel
        assert off_by(torch.randn(inputs, values) * sizes + shift) < 3e-7


@pytest.fixture
def precisions():
    """What torch was told about products of float32, as it was before."""
    places = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    yield
    torch.set_float32_matmul_precision("highest")
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


def by_old_name():
    torch.set_float32_matmul_precision("medium")


def by_backend():  # after which get_float32_matmul_precision raises
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def for_all():
    torch.backends.fp32_precision = "bf16"


@pytest.mark.parametrize("told", [by_old_name, by_backend, for_all])
def test_products_do_not_depend_on_what_a_program_told_torch(precisions, told):
    """CPUs with instructions for bfloat16 multiply in that then."""
    torch.manual_seed(0)
    rows = torch.randn(3, 65_000)
    assert measure._multiplies_exactly()
    told()
    assert not measure._multiplies_exactly()
    assert off_by(rows) < 3e-7


def test_model_stock_says_how_much_of_the_mean_it_took(tmp_path):
    base, inputs = runs(tmp_path)
    outputs = {tmp_path / "stock.pt": ModelStock(), tmp_path / "mean.pt": Dare(1.0)}
    found, none = average_checkpoints(inputs, outputs, base=base).stock
    start, states = load_file(base), [load_file(path) for path in inputs]
    shares = {n: combining.stock_share(w, [one[n] for one in states]) for n, w in start.items()}
    values = {name: w.numel() for name, w in start.items()}
    whole = sum(shares[name] * values[name] for name in start) / sum(values.values())
    assert none is None
    assert found.average == pytest.approx(whole, rel=1e-6)
    assert (found.least, found.most) == pytest.approx((min(shares.values()), max(shares.values())))


def test_model_stock_of_runs_that_part_is_the_base(tmp_path):
    base, inputs = runs(tmp_path, count=2, shapes={"w": (40, 50)})
    start = load_file(base)["w"]
    step = 0.1 * torch.randn(40, 50)
    for sign, path in zip((1, -1), inputs, strict=True):
        save_file({"w": start + sign * step}, path)
    torch.testing.assert_close(made(tmp_path, base, inputs, ModelStock())["w"], start)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_base", [False, True])
def test_slerp_is_its_twin(tmp_path, t, with_base):
    base, inputs = runs(tmp_path, count=2, noise=0.5)
    base = base if with_base else None
    found = made(tmp_path, base, inputs, Slerp(t))
    if not with_base:
        del found["scale"]  # one number has no angle
    close(
        {n: x for n, x in found.items() if n != "scale"},
        base,
        inputs,
        lambda _, b, x: combining.slerp(b, x, t),
    )


def test_slerp_of_equal_or_opposite_inputs_is_linear(tmp_path):
    save_file(
        {"w": torch.ones(3), "z": torch.zeros(3), "o": torch.ones(3)}, tmp_path / "a.safetensors"
    )
    save_file(
        {"w": torch.ones(3), "z": torch.zeros(3), "o": -torch.ones(3)}, tmp_path / "b.safetensors"
    )
    inputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    found = made(tmp_path, None, inputs, Slerp(0.25))
    assert found["w"].tolist() == [1, 1, 1]
    assert found["z"].tolist() == [0, 0, 0]
    assert found["o"].tolist() == [0.5] * 3


METHODS = [Ties(0.3), Dare(0.5, seed=1), Dare(0.5, elect=True), ModelStock()]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_threads_parts_and_neighbours_change_nothing(tmp_path, method):
    base, inputs = runs(tmp_path)
    outputs = [tmp_path / f"{name}.safetensors" for name in "abc"]
    average_checkpoints(inputs, outputs[0], method=method, base=base, threads=1)
    average_checkpoints(
        inputs, {outputs[1]: method, tmp_path / "x.pt": [0.1, 0.2, 0.3]}, base=base, threads=4
    )
    for part in ("2/2", "1/2"):
        done = average_checkpoints(inputs, outputs[2], method=method, base=base, part=part)
    assert done.published
    first, *others = [load_file(path) for path in outputs]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    base, inputs = runs(tmp_path, dtype=dtype)
    found = made(tmp_path, base, inputs, Ties(0.4), dtype="float64")
    close(found, base, inputs, lambda _, b, x: combining.ties(b, x, 0.4))
    again = made(tmp_path, base, inputs, ModelStock(), dtype="float32", overwrite=True)
    close(again, base, inputs, lambda _, b, x: combining.model_stock(b, x))


def test_what_is_not_averaged_is_the_newest_s(tmp_path):
    base, inputs = runs(tmp_path)
    for index, path in enumerate([base, *inputs]):
        save_file({**load_file(path), "steps": torch.tensor(index)}, path)
    found = made(tmp_path, base, inputs, Ties(), exclude=["w"])
    newest = load_file(inputs[-1])
    assert found["steps"] == 3
    assert torch.equal(found["w"], newest["w"])
    assert not torch.equal(found["b"], newest["b"])


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named(tmp_path, method, bad):
    base, inputs = runs(tmp_path)
    broken = load_file(inputs[1])
    broken["embedding"][500, 100] = bad
    save_file(broken, inputs[1])
    with pytest.raises(NonFiniteError, match=r"embedding of .*run-1"):
        made(tmp_path, base, inputs, method)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("method", [*METHODS, Slerp(0.3)], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["base", "run-0", "run-1"])
def test_what_is_not_finite_is_named_where_only_two_runs_have_an_angle(
    tmp_path, method, bad, where
):
    base, inputs = runs(tmp_path, count=2, shapes={"w": (31, 7), "b": ()})
    path = tmp_path / f"{where}.safetensors"
    save_file({**load_file(path), "b": torch.tensor(bad)}, path)
    with pytest.raises(NonFiniteError, match=rf"b of .*{where}"):
        made(tmp_path, base, inputs, method)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "method",
    [Ties(scale=1e28), Dare(1e-12, 1e28), Dare(0.02, -1e28), Dare(1e-9, 1e28, elect=True)],
    ids=repr,
)
def test_any_scale_that_is_allowed_gives_an_average_or_says_that_it_is_too_large(tmp_path, method):
    base, inputs = runs(tmp_path, noise=1e-12)
    with contextlib.suppress(NonFiniteError):
        made(tmp_path, base, inputs, method)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ties", Ties()),
        ("ties:density=0.3,scale=0.5,weights=1/2/3", Ties(0.3, 0.5, (1.0, 2.0, 3.0))),
        ("dare:density=0.1,seed=4,elect=true", Dare(0.1, elect=True, seed=4)),
        ("model-stock", ModelStock()),
        ("slerp:t=0.25", Slerp(0.25)),
    ],
)
def test_as_text(text, expected):
    assert parse_method(text) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ties(0), "density is 0"),
        (lambda: Ties(1.5), "density is 1.5"),
        (lambda: Ties(scale=math.nan), "scale"),
        (lambda: Ties(scale=1e29), "scale is 1e[+]29; expected a number from -1e[+]28"),
        (lambda: Dare(0.5, -math.inf), "scale is -inf"),
        (lambda: parse_method("dare:density=0.5,scale=1e300"), "scale is 1e[+]300"),
        (lambda: Ties(weights=(1, -1)), "not negative"),
        (lambda: Dare(0.5, weights=(0, 0)), "one above 0"),
        (lambda: Dare(0.5, seed=-1), "seed is -1"),
        (lambda: Slerp(1.5), "t is 1.5"),
        (lambda: parse_method("dare"), "needs density"),
        (lambda: parse_method("ties:0.5"), "Name the parameter"),
    ],
)
def test_what_makes_no_sense(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_what_does_not_fit_the_inputs(tmp_path):
    base, inputs = runs(tmp_path, shapes={"w": (5, 4)})
    for method, start, given, message in [
        (Ties(), None, inputs, "Pass base="),
        (ModelStock(), None, inputs, "Pass base="),
        (ModelStock(), base, inputs[:1], "there is one input"),
        (Slerp(), base, inputs, "SLERP is of two inputs; there are 3"),
        (Ties(weights=(1, 2)), base, inputs, "2 weights for 3 inputs"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            made(tmp_path, start, given, method)
    assert sorted(tmp_path.iterdir()) == sorted([base, *inputs])


WEIGHTS = (0.5, 1.0, 0.25)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ties", Ties(0.2, 0.8, WEIGHTS)),
        ("dare_ties", Dare(1.0, weights=WEIGHTS, elect=True)),
        ("dare_linear", Dare(1.0, weights=WEIGHTS)),
        ("model_stock", ModelStock()),
        ("slerp", Slerp(0.3)),
    ],
)
def test_the_same_as_mergekit(tmp_path, name, method):
    """Made by mergekit 0.1.5 (scripts/make_mergekit_golden.py), which lerps where cosines exceed 0.9995."""
    made_there = load_file(DELTAS / f"{name}.safetensors")
    runs = [DELTAS / f"run-{i}.safetensors" for i in range(2 if name == "slerp" else 3)]
    base = None if name == "slerp" else DELTAS / "base.safetensors"
    found = made(tmp_path, base, runs, method)
    assert found.keys() == made_there.keys()
    for tensor in found:
        tolerance = 1e-4 if name == "slerp" and "norm" in tensor else 3e-7
        torch.testing.assert_close(found[tensor], made_there[tensor], rtol=0, atol=tolerance)
