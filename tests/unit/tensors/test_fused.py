"""The fused path of a GPU on a machine without one: its laws where Triton interprets it, and without.

One process runs with `TRITON_INTERPRET=1`, which has to be set before Python starts: the kernels against
their twins (`test_kernels.py`), and laws of averages that the tests of the other path run as well.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from polyak import SWA, Average
from polyak.errors import PolyakWarning
from polyak.tensors import fused

TESTS = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def report():
    """What pytest says of the run in which Triton interprets the kernels."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "reference.interpreted"]
    files = [
        "unit/tensors/test_kernels.py",
        "laws/test_averages.py",
        "laws/test_averages_precision.py",
        "unit/averaging/test_hook.py",
    ]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *[str(TESTS / file) for file in files]],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "COVERAGE_PROCESS_START": ""},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("what", "at_least"),
    [
        ("test_kernels.py", 40),
        ("test_it_is_the_weighted_sum_of_what_was_seen", 4),
        ("test_saved_loaded_and_continued_is_bitwise", 4),
        ("test_several_together_are_each_the_one_alone", 1),
        ("test_short_drift", 2),
        ("test_a_skipped_step_changes_nothing", 3),
    ],
)
def test_the_kernels_obey_the_laws(report, what, at_least):
    assert report.returncode == 0, report.stdout[-4000:] + report.stderr[-2000:]
    passed = [line for line in report.stdout.splitlines() if line.startswith("PASSED")]
    assert len([line for line in passed if what in line]) >= at_least
    assert not re.search("skipped|failed", report.stdout.splitlines()[-1])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU is one of the devices where the kernels are tried; nothing of that is left behind."""
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    monkeypatch.setattr(fused, "_failures", {})
    monkeypatch.setattr(fused, "_warned", set())
    monkeypatch.setattr(fused, "_compiled", set())
    fused._kernels.cache_clear()
    sys.modules.pop("polyak.tensors.kernels", None)
    yield
    fused._kernels.cache_clear()
    sys.modules.pop("polyak.tensors.kernels", None)


@pytest.fixture
def uncompilable(as_on_a_gpu, monkeypatch):
    """Triton is there, and cannot compile: it finds no GPU to compile for."""
    monkeypatch.setattr(fused._kernels(), "INTERPRETED", True)


def updated(average, model, values):
    for value in values:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        average.update()
    return [t.mean().item() for n, t in average.averaged_tensors().items() if "weight" in n]


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@needs_triton
def test_a_triton_that_cannot_compile_is_one_warning_and_the_same_average(uncompilable):
    model = network()
    average = Average(model, SWA())
    with pytest.warns(PolyakWarning, match="Triton could not compile") as said:
        assert updated(average, model, [1.0, 3.0, 8.0]) == [4.0, 4.0]
        assert updated(Average(network(), SWA()), model, [1.0]) != []
    assert len(said) == 1
    assert not average._member.tracker._grouped._rows


@needs_triton
def test_the_warning_as_an_error_leaves_the_average_as_it_was(uncompilable):
    model = network()
    average = Average(model, SWA())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PolyakWarning, match="could not compile"):
            average.update()
        assert (average.count, average.time) == (0, 0)
        assert updated(average, model, [1.0, 3.0]) == [2.0, 2.0]


def test_without_triton_nothing_is_said(as_on_a_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert updated(Average(model, SWA()), model, [1.0, 3.0]) == [2.0, 2.0]
    assert not fused.is_available(torch.device("cpu"))


@needs_triton
def test_kernels_that_are_interpreted_do_not_touch_the_memory_of_a_gpu(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", {"cuda"})
    monkeypatch.setattr(fused._kernels(), "INTERPRETED", True)
    assert not fused.is_available(torch.device("cuda", 0))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("n_averages", [1, 4])
def test_the_kernels_compile_for_a_gpu_into_vectors_of_16_bytes(n_averages, tmp_path):
    """Without a GPU: ptxas, which comes with Triton, takes what is compiled for an H100."""
    script = TESTS / "reference" / "compiled_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), str(n_averages)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert int(counts["ld.global.v4.b32"]) >= 4 * (1 + n_averages)
    assert int(counts["st.global.v4.b32"]) >= 4 * n_averages
    assert int(counts["ld.global.v2.b32"]) >= 8  # 16-bit weights
