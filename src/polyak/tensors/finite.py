"""Finding NaN and infinity by name: one sum per tensor, values only where a sum is suspect."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from polyak.errors import NonFiniteError
from polyak.tensors.ranks import ShardRanks

_PIECE = 1 << 20  # values


def nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity; one read of each device if none does.

    A name may come with several tensors.
    """
    floating = [(n, t.detach()) for n, t in tensors if t.is_floating_point() or t.is_complex()]
    # A NaN or an infinity always makes the sum NaN or infinite; large finite values may as well.
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in floating:
        by_device.setdefault(tensor.device, []).append((name, tensor))
    suspects = [suspect for named in by_device.values() for suspect in _suspects(named)]
    bad = {name for name, tensor in suspects if not _is_finite(tensor)}
    return list(dict.fromkeys(name for name, _ in floating if name in bad))


def refuse_nonfinite(
    tensors: Iterable[tuple[str, Tensor]], what: str, advice: str, ranks: ShardRanks | None = None
) -> None:
    """Raise NonFiniteError that names every tensor with a NaN or an infinity, on any of the ranks."""
    found = nonfinite(tensors)
    if names := ranks.union(found) if ranks else found:
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise NonFiniteError(f"{what}: NaN or infinity in {shown}. {advice}")


def _suspects(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    # On the host torch makes a copy of half precision before it sums. One piece serves all: of one each, the
    # allocator gives a part to the sum, and the next no longer fits where the last one was.
    is_copied = named[0][1].device.type == "cpu" and any(t.itemsize < 4 for _, t in named)
    piece = torch.empty(_PIECE if is_copied else 0, dtype=torch.float32, device="cpu")
    sums = torch.stack([_sum(tensor, piece) for _, tensor in named])
    finite = torch.isfinite(sums).tolist()
    return [pair for pair, is_finite in zip(named, finite, strict=True) if not is_finite]


def _sum(tensor: Tensor, piece: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if piece.numel() and real.itemsize < 4 and real.numel() > len(piece):
        parts = torch.split(real.reshape(-1), len(piece))
        return torch.stack([piece[: len(part)].copy_(part).sum() for part in parts]).sum()
    return real.sum(dtype=torch.float32)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # float8: isfinite is not implemented for it
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())
