"""What `diff` says of two checkpoints, held against torch in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from polyak.checkpoints.diff import Distance, diff_checkpoints
from polyak.cli.app import run


def saved(path, **tensors):
    torch.save(tensors, path)
    return path


def test_distances_are_those_of_float64(tmp_path):
    torch.manual_seed(2)
    a, b = torch.randn(300_001), torch.randn(300_001)
    found = diff_checkpoints(saved(tmp_path / "a.pt", w=a), saved(tmp_path / "b.pt", w=b))
    entry, d = found.distances["w"], (b.double() - a.double())
    assert entry.l2 == pytest.approx(float(d.norm()), rel=1e-12)
    assert entry.relative == pytest.approx(float(d.norm() / a.double().norm()), rel=1e-12)
    assert entry.largest == float(d.abs().max())
    cosine = float(torch.dot(a.double(), b.double()) / a.double().norm() / b.double().norm())
    assert entry.degrees == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-9)
    assert entry.unequal == int((a != b).sum())


def test_tiny_angles_keep_their_digits(tmp_path):
    a = torch.zeros(1000, dtype=torch.float64)
    b = a.clone()
    a[0] = b[0] = 1.0
    b[1] = 1e-9
    found = diff_checkpoints(saved(tmp_path / "a.pt", w=a), saved(tmp_path / "b.pt", w=b))
    assert found.distances["w"].degrees == pytest.approx(math.degrees(1e-9), rel=1e-12)


def test_formats_may_differ_and_ties_count_once(tmp_path):
    w = torch.randn(3, 4)
    torch.save({"model": {"b": w.t().contiguous().t(), "n": torch.tensor(3)}}, tmp_path / "a.pt")
    save_file({"b": w, "n": torch.tensor(3)}, tmp_path / "b.safetensors")
    assert diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.safetensors", key_a="model").same
    torch.save({"a": w, "b": w}, tmp_path / "tied.pt")
    assert len(diff_checkpoints(tmp_path / "tied.pt", tmp_path / "tied.pt").distances) == 1


def test_everything_that_can_differ_is_told(tmp_path):
    a = saved(
        tmp_path / "a.pt", x=torch.ones(2), s=torch.ones(2), d=torch.ones(3), only=torch.ones(1)
    )
    b = saved(tmp_path / "b.pt", x=torch.ones(2), s=torch.ones(3), d=torch.ones(3).half())
    found = diff_checkpoints(a, b)
    assert (found.only_a, found.only_b) == (("only",), ())
    assert found.shapes == {"s": ((2,), (3,))}
    assert found.dtypes == {"d": ("F32", "F16")}
    assert found.distances.keys() == {"x", "d"}
    assert not found.same
    assert found.total.unequal == 0


def test_nan_and_infinity(tmp_path):
    bad = torch.tensor([torch.nan, torch.inf, 1.0])
    path = saved(tmp_path / "a.pt", w=bad)
    assert diff_checkpoints(path, path).same
    other = saved(tmp_path / "b.pt", w=torch.tensor([0.0, torch.inf, 1.0]))
    found = diff_checkpoints(path, other)
    assert found.distances["w"].unequal == 1
    assert math.isnan(found.distances["w"].l2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16, torch.bool, torch.float8_e4m3fn])
def test_dtypes_without_floats(tmp_path, dtype):
    a, b = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 1, 1]).to(dtype)
    found = diff_checkpoints(saved(tmp_path / "a.pt", w=a), saved(tmp_path / "b.pt", w=b))
    assert found.distances["w"].unequal == 1


def test_integers_above_2_53_are_compared_exactly(tmp_path):
    a, b = torch.tensor([2**53]), torch.tensor([2**53 + 1])
    found = diff_checkpoints(saved(tmp_path / "a.pt", w=a), saved(tmp_path / "b.pt", w=b))
    assert not found.same


def test_zero_vectors():
    assert Distance().relative == 0.0
    assert math.isnan(Distance().degrees)
    assert Distance(unequal=1, squared=4.0, squared_b=4.0).relative == math.inf


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.integers(1, 7))
def test_distances_of_parts_add_up(values, cut):
    def of(numbers):
        return Distance(largest=max(numbers, default=0.0), squared=sum(x * x for x in numbers))

    whole, parts = of(values), of(values[:cut]) + of(values[cut:])
    assert parts.squared == pytest.approx(whole.squared)


def test_command_exits_like_diff(tmp_path, capsys):
    a = saved(tmp_path / "a.pt", w=torch.ones(2), v=torch.ones(2))
    b = saved(tmp_path / "b.pt", w=torch.zeros(2), v=torch.ones(2), extra=torch.ones(1))
    assert run(["diff", str(a), str(a)]) == 0
    assert run(["diff", str(a), str(a), "--all"]) == 0
    assert run(["diff", str(a), str(b)]) == 1
    shown = capsys.readouterr().out
    assert f"only in {b}: extra" in shown
    assert "1 of 2 compared tensors differ" in shown
    assert run(["diff", str(a), str(tmp_path / "none")]) == 2
    assert "no file or folder" in capsys.readouterr().err


def test_files_with_nothing_in_common_are_said_to_be_so(tmp_path, capsys):
    a = saved(tmp_path / "a.pt", w=torch.ones(2))
    for other in ({"v": torch.ones(2)}, {"w": torch.ones(3)}, {"w": torch.ones(2).cfloat()}):
        assert run(["diff", str(a), str(saved(tmp_path / "b.pt", **other)), "--all"]) == 1
        shown = capsys.readouterr().out
        assert "No values were compared" in shown
        assert "compared tensors" not in shown
        assert "nan" not in shown


def test_an_angle_that_is_not_there_is_not_shown_as_a_number(tmp_path, capsys):
    a = saved(tmp_path / "a.pt", w=torch.zeros(2))
    assert run(["diff", str(a), str(saved(tmp_path / "b.pt", w=torch.ones(2)))]) == 1
    shown = capsys.readouterr().out
    assert "nan" not in shown
    assert " - " in shown
