"""Which rank this is, and what all over which a model is sharded find out together: every one must call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak.tensors.sharding import is_first_replica, is_sharded


def rank() -> int:
    """Of this process in the default process group; 0 without one."""
    distributed = torch.distributed
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if there else 0


class ShardRanks:
    """The ranks over which tensors are sharded. Without any sharded tensor nothing is communicated."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        meshes = {t.device_mesh: None for t in tensors if is_sharded(t)}
        self._meshes = [mesh for mesh in meshes if mesh.get_coordinate() is not None]

    def __bool__(self) -> bool:
        return bool(self._meshes)

    def union(self, names: Sequence[str]) -> list[str]:
        """The names that any of the ranks has given; one number is sent where none has."""
        if not self._meshes or not self._any(bool(names)):
            return list(names)
        found = list(names)
        for group in self._groups():
            parts: list[Any] = [None] * group.size()
            torch.distributed.all_gather_object(parts, found, group=group)
            found = list(dict.fromkeys(name for part in parts for name in part))
        return found

    def total(self, tensors: Sequence[Tensor], terms: Sequence[tuple[float, ...]]) -> list[float]:
        """The sums over all ranks of what each has of these tensors, replicas once, one for each term."""
        width = len(terms[0])
        plain = [0.0] * width
        sharded = {mesh: [0.0] * width for mesh in self._meshes}
        for tensor, values in zip(tensors, terms, strict=True):
            if is_sharded(tensor) and not is_first_replica(tensor):
                continue
            into = sharded[tensor.device_mesh] if is_sharded(tensor) else plain
            into[:] = [a + b for a, b in zip(into, values, strict=True)]
        for mesh, sums in sharded.items():
            everywhere = torch.tensor(sums, dtype=torch.float64, device=mesh.device_type)
            for group in mesh.get_all_groups():
                torch.distributed.all_reduce(everywhere, group=group)
            plain = [a + b for a, b in zip(plain, everywhere.tolist(), strict=True)]
        return plain

    def mean(self, value: float) -> float:
        """The mean over all ranks: the same number on each."""
        for mesh in self._meshes:
            sent = torch.tensor(value, dtype=torch.float64, device=mesh.device_type)
            for group in mesh.get_all_groups():
                torch.distributed.all_reduce(sent, group=group)
                sent /= group.size()
            value = float(sent)
        return value

    def _any(self, flag: bool) -> bool:
        for mesh in self._meshes:
            sent = torch.tensor(float(flag), device=mesh.device_type)
            for group in mesh.get_all_groups():
                torch.distributed.all_reduce(sent, torch.distributed.ReduceOp.MAX, group=group)
            flag = bool(sent)
        return flag

    def _groups(self) -> list[Any]:
        groups = {id(g): g for mesh in self._meshes for g in mesh.get_all_groups()}
        return list(groups.values())
