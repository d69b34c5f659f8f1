"""The memory of tensors: where it is, who shares it, and sharing it copy-on-write."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_on_write(tensor: Tensor) -> Tensor:
    """A tensor of the same values that shares their memory until either of the two is written to."""
    # torch keeps this private: the only way to share memory whose writers need not know of it.
    lazy = getattr(torch, "_lazy_clone", None)
    own = tensor.detach()
    clone: Tensor = lazy(own) if lazy is not None and shares_lazily(own) else own.clone()
    return clone


def shares_lazily(tensor: Tensor) -> bool:
    """Whether `copy_on_write` copies nothing: plain dense memory of this process."""
    return (
        type(tensor.detach()) is Tensor
        and tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not in_shared_memory(tensor)
    )


def address(tensor: Tensor) -> int:
    """Where the values are; unlike `data_ptr()`, asking is not taken for a write that must copy."""
    return int(torch._C._data_address(tensor))  # type: ignore[attr-defined]


def in_shared_memory(tensor: Tensor) -> bool:
    """Whether other processes may see the values (torch says so of all CUDA tensors)."""
    return tensor.device.type == "cpu" and tensor.is_shared()  # type: ignore[no-untyped-call]
