"""What each of several processes does in the tests of DCP folders: train and save, or load and note."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

STEPS = (100, 200, 300)
LAYOUTS = ("plain", "nested", "titan")


class Scale(nn.Module):
    """A layer with state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(300, 70))
        self.note = "none"

    def forward(self, x):
        return x * self.weight.mean()

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def build():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(70, 300), Scale(), nn.BatchNorm1d(300), nn.Linear(300, 3))


def sharded(mesh):
    from torch.distributed.fsdp import fully_shard

    model = build()
    for layer in (model[0], model[1], model):
        fully_shard(layer, mesh=mesh)
    return model


def arranged(layout, model, optimizer, step):
    """The nested state dict of one framework or another."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    weights, rest = model.state_dict(), get_optimizer_state_dict(model, optimizer)
    state = {"step": torch.tensor(step), "ntokens_seen": torch.tensor(step * 1000), "who": "me"}
    if layout == "plain":
        return {"model": weights}
    if layout == "nested":
        return {"app": {"model": weights, "optim": rest}, "train_state": state}
    return {**weights, "optimizer": rest, "train_state": state}  # as torchtitan


def train(rank, world, folder):
    mesh = _start(rank, world, folder)
    model = sharded(mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in STEPS:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 70)).square().sum().backward()
        optimizer.step()
        model[1].note = f"after {step}"
        for layout in LAYOUTS:
            state = arranged(layout, model, optimizer, step)
            dcp.save(state, checkpoint_id=f"{folder}/{layout}/step-{step}")
        full = {name: _full(value) for name, value in model.state_dict().items()}
        if rank == 0:
            torch.save(full, f"{folder}/full-{step}.pt")
    dist.destroy_process_group()


def load(rank, world, folder, cases):
    """Load each merged folder into a model on this number of ranks; note the whole tensors."""
    mesh = _start(rank, world, folder)
    for name, layout in cases.items():
        model = sharded(mesh)
        for tensor in (*model.parameters(), *model.buffers()):
            nn.init.constant_(tensor, 9)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        state = arranged(layout, model, optimizer, 0)
        if name.endswith("-model"):  # where the optimizer was left out
            state = {k: v for k, v in state.items() if k not in ("optimizer", "train_state")}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        model.load_state_dict(_weights(state), strict=True)
        full = {key: _full(value) for key, value in model.state_dict().items()}
        if rank == 0:
            torch.save(full, f"{folder}/{name}-loaded.pt")
            seen = {k: v for k, v in state.get("train_state", {}).items() if k != "who"}
            Path(f"{folder}/{name}-seen.json").write_text(
                json.dumps({key: int(value) for key, value in seen.items()})
            )
    dist.destroy_process_group()


def _weights(state):
    found = state.get("app", state).get("model")
    return found or {k: v for k, v in state.items() if k not in ("optimizer", "train_state")}


def _full(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _start(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world
    )
    return init_device_mesh("cpu", (world,))
