"""The spread of the inputs of a merge, and times in tokens."""

from __future__ import annotations

import json
import math

import pytest
import torch

from polyak import Window, average_checkpoints, open_checkpoint
from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.prepare import prepared
from polyak.checkpoints.merging.spread import spread_of
from polyak.checkpoints.merging.units import number_in_name
from polyak.errors import ArgumentError, PolyakWarning


def save(folder, *networks, names=None):
    paths = [folder / (names[i] if names else f"step-{i + 1}.pt") for i in range(len(networks))]
    for path, network in zip(paths, networks, strict=True):
        torch.save(network, path)
    return paths


def spread(paths, weights=None):
    method = weights or [1 / len(paths)] * len(paths)
    with prepared(paths, {"memory://x.safetensors": method}, MergeOptions(normalize=True)) as merge:
        return spread_of(merge)


def networks(count, noise, shapes=((64, 64), (96, 64), (64,))):
    torch.manual_seed(0)
    base = {f"w{i}": torch.randn(*shape) for i, shape in enumerate(shapes)}
    return [
        {name: value + noise * torch.randn_like(value) for name, value in base.items()}
        for _ in range(count)
    ]


def exact(networks, weights):
    """Obvious twin: over all values of the matrices, nothing sampled."""
    flat = [
        torch.cat([v.flatten() for v in one.values() if v.dim() > 1]).double() for one in networks
    ]
    mean = sum(w * x for w, x in zip(weights, flat, strict=True))
    apart = sum(w * (x - mean).square().sum() for w, x in zip(weights, flat, strict=True))
    return math.sqrt(apart / mean.square().sum())


@pytest.mark.parametrize("weights", [[0.25] * 4, [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.0, 0.0]])
@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_the_spread_is_that_of_all_values(tmp_path, weights, noise):
    found = networks(4, noise)
    sampled = spread(save(tmp_path, *found), weights)
    assert sampled.relative[0] == pytest.approx(exact(found, weights), rel=0.03)
    assert sampled.cosine == pytest.approx(1 / (1 + noise**2), abs=0.03)


def test_runs_that_were_initialised_apart_are_told(tmp_path):
    apart = [networks(1, 0.0)[0], {k: torch.randn_like(v) for k, v in networks(1, 0)[0].items()}]
    paths = save(tmp_path, *apart, apart[0])
    assert abs(spread(paths).cosine) < 0.1
    with pytest.warns(PolyakWarning, match=r"step-1.pt and .*step-2.pt are unrelated \(cosine"):
        average_checkpoints(paths, tmp_path / "out.pt")


def test_small_or_equal_or_strange_tensors_tell_nothing(tmp_path):
    torch.manual_seed(1)
    small = [{"w": torch.randn(5, 5), "zero": torch.zeros(50, 50)} for _ in range(2)]
    assert spread(save(tmp_path, *small)).cosine == 1
    same = networks(2, 0.0)
    assert spread(save(tmp_path, *same)).relative[0] == pytest.approx(0, abs=1e-6)
    broken = [*same, {k: torch.full_like(v, float("nan")) for k, v in same[0].items()}]
    assert spread(save(tmp_path, *broken)) is None
    assert spread(save(tmp_path, same[0])) is None


NAMES = ["a-step10-tokens1B.pt", "b-step20-tokens3B.pt", "c-step30-tokens4.5B.pt"]


def test_a_profile_counts_tokens_of_the_names(tmp_path):
    paths = save(tmp_path, *networks(3, 0.01), names=NAMES)
    window = {"method": Window(2e9), "steps_unit": "tokens"}
    done = average_checkpoints(reversed(paths), tmp_path / "out.safetensors", **window)
    assert done.inputs == tuple(map(str, paths))
    assert done.weights[0].unit == "tokens"
    assert done.weights[0].coefficients == pytest.approx((0, 0.25, 0.75))
    with open_checkpoint(tmp_path / "out.safetensors") as opened:
        assert opened.metadata["time"] == "4500000000"
        assert opened.metadata["step"] == "30"
        assert json.loads(opened.metadata["tokens of inputs"]) == [1e9, 3e9, 4.5e9]
    with pytest.raises(
        ArgumentError, match=r"The samples of .* are unknown: its name does not say"
    ):
        average_checkpoints(paths, tmp_path / "x.pt", steps_unit="samples")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_or_of_a_table_by_step(tmp_path, suffix):
    rows = [(1, 100), (2, 300), (3, 450)]
    table = tmp_path / f"table.{suffix}"
    if suffix == "csv":
        table.write_text("step,tokens\n" + "".join(f"{a},{b}\n" for a, b in rows))
    else:
        table.write_text("".join(json.dumps({"step": a, "tokens": b}) + "\n" for a, b in rows))
    paths = save(tmp_path, *networks(3, 0.01))
    done = average_checkpoints(
        paths, tmp_path / "o.pt", method="window:length=200", steps_from=table
    )
    assert done.weights[0].coefficients == pytest.approx((0, 0.25, 0.75))
    table.write_text(table.read_text().replace("450", "300"))
    with pytest.raises(ArgumentError, match="Two inputs have the same time: tokens"):
        average_checkpoints(paths, tmp_path / "p.pt", method="window:length=200", steps_from=table)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stage1-step1000-tokens42B", 42e9), ("tokens=1.5T", 1.5e12), ("3000_tokens.pt", 3000),
        ("token-500k/model.safetensors", 5e5), ("step-100", None), ("mytokens5", None), ("7B-step-3", None),
    ],
)  # fmt: skip
def test_numbers_beside_the_unit(name, expected):
    assert number_in_name(f"run/{name}", "tokens") == expected
