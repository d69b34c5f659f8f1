"""What each of two processes does in the test of ranks: a module, so that `spawn` can import it."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import polyak.errors
from polyak.batchnorm import update_bn


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(61, 3, 4, 4, generator=generator).sort(0).values + 2


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(
            nn.Sequential(nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True))
        )
        parts = [data()[:17].split(8), data()[17:].split(9)]  # uneven, also in their number
        update_bn(model, list(parts[rank]))
        empty_handed = nn.BatchNorm2d(3)
        update_bn(empty_handed, [data()] if rank else [])
        messages = []
        poisoned = [data() * (torch.nan if rank else 1.0)]
        for batches in ([], poisoned):
            try:
                update_bn(nn.BatchNorm2d(3), batches)
            except polyak.errors.PolyakError as error:
                messages.append(str(error))
        state = {**model.module.state_dict(), "alone": empty_handed.running_var}
        torch.save((state, messages), f"{folder}/rank{rank}.pt")
    finally:
        distributed.destroy_process_group()
