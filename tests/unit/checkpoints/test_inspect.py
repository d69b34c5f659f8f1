"""What `inspect` says, as a function and on the command line."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from polyak.checkpoints.inspect import inspect_checkpoint
from polyak.cli.app import run


@pytest.fixture
def file(tmp_path):
    state = {
        "layer.weight": torch.tensor([[3.0, 4.0], [torch.nan, torch.inf]]),
        "layer.bias": torch.ones(2, dtype=torch.bfloat16),
        "steps": torch.tensor(7),
    }
    path = tmp_path / "step_20.safetensors"
    save_file(state, path, {"profile": "SWA()", "head.weight": "layer.weight"})
    return path


def test_what_is_in_it(file):
    found = inspect_checkpoint(file)
    assert (found.format, found.step, found.count, found.nbytes) == ("safetensors", 20, 7, 28)
    assert {entry.name: (entry.dtype, entry.shape) for entry in found.tensors} == {
        "layer.weight": ("F32", (2, 2)),
        "layer.bias": ("BF16", (2,)),
        "steps": ("I64", ()),
    }
    assert found.ties == {"head.weight": "layer.weight"}
    assert found.metadata["profile"] == "SWA()"
    assert all(entry.values is None for entry in found.tensors)


def test_values_on_request(file):
    found = inspect_checkpoint(file, values=True)
    counts = {entry.name: entry.values for entry in found.tensors}
    assert (counts["layer.weight"].nans, counts["layer.weight"].infinities) == (1, 1)
    assert counts["layer.weight"].norm == 5.0
    assert counts["steps"].norm == 7.0
    assert found.nonfinite == ("layer.weight",)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.bool]
)
def test_values_of_odd_dtypes(tmp_path, dtype):
    torch.save({"w": torch.ones(9).to(dtype)}, tmp_path / "x.pt")
    (entry,) = inspect_checkpoint(tmp_path / "x.pt", values=True).tensors
    assert entry.values.norm == 3.0


def test_more_than_one_piece_and_complex_values(tmp_path):
    torch.save({"w": torch.full((300_000,), 1 + 1j, dtype=torch.complex64)}, tmp_path / "x.pt")
    (entry,) = inspect_checkpoint(tmp_path / "x.pt", values=True).tensors
    assert entry.values.norm == pytest.approx(600_000**0.5, rel=1e-12)


def test_unreadable_tensors_are_listed(tmp_path):
    torch.save({"a": torch.ones(1), "b": torch.ones(1).expand(9)}, tmp_path / "x.pt")
    found = inspect_checkpoint(tmp_path / "x.pt")
    assert [entry.name for entry in found.tensors] == ["a"]
    assert "is expanded" in found.refused["b"]


def test_command(file, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", w=np.ones(3))
    assert run(["inspect", str(file), str(tmp_path / "x.npz"), "--values"]) == 0
    shown = capsys.readouterr().out
    for piece in ("step 20", "layer.weight", "2×2", "head.weight is tied to layer.weight",
                  "not finite: layer.weight", "profile: SWA()", "every value is finite"):  # fmt: skip
        assert piece in shown
    assert run(["inspect"]) == 2
    assert run(["inspect", str(tmp_path / "none.pt")]) == 2


def test_a_pipe_gets_one_line_per_tensor(tmp_path, capsys):
    name = ".".join(["a_long_name_of_a_layer"] * 10)
    torch.save({name: torch.ones(3)}, tmp_path / "x.pt")
    assert run(["inspect", str(tmp_path / "x.pt")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if name in line)
    assert line.split() == [name, "F32", "3", "12", "B"]


GROWTH = """
import resource, sys
from polyak.checkpoints.diff import diff_checkpoints
from polyak.checkpoints.inspect import inspect_checkpoint
inspect_checkpoint(sys.argv[2], values=True)  # imports and buffers that are there once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = inspect_checkpoint(sys.argv[1], values=True)
assert found.nbytes >= 80_000_000 and not found.nonfinite
assert diff_checkpoints(sys.argv[1], sys.argv[1]).same
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_memory_does_not_grow_with_the_tensors(tmp_path, transposed):
    """80 MB (of holes) inspected and compared with itself, within 40 MB."""
    large = torch.empty(4_000, 5_000)
    with torch.serialization.skip_data():
        torch.save({"w": large.t() if transposed else large}, tmp_path / "large.pt")
    torch.save({"w": torch.ones(300, 300).t()}, tmp_path / "small.pt")
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / "large.pt"), str(tmp_path / "small.pt")],
        check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    assert int(done.stdout) < 40_000  # kB
