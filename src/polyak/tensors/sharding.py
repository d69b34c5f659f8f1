"""Tensors of which each process keeps a part: torch's DTensors, and what is refused.

Averaging is elementwise, so a sharded tensor is averaged shard by shard: names and shapes are those of
the DTensor, all arithmetic is on its local values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from polyak.errors import ArgumentError, MismatchError, UsageError

# Classes of torch (FSDP1), fairscale and torch_xla, by the names that they share.
_FLAT = {"FullyShardedDataParallel", "XlaFullyShardedDataParallel"}
# What FSDP1 and DeepSpeed ZeRO-3 put on the parameters that they partition, whole or not.
_MARKS = {"_fsdp_flattened": "FSDP1", "ds_id": "DeepSpeed ZeRO-3"}
_ADVICE = (
    "Averages work on models that torch's fully_shard (FSDP2) or tensor parallelism has sharded, not on "
    "this kind. Average the model before it is sharded, or the checkpoints that it writes: "
    "polyak.average_checkpoints, or `polyak average`."
)
_PLAIN = (Tensor, Parameter)

Span = tuple[int, int]  # from, to


def refuse_flat_modules(model: Module) -> None:
    """Raise ArgumentError if any module keeps its parameters flat, whatever they are at this moment."""
    for name, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__} & _FLAT
        if kinds:
            what = name or "the model"
            raise ArgumentError(f"{what} is sharded (a {kinds.pop()}). {_ADVICE}")


def refuse_partitioned(name: str, tensor: Tensor) -> None:
    """Raise ArgumentError for parameters that other frameworks partition, and for pending sums."""
    for mark, framework in _MARKS.items():
        if hasattr(tensor, mark):
            raise ArgumentError(f"{name} is sharded (a parameter of {framework}). {_ADVICE}")
    if is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise ArgumentError(
            f"{name} is a DTensor of sums that are still pending ({tensor.placements}): it has no values "
            "to average. Redistribute it first."
        )


def is_sharded(tensor: Any) -> TypeGuard[Any]:
    """Whether it is a DTensor, replicated ones included."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # without it there can be none
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The values on this rank: of a DTensor its shard, otherwise the tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def sharded_as(values: Tensor, like: Tensor) -> Tensor:
    """A DTensor with these values on this rank, sharded as `like` is; they may be on another device.

    `DTensor.from_local` would move them to the mesh's device, and guess the shape of uneven shards.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    other: Any = like
    meta = TensorMeta(other.shape, other.stride(), values.dtype)
    spec = other._spec.shallow_copy_with_tensor_meta(meta)
    make: Any = DTensor
    made: Tensor = make(values.detach(), spec, requires_grad=False)
    return made


def layout(tensor: Tensor) -> str:
    """How it is sharded, for messages and comparisons; empty for a tensor that is not."""
    if not is_sharded(tensor):
        return ""
    mesh = tensor.device_mesh
    placements = ", ".join(map(str, tensor.placements))
    return f"sharded {placements} over {'x'.join(map(str, mesh.shape))} ranks"


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part on this rank of a tensor that is whole, or sharded as `like` is.

    Raises MismatchError if it is sharded otherwise.
    """
    if is_sharded(tensor):
        if is_sharded(like) and _same_layout(tensor, like):
            return local(tensor)
        raise MismatchError(
            f"A tensor is {layout(tensor)}, and the model's is {layout(like) or 'not sharded'}: give it "
            "whole (full_tensor()), or load it with polyak.sharded.load."
        )
    if not is_sharded(like):
        return tensor
    part = torch.empty_like(local(like), dtype=tensor.dtype, device=tensor.device)
    for spans, here in boxes(like):
        narrowed(part, here).copy_(narrowed(tensor, spans))
    return part


def fits(tensor: Tensor, like: Tensor) -> bool:
    """Whether `part_of` can take it, shapes aside."""
    return not is_sharded(tensor) or (is_sharded(like) and _same_layout(tensor, like))


def boxes(tensor: Tensor) -> Iterator[tuple[tuple[Span, ...], tuple[Span, ...]]]:
    """Where this rank's values are: for each box its spans in the whole tensor, and in the local one.

    One box, as a rule; none where the rank has no values. A plain tensor is one box.
    """
    if not is_sharded(tensor):
        whole = tuple((0, n) for n in tensor.shape)
        yield whole, whole
        return
    here = local(tensor)
    if here.numel() == 0 and tensor.numel():
        return
    rows = [_rows(tensor, dim) for dim in range(tensor.dim())]
    if tuple(map(len, rows)) != tuple(here.shape):
        raise UsageError(
            f"torch says that a tensor of shape {tuple(tensor.shape)}, {layout(tensor)}, has "
            f"{tuple(map(len, rows))} of its values on this rank, but it has {tuple(here.shape)}: where "
            "they belong is not known. Shard dimensions that divide evenly."
        )
    for runs in product(*map(_runs, rows)):
        yield tuple(run[0] for run in runs), tuple(run[1] for run in runs)


def narrowed(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    """The part of a tensor in these spans, one for each dimension: a view."""
    for dim, (start, stop) in enumerate(spans):
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def is_first_replica(tensor: Tensor) -> bool:
    """Whether this rank's values are the first copy of them; plain tensors are on every rank."""
    if not is_sharded(tensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # the rank has no part in it
        return False
    return all(
        position == 0 or not placement.is_replicate()
        for position, placement in zip(coordinate, tensor.placements, strict=True)
    )


def _same_layout(a: Any, b: Any) -> bool:
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


def _rows(tensor: Any, dim: int) -> list[int]:
    """Which indices of one dimension this rank has, in the order of its local tensor.

    Mesh dimensions cut one after the other, from left to right; the strided shards of FSDP2 over tensor
    parallelism cut what is left by the later dimensions, whose ranks are their `split_factor`.
    """
    mesh, rows = tensor.device_mesh, torch.arange(tensor.shape[dim])
    coordinate = mesh.get_coordinate()
    cuts = [
        (getattr(placement, "split_factor", 1), size, position)
        for size, position, placement in zip(mesh.shape, coordinate, tensor.placements, strict=True)
        if not placement.is_replicate() and placement.dim == dim
    ]
    for index, (factor, _, _) in enumerate(cuts):
        if factor not in (1, prod(size for _, size, _ in cuts[index + 1 :])):
            raise UsageError(f"A tensor is {layout(tensor)}: where its values belong is not known.")
    first = [cut for cut in cuts if cut[0] == 1]
    for _, size, position in [*first, *reversed([cut for cut in cuts if cut[0] > 1])]:
        rows = _chunk(rows, size, position)
    return [int(row) for row in rows]


def _chunk(rows: Tensor, n_chunks: int, position: int) -> Tensor:
    each = -(-len(rows) // n_chunks)
    return rows[each * position : each * (position + 1)]


def _runs(rows: list[int]) -> list[tuple[Span, Span]]:
    """Consecutive indices, with the positions at which they are."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    spans = zip(starts, [*starts[1:], len(rows)], strict=True)
    return [((rows[i], rows[j - 1] + 1), (i, j)) for i, j in spans]
