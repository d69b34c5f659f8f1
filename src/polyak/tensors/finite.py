"""Finding NaN and infinity by name: one sum per tensor, values only where a sum is suspect."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from polyak.errors import NonFiniteError


def nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity."""
    floating = [(n, t.detach()) for n, t in tensors if t.is_floating_point() or t.is_complex()]
    # A NaN or an infinity always makes the sum NaN or infinite; large finite values may as well.
    suspects = [(n, t) for n, t in floating if not _is_finite(_sum(t))]
    return [name for name, tensor in suspects if not _is_finite(tensor)]


def refuse_nonfinite(tensors: Iterable[tuple[str, Tensor]], what: str, advice: str) -> None:
    """Raise NonFiniteError that names every tensor with a NaN or an infinity."""
    if names := nonfinite(tensors):
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise NonFiniteError(f"{what}: NaN or infinity in {shown}. {advice}")


def _sum(tensor: Tensor) -> Tensor:
    return tensor.sum(dtype=None if tensor.is_complex() else torch.float32)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # float8: isfinite is not implemented for it
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())
