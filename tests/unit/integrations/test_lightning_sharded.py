"""The Lightning adapter where FSDP2 shards the module: two forked ranks, one training, many facts."""

from __future__ import annotations

import json
import logging
import os
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from reference.ranks import become_rank, free_port, launch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import polyak

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from polyak.integrations.lightning import WeightAveraging

PROFILES = {"ema": "ema:decay=0.5", "swa": "swa"}


class Strategy(ModelParallelStrategy):
    def _determine_device_ids(self):
        return None  # Lightning's asks the index of a GPU


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.steps, self.scores = [], []

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self.net[0].weight, DTensor):
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, _):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, _):
        self.scores.append(float(self.training_step(batch, 0)))

    def on_train_batch_end(self, *_):
        self.steps.append(whole(self.state_dict()))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def whole(state):
    return {
        n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for n, t in state.items()
    }


def data():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(16, 3), torch.randn(16, 1)), batch_size=4)


def fitted(epochs, *others, folders=True, ckpt_path=None, sharded=True):
    callback, module = WeightAveraging(PROFILES), Net()
    of = {
        "strategy": Strategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=folders,
            process_group_backend="gloo",
        ),
        "devices": 2,
    }
    trainer = Trainer(
        callbacks=[callback, *others], max_epochs=epochs, accelerator="cpu", logger=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(others),
        use_distributed_sampler=False, **(of if sharded else {}),
    )  # fmt: skip
    trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
    return trainer, module, callback


def facts(folder):
    """What must hold, by name; each rank says the same."""
    found = {}
    _, module, callback = fitted(2)
    found["sharded"] = isinstance(module.net[0].weight, DTensor)
    expected = module.steps[0]
    for step in module.steps[1:]:
        expected = {n: 0.5 * expected[n] + 0.5 * t for n, t in step.items()}
    left = whole(module.state_dict())
    found["count"] = callback.average["ema"].count == 8
    torch.save((module.scores, left), f"{folder}/scores-{os.environ['RANK']}.pt")
    found["raw"] = same(whole(callback.raw_weights()), module.steps[-1])
    for folders in (True, False):
        name = "folder" if folders else "file"
        path = f"{folder}/{name}.ckpt"
        first, _, _ = fitted(1, ModelCheckpoint(folder, filename=name), folders=folders)
        if not folders:
            first.save_checkpoint(path)  # once more, after the fit
        _, again, resumed = fitted(2, folders=folders, ckpt_path=path)
        found[f"resumed {folders}"] = same(whole(again.state_dict()), left)
        found[f"raw {folders}"] = same(whole(resumed.raw_weights()), module.steps[-1])
        for name, average in callback.average.items():
            tensors = whole(average.averaged_tensors())
            found[f"{name} {folders}"] = same(
                tensors, whole(resumed.average[name].averaged_tensors())
            )
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def rank(index, n_ranks, folder, port):
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    become_rank(index, n_ranks, port, GROUP_RANK="0", TORCHELASTIC_RUN_ID="test")
    try:
        found = facts(folder)
    except BaseException:
        found = {"failed": traceback.format_exc()}
    Path(folder, f"{index}.json").write_text(json.dumps(found))


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_module_is_averaged_validated_saved_and_resumed(tmp_path):
    launch(rank, 2, str(tmp_path), free_port())
    for index in range(2):
        found = json.loads((tmp_path / f"{index}.json").read_text())
        assert "failed" not in found, found["failed"]
        assert all(found.values()), found
    _, module, callback = fitted(2, sharded=False)
    scores, left = torch.load(tmp_path / "scores-0.pt")
    assert scores == pytest.approx(module.scores)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(left[name], tensor)
    assert isinstance(callback.average, polyak.Averages)
