"""The memory of tensors: what has none, where it is, who shares it, and sharing it copy-on-write."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.tensors.sharding import local


def odd_form(tensor: Tensor) -> str:
    """What a tensor is that does not hold dense values in memory of its own: "sparse_coo", "a FakeTensor".

    Empty for all others, those with a conjugate or negative bit included. Classes that take over
    torch's dispatch keep their values in a way of their own, whatever they are called; of a DTensor
    the local values count.
    """
    tensor = local(tensor)
    kind = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {kind.__name__}"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_meta:
        return META
    if tensor.is_nested or tensor.is_quantized:
        return "nested" if tensor.is_nested else "quantised"
    return "a zero without memory" if torch._is_zerotensor(tensor) else ""


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape; of a nested tensor, whose parts differ, how many parts it has."""
    return (tensor.size(0),) if tensor.is_nested else tuple(tensor.shape)


_shared = [0]

META = "on the meta device, without values"


def copy_on_write(tensor: Tensor) -> Tensor | None:
    """A tensor of the same values that shares their memory until either of the two is written to.

    None where that cannot be: memory that torch did not allocate (mapped files, NumPy arrays), that
    other processes see, or that holds anything but plain dense values.
    """
    own = tensor.detach()
    # torch keeps this private: the only way to share memory whose writers need not know of it.
    lazy = getattr(torch, "_lazy_clone", None)
    plain = type(own) is Tensor and not odd_form(own)
    if lazy is None or not plain or own.is_conj() or own.is_neg() or in_shared_memory(own):
        return None
    try:
        clone: Tensor = lazy(own)
    except RuntimeError:  # its memory is not torch's
        return None
    _shared[0] += 1
    return clone


def times_shared() -> int:
    """How often `copy_on_write` has shared memory: after it tensors may move when they are written to."""
    return _shared[0]


def address(tensor: Tensor) -> int:
    """Where the values are; unlike `data_ptr()`, asking is not taken for a write that must copy."""
    return int(torch._C._data_address(tensor))  # type: ignore[attr-defined]


def is_dense(tensor: Tensor) -> bool:
    """Whether the values fill one range of memory, each once, in any order of dimensions."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def in_shared_memory(tensor: Tensor) -> bool:
    """Whether other processes may see the values (torch says so of all CUDA tensors)."""
    return tensor.device.type == "cpu" and tensor.is_shared()  # type: ignore[no-untyped-call]
