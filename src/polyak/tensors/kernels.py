"""The kernels of an update on a GPU, in Triton; `fused.py` makes their tables and launches them.

A program moves one piece of one tensor, for all averages. What it works on is in tables of 64-bit
integers in the memory of the device:

- `programs`: the row of a tensor, and which piece of it, for each program;
- `rows`: how many items a tensor has, of what kind, and its place among the averaged tensors or among
  the statistics;
- `sources`: the address of each row's memory;
- each of `columns` and of `copies`: by place, the addresses of what becomes of weights and statistics.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Kinds of items: weights by their dtype, and what is copied as words of 4 bytes or as bytes.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
WORDS = tl.constexpr(3)
BYTES = tl.constexpr(4)


@triton.jit
def update(
    programs,
    rows,
    sources,
    columns,
    weights,
    adds,
    copies,
    on_device: tl.constexpr,
    n_columns: tl.constexpr,
    n_copies: tl.constexpr,
    block: tl.constexpr,
):
    """Move averages toward the weights, or add these to their sums; copy statistics.

    Column k takes the weights with weights[k], a number or (bit k of `on_device`) a 0-d tensor, and
    adds them where adds[k] is not 0.
    """
    row, start, size, kind, place = _piece(programs, rows, block)
    source = tl.load(sources + row)
    if kind == WORDS:
        _copy(source, tl.int32, place, start, size, copies, n_copies, block)
    elif kind == BYTES:
        _copy(source, tl.int8, place, start, size, copies, n_copies, block)
    else:
        # Vectors of 16 bytes need such addresses, and no mask.
        together = source
        for k in tl.static_range(n_columns):
            together |= tl.load(columns[k] + place)
        how = (weights, adds)
        if (together % 16 == 0) & (start + block <= size):
            _blend(
                source, kind, place, start, size, columns, how, on_device, n_columns, block, True
            )
        else:
            _blend(
                source, kind, place, start, size, columns, how, on_device, n_columns, block, False
            )


@triton.jit
def fold(
    programs,
    rows,
    averages,
    sums,
    growth,
    excess,
    on_device: tl.constexpr,
    block: tl.constexpr,
):
    """Fold block sums into averages: `average = (average + sum) / growth`, `excess = growth - 1`.

    What the addition rounds off stays in the sum.
    """
    _, start, size, kind, place = _piece(programs, rows, block)
    if kind < WORDS:
        offsets = start + tl.arange(0, block)
        mask = offsets < size
        at = _at(tl.load(averages + place), tl.float32, False) + offsets
        kept = _at(tl.load(sums + place), tl.float32, False) + offsets
        average = tl.load(at, mask=mask, other=0.0)
        rest = tl.load(kept, mask=mask, other=0.0)
        grown = _number(growth, on_device)
        correction = tl.div_rn(rest - average * _number(excess, on_device), grown)
        folded = average + correction
        tl.store(kept, correction - (folded - average), mask=mask)
        tl.store(at, folded, mask=mask)


@triton.jit
def _piece(programs, rows, block: tl.constexpr):
    program = tl.program_id(0).to(tl.int64) * 2
    row = tl.load(programs + program)
    start = tl.load(programs + program + 1) * block
    at = rows + row * 3
    return row, start, tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _blend(
    source,
    kind,
    place,
    start,
    size,
    columns,
    how,
    on_device: tl.constexpr,
    n_columns: tl.constexpr,
    block: tl.constexpr,
    whole: tl.constexpr,
):
    weights, adds = how
    offsets = start + tl.arange(0, block)
    mask = None if whole else offsets < size
    x = _weights(source, kind, offsets, mask, whole)
    for k in tl.static_range(n_columns):
        at = _at(tl.load(columns[k] + place), tl.float32, whole) + offsets
        average = tl.load(at, mask=mask)
        weight = _number(weights[k], (on_device >> k) % 2)
        tl.store(at, _moved(average, x, weight, adds[k]), mask=mask)


@triton.jit
def _weights(source, kind, offsets, mask, whole: tl.constexpr):
    if kind == FLOAT32:
        x = tl.load(_at(source, tl.float32, whole) + offsets, mask=mask)
    elif kind == BFLOAT16:
        x = tl.load(_at(source, tl.bfloat16, whole) + offsets, mask=mask).to(tl.float32)
    else:
        x = tl.load(_at(source, tl.float16, whole) + offsets, mask=mask).to(tl.float32)
    return x


@triton.jit
def _at(address, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    # Four items a thread, whatever their size: more of the narrow ones would have to change threads.
    return tl.multiple_of(pointer, dtype.primitive_bitwidth // 2) if aligned else pointer


@triton.jit
def _moved(average, x, weight, adds):
    difference = tl.where(adds != 0, x, x - average)
    moved = average + weight * difference
    # From the nearer end, as torch does; with 1 and 0 nothing that was held, or skipped, gets in.
    far = (weight >= 0.5) & (adds == 0)
    moved = tl.where(far, x - (1 - weight) * difference, moved)
    moved = tl.where((weight == 1) & (adds == 0), x, moved)
    return tl.where(weight == 0, average, moved)


@triton.jit
def _number(value, is_pointer: tl.constexpr):
    return tl.load(value).to(tl.float32) if is_pointer else tl.cast(value, tl.float32)


@triton.jit
def _copy(
    source,
    dtype: tl.constexpr,
    place,
    start,
    size,
    copies,
    n_copies: tl.constexpr,
    block: tl.constexpr,
):
    offsets = start + tl.arange(0, block)
    mask = offsets < size
    x = tl.load(_at(source, dtype, False) + offsets, mask=mask)
    for k in tl.static_range(n_copies):
        at = _at(tl.load(copies[k] + place), dtype, False) + offsets
        tl.store(at, x, mask=mask)


# Whether Triton runs them as Python on the host, as TRITON_INTERPRET=1 asks it to.
INTERPRETED = not isinstance(update, triton.JITFunction)
