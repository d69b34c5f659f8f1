"""A process of several that save an FSDP2 model with DCP; in a module, so that it can be spawned."""

import torch
import torch.distributed.checkpoint as dcp


def build_model():
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))


def save_sharded(rank, world, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    mesh = init_device_mesh("cpu", (world,))
    model = build_model()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    torch.manual_seed(7)
    wide = torch.randn(5, 9)
    extra = {
        "columns": distribute_tensor(wide, mesh, [Shard(1)]),
        "replicated": distribute_tensor(wide, mesh, [Replicate()]),
    }
    dcp.save({"model": model.state_dict(), "extra": extra}, checkpoint_id=f"{folder}/ckpt")
    dist.destroy_process_group()
