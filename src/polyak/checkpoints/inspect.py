"""`inspect_checkpoint`: names, shapes, sizes and metadata; on request, counts of NaNs and norms."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from polyak.checkpoints.reading.extra_state import kind_of
from polyak.checkpoints.reading.opening import open_checkpoint
from polyak.checkpoints.reading.stored import TORCH_DTYPES, StoredTensor, iter_values


@dataclass(frozen=True, slots=True)
class ValueCounts:
    """Counts of the values of one tensor that are not finite, and the L2 norm of the others."""

    nans: int
    infinities: int
    norm: float


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor. dtype: as safetensors names it. values: None if not asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    values: ValueCounts | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint holds.

    ties: alias -> stored name. refused: name -> why it cannot be read. metadata: as stored. extra: name ->
    type, of the state that is no tensor.
    """

    path: str
    format: str
    step: int | None
    tensors: tuple[TensorEntry, ...]
    ties: dict[str, str]
    refused: dict[str, str]
    metadata: dict[str, str]
    extra: dict[str, str]

    @property
    def count(self) -> int:
        """Number of values in all tensors; tied tensors count once."""
        return sum(math.prod(entry.shape) for entry in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; tied tensors count once."""
        return sum(entry.nbytes for entry in self.tensors)

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the tensors with a NaN or an infinity; empty if values were not asked for."""
        return tuple(
            entry.name
            for entry in self.tensors
            if entry.values is not None and (entry.values.nans or entry.values.infinities)
        )


def inspect_checkpoint(
    path: str | os.PathLike[str], *, key: str | None = None, values: bool = False
) -> Inspection:
    """Describe a checkpoint; its values are read only on request, a mebibyte at a time.

    path, key: as for `open_checkpoint`. values: also count NaNs and infinities, and compute norms.
    Raises what `open_checkpoint` raises, except that tensors that cannot be read are listed in `refused`.

    >>> import tempfile, pathlib, torch
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.pt"
    >>> torch.save({"w": torch.tensor([3.0, 4.0, torch.nan])}, path)
    >>> inspect_checkpoint(path, values=True).tensors[0].values
    ValueCounts(nans=1, infinities=0, norm=5.0)
    """
    with open_checkpoint(path, key=key, strict=False) as checkpoint:
        entries = tuple(
            TensorEntry(
                stored.name,
                stored.dtype,
                stored.shape,
                stored.nbytes,
                count_values(stored) if values else None,
            )
            for stored in checkpoint.tensors.values()
        )
        checkpoint.check_unchanged()
        return Inspection(
            path=checkpoint.path,
            format=checkpoint.format,
            step=checkpoint.step,
            tensors=entries,
            ties=checkpoint.ties,
            refused=checkpoint.refused,
            metadata=checkpoint.metadata,
            extra={name: kind_of(value) for name, value in checkpoint.extra.items()},
        )


def count_values(stored: StoredTensor) -> ValueCounts | None:
    """NaNs, infinities and the norm of the rest; None for dtypes that torch does not have."""
    if stored.dtype not in TORCH_DTYPES:
        return None
    nans = infinities = 0
    squares = 0.0
    for (raw,) in iter_values(stored):
        values = raw.to(torch.float64)
        nans += int(values.isnan().sum())
        infinities += int(values.isinf().sum())
        squares += float(values.nan_to_num_(0.0, 0.0, 0.0).square_().sum())
    return ValueCounts(nans, infinities, math.sqrt(squares))
