"""Merging real files of other tools: mergekit's own result, Lightning, DCP, npz, remote, PEFT."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference.merging import within_bound
from safetensors.torch import load_file, save_file

from polyak.checkpoints.merging.average import average_checkpoints
from polyak.checkpoints.merging.selection import Selection, select_checkpoints
from polyak.errors import ArgumentError, FormatError, PolyakWarning

MERGEKIT = Path(__file__).parents[2] / "data" / "mergekit"
ANY = torch.Generator().manual_seed(3)
STATES = [
    {"l.weight": torch.randn(6, 5, generator=ANY), "l.bias": torch.randn(6, generator=ANY)}
    for _ in range(3)
]


def means():
    return {name: sum(state[name] for state in STATES) / 3 for name in STATES[0]}


def assert_mean(path):
    found = load_file(path)
    assert found.keys() == STATES[0].keys()
    for name, mean in means().items():
        torch.testing.assert_close(found[name], mean, atol=1e-6, rtol=1e-6)


def test_the_same_merge_as_mergekit(tmp_path):
    """Made by mergekit 0.1.5 (scripts/make_mergekit_golden.py): weights 0.2, 0.3, 0.5, bfloat16."""
    inputs = [MERGEKIT / f"model-{i}" for i in range(3)]
    average_checkpoints(inputs, {tmp_path / "out": [0.2, 0.3, 0.5]})
    ours, theirs = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(MERGEKIT / "merged" / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    states = [load_file(folder / "model.safetensors") for folder in inputs]
    assert within_bound(ours, states, [0.2, 0.3, 0.5])
    same = sum(int((ours[n] == theirs[n]).sum()) for n in ours)
    total = sum(tensor.numel() for tensor in ours.values())
    assert same >= 0.99 * total  # they sum in float32 too; a tie may round the other way
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=2**-7, atol=1e-6)


def test_torch_archives_of_a_training_loop(tmp_path):
    for i, state in enumerate(STATES):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(t) for t in state.values()])
        torch.save(
            {"model": state, "optimizer": optimizer.state_dict(), "step": i},
            tmp_path / f"ckpt-{i + 1}.pt",
        )
    average_checkpoints(tmp_path.glob("*.pt"), {tmp_path / "out.safetensors": "swa"})
    assert_mean(tmp_path / "out.safetensors")


def test_transposed_tensors_keep_their_values(tmp_path):
    for i, state in enumerate(STATES):
        weight = state["l.weight"].t().contiguous().t()  # column-major in the file
        torch.save({**state, "l.weight": weight}, tmp_path / f"ckpt-{i + 1}.pt")
    average_checkpoints(tmp_path.glob("*.pt"), {tmp_path / "out.safetensors": "swa"})
    assert_mean(tmp_path / "out.safetensors")


def test_npz_and_mixed_formats(tmp_path):
    np.savez(
        tmp_path / "step-1.npz", **{name: tensor.numpy() for name, tensor in STATES[0].items()}
    )
    torch.save(STATES[1], tmp_path / "step-2.pt")
    save_file(STATES[2], tmp_path / "step-3.safetensors")
    average_checkpoints(sorted(tmp_path.iterdir()), {tmp_path / "out.safetensors": "swa"})
    assert_mean(tmp_path / "out.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_dcp_folders(tmp_path):
    import torch.distributed.checkpoint as dcp

    for i, state in enumerate(STATES):
        dcp.save({"model": state}, checkpoint_id=str(tmp_path / f"step-{i + 1}"), no_dist=True)
    average_checkpoints(
        sorted(tmp_path.iterdir()), {tmp_path / "out.safetensors": "swa"}, key="model"
    )
    assert_mean(tmp_path / "out.safetensors")


def test_remote_inputs(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for i, state in enumerate(STATES):
        save_file(state, tmp_path / "one.safetensors")
        memory.pipe(f"/merge/step-{i + 1}.safetensors", (tmp_path / "one.safetensors").read_bytes())
    paths = [f"memory://merge/step-{i + 1}.safetensors" for i in range(3)]
    average_checkpoints(paths, {tmp_path / "out.safetensors": "swa"}, verify=True)
    assert_mean(tmp_path / "out.safetensors")


def test_a_truncated_input_writes_nothing(tmp_path):
    for i, state in enumerate(STATES):
        save_file(state, tmp_path / f"step-{i + 1}.safetensors")
    path = tmp_path / "step-2.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError, match=r"step-2.*cut short"):
        average_checkpoints(sorted(tmp_path.iterdir()), {tmp_path / "out.safetensors": "swa"})
    assert len(list(tmp_path.iterdir())) == 3


def test_natural_order_and_copies(tmp_path):
    for name in ("epoch=0-step=500.ckpt", "epoch=1-step=1000.ckpt", "last.ckpt"):
        step = 500 if "500" in name else 1000
        torch.save({"state_dict": {"w": torch.ones(1)}, "global_step": step}, tmp_path / name)
    torch.save({}, tmp_path / "optimizer.pt")
    with pytest.warns(PolyakWarning, match=r"Left out: .*last\.ckpt \(its tensors are those of"):
        names = [Path(one.path).name for one in select_checkpoints([tmp_path])]
    assert names == ["epoch=0-step=500.ckpt", "epoch=1-step=1000.ckpt"]
    selected = select_checkpoints([str(tmp_path / "epoch*")], Selection(last=1))
    names = [Path(one.path).name for one in selected]
    assert names == ["epoch=1-step=1000.ckpt"]


def test_unknown_steps_cannot_be_selected_by(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ArgumentError, match="is unknown"):
        select_checkpoints([tmp_path], Selection(last=1))


@pytest.mark.filterwarnings("ignore")
def test_the_best_by_lightnings_own_callback(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, index):
            self.log("val_loss", torch.tensor([3.0, 1.0, 2.0][self.current_epoch]))
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    keep = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=True
    )
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[keep], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2))
    selected = select_checkpoints([tmp_path], Selection(best=2, metric="val_loss"))
    assert ["epoch=1" in selected[0].path, "epoch=2" in selected[1].path] == [True, True]
    average_checkpoints(selected, {tmp_path / "out.safetensors": "swa"})
    assert sorted(load_file(tmp_path / "out.safetensors")) == ["layer.bias", "layer.weight"]
