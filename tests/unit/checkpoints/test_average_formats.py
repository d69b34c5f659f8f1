"""Merging real files of other tools: mergekit's own result, Lightning, DCP, npz, remote, PEFT."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference.merging import within_bound
from safetensors.torch import load_file, save_file

from polyak.checkpoints.merging.average import average_checkpoints
from polyak.checkpoints.merging.selection import Selection, scores_for, select_checkpoints
from polyak.checkpoints.reading.stored import Checkpoint
from polyak.errors import ArgumentError, FormatError, MismatchError

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


def adapter(folder, a, b, **config):
    import json

    folder.mkdir(parents=True)
    tensors = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_adapters_of_one_run_are_averaged_as_adapters(tmp_path):
    a = torch.randn(4, 32, generator=ANY)
    for i in (1, 2):
        adapter(
            tmp_path / f"checkpoint-{i}",
            a + 0.01 * i,
            torch.full((32, 4), float(i)),
            target_modules=["v", "q"][:: 2 * i - 3],
        )
    average_checkpoints(
        [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"], {tmp_path / "out": "swa"}
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    torch.testing.assert_close(found["base_model.model.q.lora_A.weight"], a + 0.015)


def test_adapters_that_do_not_belong_together(tmp_path):
    a, b = torch.randn(4, 512, generator=ANY), torch.ones(32, 4)
    adapter(tmp_path / "one", a, b)
    adapter(tmp_path / "alpha", a, b, lora_alpha=16)
    adapter(tmp_path / "stranger", torch.randn(4, 512, generator=ANY), b)
    out = {tmp_path / "out": "swa"}
    with pytest.raises(MismatchError, match=r"lora_alpha: 8 in .*, 16 in"):
        average_checkpoints([tmp_path / "one", tmp_path / "alpha"], out)
    with pytest.raises(
        MismatchError, match=r"separate runs: the cosine .* Averaging A and B separately"
    ):
        average_checkpoints([tmp_path / "one", tmp_path / "stranger"], out)
    save_file({"base_model.model.q.lora_A.weight": a}, tmp_path / "bare.safetensors")
    assert not (tmp_path / "out").exists()


def test_natural_order_and_copies(tmp_path):
    for name in ("epoch=0-step=500.ckpt", "epoch=1-step=1000.ckpt", "last.ckpt"):
        step = 500 if "500" in name else 1000
        torch.save({"state_dict": {"w": torch.ones(1)}, "global_step": step}, tmp_path / name)
    torch.save({}, tmp_path / "optimizer.pt")
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


def test_scores_from_tables(tmp_path):
    checkpoints = [
        Checkpoint(f"run/step-{step}.pt", "torch", {}, (), step=step) for step in (1, 2, 3)
    ]
    (tmp_path / "s.csv").write_text("step,accuracy\n1,0.5\n2,nan\n3,0.75\n")
    assert scores_for(checkpoints, "accuracy", tmp_path / "s.csv") == {
        "run/step-1.pt": 0.5,
        "run/step-3.pt": 0.75,
    }
    (tmp_path / "s.jsonl").write_text('{"file": "step-2.pt", "nll": 2.5}\n{"other": 1}\n')
    assert scores_for(checkpoints, "nll", tmp_path / "s.jsonl") == {"run/step-2.pt": -2.5}
    (tmp_path / "bad.csv").write_text("step,accuracy\none,0.5\n")
    with pytest.raises(FormatError, match="expected numbers"):
        scores_for(checkpoints, "accuracy", tmp_path / "bad.csv")
    with pytest.raises(ArgumentError, match="Could not read scores"):
        scores_for(checkpoints, "accuracy", tmp_path / "none.csv")


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_peft_wrote(tmp_path):
    peft = pytest.importorskip("peft")

    def run(seed, name):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)),
            peft.LoraConfig(r=4, target_modules=["0", "1"]),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in (1, 2, 3):
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            model.save_pretrained(tmp_path / name / f"checkpoint-{step}")
        return model

    run(0, "one")
    run(1, "two")
    average_checkpoints((tmp_path / "one").iterdir(), {tmp_path / "out": "swa"})
    base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").state_dict()
    states = [
        load_file(tmp_path / "one" / f"checkpoint-{i}" / "adapter_model.safetensors")
        for i in (1, 2, 3)
    ]
    for name in states[0]:
        mean = sum(state[name] for state in states) / 3
        key = name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        torch.testing.assert_close(loaded[key], mean, atol=1e-6, rtol=1e-6)
    with pytest.raises(MismatchError, match="separate runs"):
        average_checkpoints(
            [tmp_path / "one/checkpoint-3", tmp_path / "two/checkpoint-3"], {tmp_path / "x": "swa"}
        )
