"""A float32 average and its bfloat16 weight in 48 bits a value: every bit comes back."""

from __future__ import annotations

import signal

import pytest
import torch

from polyak.tensors import packed as module
from polyak.tensors import rounding
from polyak.tensors.interrupts import interrupts_held
from polyak.tensors.packed import Packed, Scratch, can_be_packed, nan_free
from polyak.tensors.rounding import copy_rounded

LOW = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def reference(average):
    """Half away from zero, value by value in float64, which holds all of these exactly."""
    exact = average.double()
    even = average.bfloat16()
    step = torch.ones_like(bits(even))
    candidates = [(bits(even) + k * step).view(torch.bfloat16) for k in (-1, 0, 1)]
    best = even.clone()
    for candidate in candidates:
        here, there = (candidate.double() - exact).abs(), (best.double() - exact).abs()
        closer = (here < there) | ((here == there) & (candidate.abs() > best.abs()))
        best = torch.where(closer & candidate.isfinite() & best.isfinite(), candidate, best)
    return best


def every_average(*, nan=True):
    """All 2^16 high halves with the low ones that matter, and with random ones."""
    torch.manual_seed(0)
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lows = [torch.full_like(high, low) for low in LOW]
    lows += [torch.randint(0, 2**16, high.shape, dtype=torch.int32) for _ in range(4)]
    average = torch.cat([high | low for low in lows]).view(torch.float32)
    return average if nan else average[~average.isnan()]


def every_weight(count):
    weights = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    return weights.repeat(-(-count // 2**16))[:count].roll(12345).view(torch.bfloat16)


def pack(weight, average):
    return Packed(weight, average, Scratch.for_([weight]))


@pytest.mark.parametrize("piece", [1 << 18, 1000])
def test_every_pattern_comes_back(monkeypatch, piece):
    monkeypatch.setattr(rounding, "_PIECE", {"cpu": piece})
    average = every_average()
    weight = every_weight(average.numel())
    before, own = average.clone(), weight.clone()
    pair = pack(weight, average)
    pair.swap_in()
    assert torch.equal(bits(pair.average()), bits(before))
    assert not torch.equal(bits(average), bits(before))
    pair.swap_out()
    assert torch.equal(bits(average), bits(before))
    assert torch.equal(bits(weight), bits(own))


def test_what_is_lent_is_what_is_saved_and_the_nearest_value():
    average = every_average(nan=False)
    weight = every_weight(average.numel())
    pair = pack(weight, average.clone())
    pair.swap_in()
    saved = copy_rounded(torch.empty_like(weight), average)
    assert torch.equal(bits(weight), bits(saved))
    ours = saved[saved.isfinite()]
    assert torch.equal(bits(ours), bits(reference(average)[saved.isfinite()]))
    ties = (bits(average) & 0xFFFF) == 0x8000
    assert (saved.float().abs() >= average.abs())[ties].all()
    assert torch.equal(bits(saved[~ties]), bits(average.bfloat16()[~ties]))


def test_a_mean_of_two_is_often_a_tie():
    torch.manual_seed(0)
    first = torch.randn(100_000).bfloat16()
    second = (first.float() + 0.01 * torch.randn(100_000)).bfloat16()
    mean = (first.float() + second.float()) / 2
    ties = (bits(mean) & 0xFFFF) == 0x8000
    assert 0.1 < ties.float().mean() < 0.5
    rounded = copy_rounded(torch.empty_like(first), mean)
    assert (rounded.float().abs() > mean.abs())[ties].all()


def test_special_values_are_shown_as_they_are():
    inf, nan = float("inf"), float("nan")
    top = 3.4028234663852886e38  # rounds to infinity
    average = torch.tensor([0.0, -0.0, inf, -inf, top, -top, 1e-45, -1e-45, 9.2e-41, nan])
    full = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    shown = copy_rounded(torch.empty(13, dtype=torch.bfloat16), torch.cat([average, full]))
    assert shown[:9].tolist() == [
        0,
        0,
        inf,
        -inf,
        inf,
        -inf,
        0,
        0,
        pytest.approx(9.2e-41, rel=0.01),
    ]
    assert torch.signbit(shown[:9]).tolist() == torch.signbit(average[:9]).tolist()
    assert shown[9:].isnan().all()
    assert nan_free([average, average[:9].abs(), full]) == [False, True, False]


def test_rounding_of_tensors_without_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        source, target = torch.ones(5), torch.empty(5, dtype=torch.bfloat16)
        assert copy_rounded(target, source) is target
    meta = torch.empty(5, device="meta")
    assert copy_rounded(torch.empty_like(meta, dtype=torch.bfloat16), meta).is_meta


def test_float64_and_what_is_wide_enough():
    source = torch.tensor([1.00390625, 1.01171875, -1.00390625, 1.0])  # ties, and none
    expected = [1.0078125, 1.015625, -1.0078125, 1.0]
    for dtype in (torch.float32, torch.float64):
        target = torch.empty(8, dtype=torch.bfloat16)[::2]
        assert copy_rounded(target, source.to(dtype)).tolist() == expected
    half = torch.empty(4, dtype=torch.float16)
    assert torch.equal(copy_rounded(half, source), source.half())


def layouts():
    def of(dtype, seed):
        torch.manual_seed(seed)
        return torch.randn(40_000).to(dtype)

    yield "odd offset", lambda d, s: of(d, s)[1:38_001].view(200, 190)
    yield (
        "channels last",
        lambda d, s: of(d, s)[:38_400].view(20, 30, 8, 8).to(memory_format=torch.channels_last),
    )
    yield "transposed", lambda d, s: of(d, s)[:38_400].view(160, 240).t()
    yield "gaps", lambda d, s: of(d, s).view(200, 200)[::2, ::3]
    yield "middle", lambda d, s: of(d, s).view(20, 50, 40).transpose(1, 2)[3:, :, 5:]
    yield "one value", lambda d, s: of(d, s)[7].view(())
    yield "odd size", lambda d, s: of(d, s)[:12_345]
    yield "ones", lambda d, s: of(d, s).view(1, 200, 1, 200)


@pytest.mark.parametrize(("name", "make"), list(layouts()))
@pytest.mark.parametrize("piece", [1 << 18, 37])
def test_any_layout(monkeypatch, name, make, piece):
    monkeypatch.setattr(rounding, "_PIECE", {"cpu": piece})
    weight = make(torch.bfloat16, 0)
    around = weight.untyped_storage().tolist() if name == "gaps" else None
    average = torch.zeros_like(weight, dtype=torch.float32).copy_(make(torch.float32, 1))
    assert can_be_packed(weight, average)
    own, exact = weight.clone(), average.clone()
    pair = pack(weight, average)
    pair.swap_in()
    assert torch.equal(weight, copy_rounded(torch.empty_like(weight), exact))
    assert torch.equal(pair.average(), exact)
    assert pair.average().stride() == average.stride()
    pair.swap_out()
    assert torch.equal(weight, own)
    assert torch.equal(average, exact)
    if around is not None:
        assert weight.untyped_storage().tolist() == around


def test_unlike_strides():
    weight = torch.randn(30, 50).bfloat16()
    average = torch.randn(50, 30).t()
    own, exact = weight.clone(), average.clone()
    pair = pack(weight, average)
    pair.swap_in()
    assert torch.equal(weight, copy_rounded(torch.empty_like(weight), exact))
    pair.swap_out()
    assert torch.equal(weight, own)
    assert torch.equal(average, exact)


def test_the_values_a_piece_cannot_see_are_not_read(monkeypatch):
    """Poisoned scratch: nothing of an earlier piece, or of memory that was never written, gets in."""
    monkeypatch.setattr(rounding, "_PIECE", {"cpu": 64})
    weight, average = torch.randn(100).bfloat16(), torch.randn(100)
    own, exact = weight.clone(), average.clone()
    scratch = Scratch.for_([weight])
    pair = Packed(weight, average, scratch)
    for call in (pair.swap_in, pair.swap_out):
        for part in (scratch.rounded, scratch.low, scratch.half):
            part.fill_(-1234)
        call()
    assert torch.equal(weight, own)
    assert torch.equal(average, exact)


def test_what_is_written_in_place_is_the_average_from_then_on():
    weight, average = torch.randn(100).bfloat16(), torch.randn(100)
    own = weight.clone()
    pair = pack(weight, average)
    pair.swap_in()
    weight.fill_(0.0)  # with the low halves of other values this would be NaN for some
    assert (pair.average() == 0).all()
    pair.swap_out()
    assert torch.equal(weight, own)
    assert (average == 0).all()


def test_what_cannot_be_packed():
    weight, average = torch.zeros(6, 4).bfloat16(), torch.zeros(6, 4)
    assert can_be_packed(weight, average)
    assert not can_be_packed(weight.half(), average)
    assert not can_be_packed(weight, average.double())
    assert not can_be_packed(weight[:0], average[:0])
    assert not can_be_packed(weight.as_strided((6, 4), (2, 1)), average)
    assert not can_be_packed(torch._neg_view(weight), average)
    assert not can_be_packed(weight.clone().share_memory_(), average)
    with torch.inference_mode():
        assert not can_be_packed(weight.clone(), average)


def test_an_interrupt_waits(monkeypatch):
    monkeypatch.setattr(rounding, "_PIECE", {"cpu": 10})
    weight, average = torch.randn(100).bfloat16(), torch.randn(100)
    exact = average.clone()
    pair = pack(weight, average)
    whole = module._parts
    monkeypatch.setattr(module, "_parts", lambda *a: interrupting(whole(*a)))
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        pair.swap_in()
    monkeypatch.setattr(module, "_parts", whole)
    assert torch.equal(pair.average(), exact)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    pair.swap_out()
    assert torch.equal(average, exact)


def interrupting(pieces):
    for index, piece in enumerate(pieces):
        if index == 3:
            signal.raise_signal(signal.SIGINT)
        yield piece
