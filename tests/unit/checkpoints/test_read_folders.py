"""Folders of Transformers, PEFT and Lightning, made by the libraries themselves."""

import json
import re

import pytest
import torch
from reference.stored import assert_reads
from safetensors.torch import load_file, save_file

from polyak import average_checkpoints
from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.reading.folders import step_in_name
from polyak.errors import ArgumentError, FormatError, MismatchError

# Third-party libraries warn about their own internals while they build models and train.
libraries = pytest.mark.filterwarnings("ignore")


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    model = tiny_llama()
    model.save_pretrained(folder / "one" / "checkpoint-500")
    model.save_pretrained(folder / "shards", max_shard_size="8KB")
    (folder / "one" / "checkpoint-500" / "trainer_state.json").write_text('{"global_step": 499}')
    return folder, dict(model.state_dict())


@libraries
def test_one_file_of_transformers(llama):
    folder, state = llama
    with open_checkpoint(folder / "one" / "checkpoint-500") as checkpoint:
        assert_reads(checkpoint, state)
        assert checkpoint.step == 499  # what the trainer wrote counts before the name
    (folder / "one" / "checkpoint-500" / "trainer_state.json").write_text('{"global_step": "x"}')
    with pytest.raises(FormatError, match="global_step is 'x'"):
        open_checkpoint(folder / "one" / "checkpoint-500")


@libraries
def test_shards_of_transformers(llama):
    folder, state = llama
    shards = sorted(folder.glob("shards/*.safetensors"))
    assert len(shards) > 2
    for path in (folder / "shards", folder / "shards" / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert_reads(checkpoint, state)
            assert checkpoint.format == "safetensors shards"
            assert len(checkpoint.files) == len(shards)


@libraries
def test_old_bin_shards(llama, tmp_path):
    _, state = llama
    names = sorted(state)
    parts = {
        "pytorch_model-00001-of-00002.bin": names[:5],
        "pytorch_model-00002-of-00002.bin": names[5:],
    }
    for part, held in parts.items():
        torch.save({name: state[name] for name in held}, tmp_path / part)
    index = {
        "metadata": {},
        "weight_map": {name: part for part, held in parts.items() for name in held},
    }
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        assert_reads(checkpoint, state)


@libraries
def test_tied_embeddings_of_bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, max_position_embeddings=8,
        )
    )  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    state = dict(model.state_dict())
    with open_checkpoint(tmp_path) as checkpoint:
        assert_reads(checkpoint, state)
        alias = "cls.predictions.decoder.weight"
        assert checkpoint.ties[alias] == "bert.embeddings.word_embeddings.weight"


def sharded(folder):
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"missing \(1\): model-00002-of-00002"):
        open_checkpoint(tmp_path)


def test_an_index_and_shards_that_disagree(tmp_path):
    weight_map = sharded(tmp_path)
    write_index(tmp_path, {**weight_map, "c": weight_map["a"]})
    with pytest.raises(MismatchError, match=r"missing \(1\): c"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"a": weight_map["a"]})
    save_file({"a": torch.ones(2), "z": torch.ones(2)}, tmp_path / weight_map["a"])
    with pytest.raises(MismatchError, match=r"unexpected \(1\): z"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / weight_map["a"])
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / weight_map["b"])
    write_index(tmp_path, weight_map)
    with pytest.raises(MismatchError, match="a: in 2 shards"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../x", "/x", "", "..", 7, "a\\b", None])
def test_an_index_that_points_out_of_its_folder(tmp_path, shard):
    write_index(tmp_path, {"a": shard})
    with pytest.raises(FormatError, match="not a file name"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "{"])
def test_an_index_that_is_damaged(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


def test_which_file_of_a_folder(tmp_path):
    with pytest.raises(FormatError, match="found nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FormatError, match=r"found notes\.txt"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    assert_reads(open_checkpoint(tmp_path), {"a": torch.ones(1)})
    save_file({"b": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match=r"several files of weights: other.*Name one"):
        open_checkpoint(tmp_path)
    save_file({"c": torch.ones(1)}, tmp_path / "model.safetensors")
    assert_reads(open_checkpoint(tmp_path), {"c": torch.ones(1)})


def test_shards_without_an_index_and_deepspeed(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FormatError, match="no index"):
        open_checkpoint(tmp_path)
    deepspeed = tmp_path / "ds"
    deepspeed.mkdir()
    (deepspeed / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(FormatError, match="zero_to_fp32"):
        open_checkpoint(deepspeed)


@libraries
def test_an_adapter_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_reads(checkpoint, expected)
        assert all("lora_" in name for name in checkpoint.tensors)


def fit_lightning(folder):
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self, width=3):
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Sequential(torch.nn.Linear(width, 4), torch.nn.BatchNorm1d(4))

        def training_step(self, batch, _):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3))
    trainer = lightning.Trainer(
        max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", default_root_dir=folder,
        callbacks=[EMAWeightAveraging(decay=0.5), ModelCheckpoint(folder, every_n_train_steps=2)],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=4))
    return trainer


@libraries
def test_a_checkpoint_of_lightning(tmp_path):
    pytest.importorskip("lightning")
    fit_lightning(tmp_path)
    (path,) = tmp_path.glob("*.ckpt")
    assert re.fullmatch(r"epoch=\d-step=2\.ckpt", path.name)
    whole = torch.load(path, weights_only=False)
    with open_checkpoint(path) as checkpoint:
        assert_reads(checkpoint, dict(whole["state_dict"]))
        assert checkpoint.step == 2
        assert (
            checkpoint.metadata["pytorch-lightning_version"] == whole["pytorch-lightning_version"]
        )
    with open_checkpoint(path, key="current_model_state") as checkpoint:
        assert_reads(checkpoint, dict(whole["current_model_state"]))
    with pytest.raises(ArgumentError, match="no key 'averaged'"):
        open_checkpoint(path, key="averaged")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("step_000500", 500),
        ("epoch=3-step=500.ckpt", 500),
        ("global_step12", 12),
        ("iter_0000100", 100),
        ("model_7.pt", 7),
        ("epoch-9.safetensors", 9),
        ("0042.pt", 42),
        ("checkpoint-500-of-run-2", 500),
        ("model-00001-of-00002.safetensors", None),
        ("resnet-50.pt", None),
        ("llama-3-8B", None),
        ("swa.pt", None),
        ("checkpoint_best.pt", None),
        ("v1.5.pt", None),
    ],
)
def test_steps_in_names(name, step):
    assert step_in_name(name) == step


def test_the_step_of_a_file_in_a_checkpoint_folder(tmp_path):
    folder = tmp_path / "checkpoint-70"
    folder.mkdir()
    save_file({"w": torch.ones(1)}, folder / "model.safetensors")
    save_file({"w": torch.ones(1)}, folder / "swa.safetensors")
    assert open_checkpoint(folder / "model.safetensors").step == 70
    assert open_checkpoint(folder / "swa.safetensors").step is None
    (folder / "trainer_state.json").write_text('{"global_step": 71}')
    assert open_checkpoint(folder / "model.safetensors").step == 71


@libraries
def test_a_checkpoint_of_the_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = tiny_llama()
    tokens = torch.arange(8) % 64
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=1,
            report_to=[], disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=[{"input_ids": tokens, "labels": tokens}] * 4,
    )  # fmt: skip
    trainer.train()
    with open_checkpoint(tmp_path / "checkpoint-2") as checkpoint:
        assert_reads(checkpoint, dict(model.state_dict()))
        assert checkpoint.step == 2
    with open_checkpoint(tmp_path / "checkpoint-2" / "optimizer.pt", key="state") as checkpoint:
        assert "0.exp_avg" in checkpoint.tensors


@libraries
def test_the_folder_that_accelerate_writes_under_fsdp(tmp_path):
    import torch.distributed.checkpoint as dcp

    state = {"w": torch.randn(3, 4)}
    folder = tmp_path / "checkpoint-9"
    dcp.save({"model": state}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    (folder / "optimizer_0").mkdir()
    with open_checkpoint(folder) as checkpoint:
        assert_reads(checkpoint, state)
        assert checkpoint.step == 9


@pytest.mark.parametrize(
    ("shards", "index", "averaged"),
    [
        (
            "model.fp16-{:05}-of-00002.safetensors",
            "model.safetensors.index.fp16.json",
            "model.fp16.safetensors",
        ),
        (
            "diffusion_pytorch_model-{:05}-of-00002.bf16.safetensors",
            "diffusion_pytorch_model.safetensors.index.bf16.json",
            "diffusion_pytorch_model.bf16.safetensors",
        ),
        (
            "pytorch_model.my-own-{:05}-of-00002.bin",
            "pytorch_model.bin.index.my-own.json",
            "model.my-own.safetensors",
        ),
    ],
)
def test_shards_of_a_variant(tmp_path, shards, index, averaged):
    names = [shards.format(number) for number in (1, 2)]
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    for (key, tensor), name in zip(state.items(), names, strict=True):
        write = torch.save if name.endswith(".bin") else save_file
        write({key: tensor}, tmp_path / name)
    weight_map = dict(zip(state, names, strict=True))
    (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, tmp_path / index):
        assert_reads(open_checkpoint(path), state)
    (tmp_path / "config.json").write_text("{}")
    average_checkpoints([tmp_path], tmp_path / "out")  # an index of what it lacks does not go along
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", averaged}


@libraries
def test_variants_that_transformers_and_diffusers_write(tmp_path):
    from diffusers import UNet2DModel

    model = tiny_llama()
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    for one, size in ((model, "8KB"), (unet, "100KB")):
        folder = tmp_path / type(one).__name__
        one.save_pretrained(folder, variant="fp16", max_shard_size=size)
        assert len(list(folder.glob("*.safetensors.index.fp16.json"))) == 1
        assert_reads(open_checkpoint(folder), dict(one.state_dict()))
