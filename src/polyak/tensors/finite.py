"""Finding NaN and infinity by name: one sum per tensor, values only where a sum is suspect."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from polyak.errors import NonFiniteError


def nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity; one read of each device if none does."""
    floating = {n: t.detach() for n, t in tensors if t.is_floating_point() or t.is_complex()}
    # A NaN or an infinity always makes the sum NaN or infinite; large finite values may as well.
    suspects = {name for name, is_finite in _finite_sums(floating).items() if not is_finite}
    return [name for name in floating if name in suspects and not _is_finite(floating[name])]


def refuse_nonfinite(tensors: Iterable[tuple[str, Tensor]], what: str, advice: str) -> None:
    """Raise NonFiniteError that names every tensor with a NaN or an infinity."""
    if names := nonfinite(tensors):
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise NonFiniteError(f"{what}: NaN or infinity in {shown}. {advice}")


def _finite_sums(tensors: dict[str, Tensor]) -> dict[str, bool]:
    names_on: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        names_on.setdefault(tensor.device, []).append(name)
    result: dict[str, bool] = {}
    for names in names_on.values():
        sums = torch.stack([_sum(tensors[name]) for name in names])
        result |= zip(names, torch.isfinite(sums).tolist(), strict=True)
    return result


def _sum(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.sum(dtype=torch.float32)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # float8: isfinite is not implemented for it
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())
