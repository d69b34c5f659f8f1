"""State dicts of DTensors as torch.save writes them on each process, in processes of their own."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def save_dtensors(rank, world, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    mesh = init_device_mesh("cpu", (world,))
    model = build_model()
    fully_shard(model, mesh=mesh)
    torch.save({"state_dict": model.state_dict()}, f"{folder}/fsdp-{world}-{rank}.pt")
    whole = torch.arange(6.0).reshape(2, 3)
    placed = {
        "replicated": distribute_tensor(whole, mesh, [Replicate()]),
        "columns": distribute_tensor(whole, mesh, [Shard(1)]),
        "one row": distribute_tensor(whole[:1], mesh, [Shard(0)]),
        "partial": DTensor.from_local(whole, mesh, [Partial()]),
    }
    torch.save(placed, f"{folder}/placed-{world}-{rank}.pt")
    dist.destroy_process_group()


def whole_tensors():
    """What the ranks of `save_rank_shards` hold together."""
    return {
        "rows": torch.arange(21.0).reshape(7, 3),
        "columns": torch.arange(8.0).reshape(2, 4).bfloat16(),
        "one row": torch.arange(3.0).reshape(1, 3),
        "replicated": torch.ones(3),
        "plain": torch.arange(4),
        "scalar": torch.tensor(2.0),
    }


def save_rank_shards(rank, world, folder):
    """Every rank's own safetensors files, once in one part, once in two."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    mesh = init_device_mesh("cpu", (world,))
    state = whole_tensors()
    for name, place in (("rows", 0), ("columns", 1), ("one row", 0)):
        state[name] = distribute_tensor(state[name], mesh, [Shard(place)])
    state["replicated"] = distribute_tensor(state["replicated"], mesh, [Replicate()])
    parts = {name: 1 + number % 2 for number, name in enumerate(state)}
    for place, mapping in (("one", None), ("two", parts)):
        writer = dcp.HuggingFaceStorageWriter(
            f"{folder}/{place}", fqn_to_index_mapping=mapping, save_distributed=True
        )
        dcp.save(state, storage_writer=writer)
    dist.destroy_process_group()
