"""The kernels of a GPU against obvious twins: on a GPU, or where Triton interprets them.

`test_fused.py` runs this file with `TRITON_INTERPRET=1`, which has to be set before Python starts. The
interpreter truncates what it rounds to bfloat16; nothing is stored in it here.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import polyak
from polyak import EMA, SWA, Average, Averages, Window
from polyak.tensors import fused
from polyak.tensors.blend import GroupedTensors
from polyak.tensors.updates import Update

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not fused.is_available(DEVICE),
    reason="needs Triton and CUDA, or TRITON_INTERPRET=1 PYTHONPATH=tests pytest -p reference.interpreted",
)

SHAPES = [(3, 5), (), (fused.BLOCK,), (0, 4), (2 * fused.BLOCK + 5,), (7, 11, 13)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def moved(live, targets, weight, **options):
    """One update by the kernel alone, of what is in `targets`."""
    grouped = GroupedTensors(live, targets)
    assert not grouped._groups, "the kernel should take all of these"
    grouped.blend([Update(grouped.group(targets), weight, **options)])


def on_device(weight):
    return torch.tensor(weight, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("make", [float, on_device], ids=["on the host", "on the device"])
@pytest.mark.parametrize("weight", [1e-6, 0.25, 0.75, 1.0])
def test_against_float64(weight, make, adds):
    live = [drawn(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    before = [drawn(tuple(t.shape), seed=1) for t in live]
    after = [t.clone() for t in before]
    moved(live, after, make(weight), adds=adds)
    for x, a, found in zip(live, before, after, strict=True):
        a, x = a.double(), x.double()
        expected = a + weight * x if adds else a + weight * (x - a)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [float, on_device])
def test_with_share_1_the_average_is_the_weights_whatever_it_held(make):
    live = [drawn(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    poisoned = [torch.full_like(t, math.nan, dtype=torch.float32) for t in live]
    moved(live, poisoned, make(1.0))
    for x, found in zip(live, poisoned, strict=True):
        assert torch.equal(x.float(), found)


@pytest.mark.parametrize("adds", [False, True])
def test_with_share_0_not_even_a_nan_gets_in(adds):
    live = [torch.full(shape, math.nan, device=DEVICE) for shape in SHAPES]
    before = [drawn(shape) for shape in SHAPES]
    after = [t.clone() for t in before]
    moved(live, after, on_device(0.0), adds=adds)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_nothing_is_written_around_the_tensors(offset):
    """Aligned memory and memory that is not: the vectors of the kernel may not overlap its ends."""
    sizes = [1, 15, 16, fused.BLOCK - 1, fused.BLOCK, fused.BLOCK + 1]
    live = [drawn((size + 8,))[offset : offset + size] for size in sizes]
    memory = [torch.full((size + 64,), -7.0, device=DEVICE) for size in sizes]
    targets = [m[offset : offset + size] for m, size in zip(memory, sizes, strict=True)]
    moved(live, targets, 1.0)
    for x, m, size in zip(live, memory, sizes, strict=True):
        assert torch.equal(m[offset : offset + size], x)
        assert (m[:offset] == -7).all()
        assert (m[offset + size :] == -7).all()


def test_permuted_tensors_keep_their_places():
    live = [drawn((4, 3, 5, 6)).to(memory_format=torch.channels_last), drawn((8, 9)).t()]
    targets = [torch.zeros_like(t) for t in live]
    moved(live, targets, 1.0)
    assert all(map(torch.equal, live, targets))


@pytest.mark.parametrize("count", [1, 2, 8, 9, 17])
def test_any_number_of_averages_reads_the_weights_once(count):
    live = [drawn(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    lists = [[drawn(tuple(t.shape), seed=k) for t in live] for k in range(count)]
    before = [[t.clone() for t in tensors] for tensors in lists]
    grouped = GroupedTensors(live, lists[0], n_averages=count)
    shares = [0.1 + 0.9 * k / count for k in range(count)]
    grouped.blend([Update(grouped.group(t), s) for t, s in zip(lists, shares, strict=True)])
    for old, new, share in zip(before, lists, shares, strict=True):
        for x, a, found in zip(live, old, new, strict=True):
            torch.testing.assert_close(found, torch.lerp(a, x.float(), share), rtol=1e-6, atol=1e-6)


STATISTICS = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8]


@pytest.mark.parametrize("n_updates", [0, 1, 3])
def test_statistics_are_copied_bit_for_bit_whatever_they_are(n_updates):
    live = [drawn((5, 3))]
    statistics = [(drawn((n,)) * 100).to(dtype) for n in (1, 3, 1000, 5000) for dtype in STATISTICS]
    statistics.append(torch.tensor(2**40 + 1, device=DEVICE))
    statistics.append(drawn((3,), torch.complex64))
    statistics.append(drawn((9,))[::2])  # with gaps: not by the kernel
    targets = [[torch.zeros_like(t) for t in live] for _ in range(n_updates)]
    copies = [[t.clone().zero_() for t in statistics] for _ in range(2)]
    grouped = GroupedTensors(live, [torch.zeros_like(t) for t in live], statistics=statistics)
    grouped.blend([Update(grouped.group(t), 1.0) for t in targets], copies)
    for copied in copies:
        assert all(map(torch.equal, statistics, copied))
    for target in targets:
        assert all(map(torch.equal, live, target))


@pytest.mark.parametrize("make", [float, on_device])
def test_folding_keeps_what_it_rounds_off(make):
    averages, sums = ([drawn(shape, seed=s) for shape in SHAPES] for s in (1, 2))
    sums = [t * 1e-4 for t in sums]
    old = [(a.double(), s.double()) for a, s in zip(averages, sums, strict=True)]
    grouped = GroupedTensors(averages, averages)
    growth = 1.0003
    grouped.fold(grouped.group(averages), grouped.group(sums), make(growth))
    for (a, s), average, rest in zip(old, averages, sums, strict=True):
        expected = (a + s) / growth
        torch.testing.assert_close(average.double(), expected, rtol=2e-7, atol=2e-7)
        both = average.double() + rest.double()
        torch.testing.assert_close(both, expected, rtol=1e-9, atol=1e-10)


ODD = {
    "float64": lambda: drawn((5,), torch.float64),
    "complex": lambda: drawn((5,), torch.complex64),
    "with gaps": lambda: drawn((10,))[::2],
    "negated in name": lambda: torch._neg_view(drawn((5,))),
    "conjugate in name": lambda: drawn((5,), torch.complex64).conj(),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
def test_odd_tensors_are_updated_beside_the_launch(make):
    live = [drawn((3, 5)), make(), drawn((7,), torch.bfloat16)]
    kind = torch.promote_types(live[1].dtype, torch.float32)
    targets = [
        torch.zeros_like(t, dtype=d)
        for t, d in zip(live, (torch.float32, kind, torch.float32), strict=True)
    ]
    grouped = GroupedTensors(live, targets)
    assert len(grouped._groups) == 1
    grouped.blend([Update(grouped.group(targets), 0.25)])
    for x, found in zip(live, targets, strict=True):
        torch.testing.assert_close(found, x.to(found.dtype) * 0.25)


def filled(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def only_value(average):
    (value,) = average.averaged_tensors()["weight"].unique().tolist()
    return value


def test_the_tables_are_made_again_when_a_tensor_moves_and_only_then():
    model = nn.Linear(3, 4, device=DEVICE)
    average = Average(model, SWA())
    tables = average._member.tracker
    values = [1.0, 3.0, 8.0, 4.0]
    for index, value in enumerate(values):
        if index == 2:
            moved_to = torch.zeros(4, 3, device=DEVICE)
            model.weight.data = moved_to
        before = [rows._tables for rows in tables._grouped._rows]
        known = [len(table) for table in before]
        filled(model, value)
        average.update()
        if index in (1, 3):
            assert [rows._tables for rows in tables._grouped._rows] == before
            assert [len(table) for table in before] == known
    assert only_value(average) == pytest.approx(sum(values) / 4)


def test_the_default_device_of_torch_has_no_part_in_it():
    model = nn.BatchNorm1d(3, device=DEVICE)
    average = Average(model, EMA(decay=0.9999, keep_initial=True))
    with torch.device("meta"):
        for value in (1.0, 3.0, 8.0):
            filled(model, value)
            average.update()
    assert only_value(average) == pytest.approx(1 + 1e-4 * 9, rel=1e-6)


def test_memory_that_is_shared_with_a_loan_is_left_to_it():
    """`applied()` shares the average copy-on-write; a kernel that writes to an address knows nothing of it."""
    model = nn.Linear(3, 4, device=DEVICE)
    average = Average(model, SWA())
    filled(model, 1.0)
    average.update()
    for value in (3.0, 8.0):
        with average.applied():
            kept, before = model.weight.detach(), model.weight.tolist()
        filled(model, value)
        average.update()
        assert kept.tolist() == before
    assert only_value(average) == 4.0


def test_it_says_that_the_updates_are_one_launch():
    average = Average(nn.Linear(3, 4, device=DEVICE), SWA())
    assert "one launch" not in str(average.plan())
    average.update()
    assert f"an update on {DEVICE} is one launch of a kernel, which took" in str(average.plan())


def test_statistics_that_are_exchanged_are_found():
    model = nn.BatchNorm1d(3, device=DEVICE)
    average = Average(model, SWA())
    average.update()
    with average.applied():
        polyak.update_bn(model, [drawn((64, 3))])
    assert not torch.equal(average.averaged_tensors()["running_mean"], model.running_mean)
    model.running_mean.fill_(5.0)
    model.num_batches_tracked.fill_(77)
    average.update()
    found = average.averaged_tensors()
    assert found["running_mean"].tolist() == [5.0] * 3
    assert found["num_batches_tracked"].item() == 77


@pytest.mark.parametrize(
    "profile", [SWA(), EMA(decay=0.5), EMA(decay=0.99999, keep_initial=True), Window(length=2)]
)
def test_skipped_steps_change_nothing(profile):
    model = nn.Linear(3, 1, device=DEVICE)
    averages, expected = Averages(model, {"a": profile, "b": SWA()}), Average(model, profile)
    for index in range(8):
        real = index not in (0, 1, 4, 7)
        filled(model, float(index) if real else math.nan)
        averages.update(real=torch.tensor(float(real), device=DEVICE))
        if real:
            expected.update()
    assert (averages["a"].time, averages["a"].count) == (expected.time, 4)
    torch.testing.assert_close(averages["a"].averaged_tensors(), expected.averaged_tensors())


def test_members_updated_apart_and_together():
    model = nn.Linear(3, 1, device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    profiles = {"a": SWA(), "b": EMA(decay=0.9), "c": SWA()}
    together = Averages(model, profiles)
    alone = {name: Average(model, profile) for name, profile in profiles.items()}
    together["b"].attach(optimizer, every=2)
    together.attach(optimizer, every=3)
    for name, average in alone.items():
        average.attach(optimizer, every=2 if name == "b" else 3)
    for index in range(12):
        filled(model, float(index))
        optimizer.step()
    for name, average in together.items():
        assert only_value(average) == only_value(alone[name])
