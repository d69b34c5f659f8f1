"""The loop: the same bits for any threads and chunks, the bound, values that are not finite, memory."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.merging import stored_checkpoints, within_bound
from safetensors.torch import load_file

from polyak.checkpoints.merging import plan as planning
from polyak.checkpoints.merging import prepare
from polyak.checkpoints.merging.average import average_checkpoints
from polyak.checkpoints.merging.rules import Part, WeightedSum
from polyak.errors import FormatError, NonFiniteError

ANY = torch.Generator().manual_seed(1)


def state_of_many_sizes(dtype):
    sizes = [1, 63, 64, 65, 1000, 0, 7, 4099, 3, 3, 3]
    tensors = {f"t{i}": torch.randn(n, generator=ANY).to(dtype) for i, n in enumerate(sizes)}
    return tensors | {
        "count": torch.tensor(len(sizes)),
        "wide": torch.randn(5, 9, generator=ANY).double(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["swa", [0.3, -0.2, 0.5, 0.4]], ids=str)
def test_threads_and_chunks_do_not_change_a_bit(tmp_path, monkeypatch, dtype, how):
    paths = stored_checkpoints(tmp_path, [state_of_many_sizes(dtype) for _ in range(4)])
    target = tmp_path / "out.safetensors"
    average_checkpoints(paths, {target: how}, threads=1)
    expected = load_file(target)
    for chunk, threads in [(128, 1), (128, 4), (384, 3), (10_000, 2)]:
        monkeypatch.setattr(prepare, "MergePlan", lambda t, size=chunk: planning.MergePlan(t, size))
        average_checkpoints(paths, {target: how}, threads=threads, overwrite=True)
        found = load_file(target)
        assert all(torch.equal(found[n], expected[n]) for n in expected), (chunk, threads)


scales = st.sampled_from([1e-30, 1e-6, 1.0, 1e4])


@given(
    count=st.integers(1, 9), scale=scales, dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    raw=st.lists(st.floats(1e-3, 1), min_size=9, max_size=9), seed=st.integers(0, 99), sign=st.booleans(),
)  # fmt: skip
def test_the_bound(tmp_path_factory, count, scale, dtype, raw, seed, sign):
    folder = tmp_path_factory.mktemp("bound")
    generator = torch.Generator().manual_seed(seed)
    states = [
        {"w": (torch.randn(999, generator=generator) * scale).to(dtype)} for _ in range(count)
    ]
    weights = [w / sum(raw[:count]) for w in raw[:count]]
    if sign and count > 1:
        weights = [-weights[0], *weights[1:-1], weights[-1] + 2 * weights[0]]
    target = folder / "out.safetensors"
    average_checkpoints(stored_checkpoints(folder, states), {target: weights})
    assert within_bound(load_file(target), states, weights)


def test_the_callers_torch_threads_stay(tmp_path):
    paths = stored_checkpoints(tmp_path, [state_of_many_sizes(torch.float32)] * 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        average_checkpoints(paths, {tmp_path / "out.safetensors": "swa"}, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(tmp_path, bad):
    states = [state_of_many_sizes(torch.bfloat16) for _ in range(3)]
    states[1]["t7"][4000] = bad
    paths = stored_checkpoints(tmp_path, states)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        NonFiniteError, match=rf"t7 of .*step-200\.safetensors .*value 4000 of it is {bad}"
    ):
        average_checkpoints(paths, {tmp_path / "out.safetensors": "swa"})
    assert sorted(tmp_path.iterdir()) == before
    average_checkpoints(paths, {tmp_path / "out.safetensors": "swa"}, exclude=["t7"])


def test_opposite_infinities_do_not_cancel(tmp_path):
    states = [{"w": torch.tensor([1.0, v])} for v in (float("inf"), -float("inf"))]
    with pytest.raises(NonFiniteError, match="step-100"):
        average_checkpoints(
            stored_checkpoints(tmp_path, states), {tmp_path / "o.safetensors": "swa"}
        )


def test_what_a_narrow_dtype_cannot_hold(tmp_path):
    largest = torch.finfo(torch.float16).max
    paths = stored_checkpoints(
        tmp_path, [{"fits": torch.tensor([largest]), "big": torch.tensor([65520.0])}]
    )
    with pytest.raises(NonFiniteError, match=r"^big: the average exceeds what F16 can hold"):
        average_checkpoints(paths, {tmp_path / "o.safetensors": "swa"}, dtype="float16")
    average_checkpoints(paths, {tmp_path / "o.safetensors": "swa"}, dtype="bfloat16")


def test_an_input_that_changes_meanwhile(tmp_path):
    paths = stored_checkpoints(tmp_path, [{"w": torch.ones(300_000)} for _ in range(2)])

    def touch(done, total):
        with paths[0].open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(FormatError, match="changed"):
        average_checkpoints(paths, {tmp_path / "o.safetensors": "swa"}, progress=touch, threads=1)
    assert sorted(tmp_path.iterdir()) == before


SPARSE = """
import json, sys
from polyak.checkpoints.merging.average import average_checkpoints
folder, size = sys.argv[1], int(sys.argv[2])
header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
paths = [f"{folder}/step-{i}-{size}.safetensors" for i in range(4)]
for path in paths:
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
average_checkpoints(paths, {f"{folder}/out-{size}.safetensors": "swa"}, threads=2)
print(before, peak())
"""


def test_memory_does_not_grow_with_the_files(tmp_path):
    """A subprocess' peak: the files are holes, so only buffers count."""
    peaks = []
    for size in (8 << 20, 96 << 20):
        answer = subprocess.run(
            [sys.executable, "-c", SPARSE, str(tmp_path), str(size)],
            capture_output=True,
            check=True,
            text=True,
        )
        before, after = map(int, answer.stdout.split())
        assert after - before < 60_000  # kilobytes above the imports; ru_maxrss counts the parent's
        peaks.append(after)
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.parametrize("count", [1, 8, 9, 32, 50, 64])
def test_the_mean_of_many_is_as_close_as_that_of_two(count):
    generator = torch.Generator().manual_seed(count)
    values = 1 + 0.1 * torch.randn(count, 20_000, generator=generator)
    rule = WeightedSum([0.0, *[1 / count] * count, 0.0])
    assert rule.buffers <= 1 + ((count - 1) // 8).bit_length()
    rows = list(torch.full((rule.buffers, 20_000), float("nan")))
    for index, one in enumerate(values, start=1):
        rule.add(rows, Part(one, index, index == 1))
    rule.finish(rows)
    exact = values.double().mean(0)
    assert (rows[0] - exact).norm() <= 6e-8 * exact.norm()
    for index, one in enumerate([values[0]] * count, start=1):
        rule.add(rows, Part(one, index, index == 1))
    rule.finish(rows)
    assert torch.equal(rows[0], values[0])
