"""Folders that a merge writes are loaded by the libraries whose folders it read, and compute the mean."""

import json
import os

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from polyak.checkpoints import average_checkpoints, open_checkpoint, select_checkpoints
from polyak.checkpoints.writing.hf_folder import WeightsName
from polyak.errors import ArgumentError, OutputError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

STEPS = (500, 1000, 1500)
TOKENS = torch.arange(6)[None]


def train(model, seed):
    """Move every parameter a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def mean(states):
    """In float64; what does not float is the newest's."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0)
        if newest.is_floating_point()
        else newest
        for name, newest in states[-1].items()
    }


def checkpoints_of(model, save, root):
    """A run of three checkpoints: their folders, and the mean of their state dicts."""
    states, folders = [], []
    for step in STEPS:
        train(model, step)
        states.append(copied(model))
        folders.append(root / f"checkpoint-{step}")
        save(model, folders[-1])
    return folders, mean(states)


def assert_computes(loaded, model, weights, forward):
    """The loaded model has the keys and the output of `model` with these weights."""
    assert [*loaded.state_dict()] == [*weights]
    model.load_state_dict(weights)
    model.eval()
    loaded.eval()
    with torch.no_grad():
        expected, found = forward(model), forward(loaded)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def as_bin(model, folder):
    """As Transformers before 5 saved it, and accelerate without safetensors."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_trainer(model, folder):
    """A checkpoint of the Trainer: what resumes the run is beside the weights."""
    model.save_pretrained(folder)
    step = int(folder.name.rpartition("-")[2])
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"step": step}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "all_results.json").write_text("{}")


def text(model):
    return model(input_ids=TOKENS).logits


def translation(model):
    return model(input_ids=TOKENS, decoder_input_ids=TOKENS[:, :4]).logits


def picture(model):
    return model(torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)).logits


SMALL = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = ("GPT2LMHeadModel", {**SMALL, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32})
T5 = (
    "T5ForConditionalGeneration",
    {**SMALL, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
)  # fmt: skip
MIXTRAL = (
    "MixtralForCausalLM",
    {**SMALL, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
     "num_key_value_heads": 1, "num_local_experts": 4},
)  # fmt: skip
VIT = (
    "ViTForImageClassification",
    {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
     "image_size": 16, "patch_size": 8},
)  # fmt: skip


def built(name, settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**settings))


@pytest.mark.parametrize(
    ("model", "forward", "save", "shard_size"),
    [
        (GPT2, text, as_trainer, "5GB"),  # the head is tied to the embedding
        (GPT2, text, as_bin, "5KB"),
        (T5, translation, as_bin, "5GB"),  # three names for one embedding
        (MIXTRAL, text, as_trainer, "5KB"),  # experts are apart in files and fused in the module
        (VIT, picture, as_trainer, "5GB"),
    ],
    ids=["gpt2", "gpt2-bin-shards", "t5-bin", "mixtral-shards", "vit"],
)
def test_transformers(tmp_path, model, forward, save, shard_size):
    model = built(*model)
    folders, weights = checkpoints_of(model, save, tmp_path)
    average_checkpoints(folders, tmp_path / "averaged", shard_size=shard_size)
    loaded = type(model).from_pretrained(tmp_path / "averaged")
    assert_computes(loaded, model, weights, forward)
    names = {path.name for path in (tmp_path / "averaged").iterdir()}
    assert {path.suffix for path in (tmp_path / "averaged").iterdir()} <= {".json", ".safetensors"}
    assert not names & {"trainer_state.json", "all_results.json"}
    with open_checkpoint(tmp_path / "averaged") as opened:
        assert opened.is_merged
        assert opened.step == STEPS[-1]
        with open_checkpoint(folders[-1]) as newest:
            assert (opened.tensors.keys(), opened.ties) == (newest.tensors.keys(), newest.ties)


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_the_configuration_says_the_dtype_that_is_written(tmp_path, spelling):
    transformers = pytest.importorskip("transformers")
    clip = transformers.CLIPConfig(
        text_config={**SMALL, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "max_position_embeddings": 16},
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(clip)

    def save(model, folder):
        model.save_pretrained(folder)
        found = json.loads((folder / "config.json").read_text())
        for part in (found, found["text_config"], found["vision_config"]):
            part.pop("dtype", None)
            part[spelling] = "float32"
        found["custom"] = {"torch_dtype": "torch.float32", "dtype": "tensor"}
        found["limits"] = [0.0, float("inf")]  # not JSON, and still in configurations
        (folder / "config.json").write_text(json.dumps(found))

    folders, weights = checkpoints_of(model, save, tmp_path)
    average_checkpoints(
        folders, {tmp_path / "half": "swa", tmp_path / "again": "swa"}, dtype="bf16"
    )
    written = json.loads((tmp_path / "half" / "config.json").read_text())
    assert written[spelling] == "bfloat16"
    assert written["custom"] == {"torch_dtype": "torch.bfloat16", "dtype": "tensor"}
    assert written["text_config"][spelling] == written["vision_config"][spelling] == "bfloat16"
    assert written["limits"] == [0.0, float("inf")]
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16
    assert loaded.vision_model.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name].float().to(tensor.dtype)), name
    average_checkpoints(folders, tmp_path / "kept")
    assert (tmp_path / "kept" / "config.json").read_bytes() == (
        folders[-1] / "config.json"
    ).read_bytes()


def diffusion_model(name):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    if name == "UNet2DModel":
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2, **blocks,
        )  # fmt: skip
    if name == "AutoencoderKL":
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4, **blocks,
        )  # fmt: skip
    conditional = {"cross_attention_dim": 16, "attention_head_dim": 2, **blocks}
    down = ("DownBlock2D", "CrossAttnDownBlock2D")
    if name == "ControlNetModel":
        return diffusers.ControlNetModel(
            down_block_types=down, conditioning_embedding_out_channels=(16, 32), **conditional
        )
    return diffusers.UNet2DConditionModel(
        sample_size=8, down_block_types=down, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **conditional
    )  # fmt: skip


def denoised(model):
    return model(torch.linspace(0, 1, 192).reshape(1, 3, 8, 8), 3).sample


def decoded(model):
    return model(torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)).sample


def controlled(model):
    latent, picture = torch.linspace(0, 1, 256).reshape(1, 4, 8, 8), torch.ones(1, 3, 16, 16)
    return model(latent, 3, torch.ones(1, 5, 16), picture).mid_block_res_sample


@pytest.mark.parametrize(
    ("name", "forward", "variant", "shard_size"),
    [
        ("UNet2DModel", denoised, None, "5GB"),
        ("UNet2DModel", denoised, "fp16", "20KB"),
        ("ControlNetModel", controlled, None, "20KB"),
        ("AutoencoderKL", decoded, "non_ema", "5GB"),
    ],
)
def test_diffusers(tmp_path, name, forward, variant, shard_size):
    model = diffusion_model(name)

    def save(model, folder):
        model.save_pretrained(folder, variant=variant)

    folders, weights = checkpoints_of(model, save, tmp_path)
    average_checkpoints(folders, tmp_path / "averaged", shard_size=shard_size)
    loaded = type(model).from_pretrained(tmp_path / "averaged", variant=variant)
    assert_computes(loaded, model, weights, forward)
    if shard_size == "5GB":  # diffusers writes the same names
        assert {p.name for p in folders[0].iterdir()} == {
            p.name for p in (tmp_path / "averaged").iterdir()
        }


def test_a_named_file_stands_for_its_folder(tmp_path):
    model = diffusion_model("UNet2DModel")
    folders, weights = checkpoints_of(model, lambda m, f: m.save_pretrained(f / "unet"), tmp_path)
    files = [folder / "unet" / "diffusion_pytorch_model.safetensors" for folder in folders]
    average_checkpoints(files, tmp_path / "averaged")
    loaded = type(model).from_pretrained(tmp_path / "averaged")
    assert_computes(loaded, model, weights, denoised)


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    words = ["<|startoftext|>", "<|endoftext|>", *(chr(97 + i) for i in range(26))]
    words += [f"{word}</w>" for word in words[2:]]
    return transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16
    )


@pytest.fixture
def pipelines(tmp_path, tokenizer):
    """Three folders of Stable Diffusion, in which the autoencoder was not trained; and the means."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        unet=diffusion_model("UNet2DConditionModel"),
        vae=diffusion_model("AutoencoderKL"),
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    states, folders = [], []
    for step in STEPS:
        train(pipe.unet, step)
        train(pipe.text_encoder, step)
        states.append({n: copied(getattr(pipe, n)) for n in ("unet", "vae", "text_encoder")})
        folders.append(tmp_path / f"checkpoint-{step}")
        pipe.save_pretrained(folders[-1])
    return pipe, folders, {name: mean([state[name] for state in states]) for name in states[0]}


def painted(pipe):
    return torch.from_numpy(
        pipe("a b", num_inference_steps=2, height=16, width=16, output_type="np",
             generator=torch.Generator().manual_seed(0)).images
    )  # fmt: skip


def test_a_pipeline_is_averaged_model_by_model(tmp_path, pipelines):
    pipe, folders, weights = pipelines
    target = tmp_path / "averaged"
    average_checkpoints(folders, target, shard_size="20KB")
    loaded = type(pipe).from_pretrained(target)
    for name, expected in weights.items():
        assert [*getattr(loaded, name).state_dict()] == [*expected]
        getattr(pipe, name).load_state_dict(expected)
    pipe.set_progress_bar_config(disable=True)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(painted(loaded), painted(pipe), atol=1e-4, rtol=1e-4)
    same = (folders[-1] / "vae" / "config.json").read_bytes()
    assert (target / "vae" / "config.json").read_bytes() == same
    assert (target / "scheduler" / "scheduler_config.json").exists()
    for name, tensor in copied(loaded.vae).items():  # equal in all inputs: simply itself
        assert torch.equal(tensor, weights["vae"][name].float())
    with open_checkpoint(target) as opened:
        assert opened.is_merged
        assert {name.partition("/")[0] for name in opened.tensors} == {
            "unet",
            "vae",
            "text_encoder",
        }
    average_checkpoints(folders, target, shard_size="20KB", resume=True)  # done already
    average_checkpoints(folders, target, overwrite=True, dtype="float16")
    text_config = json.loads((target / "text_encoder" / "config.json").read_text())
    assert text_config.get("dtype", text_config.get("torch_dtype")) == "float16"
    assert type(pipe).from_pretrained(target, torch_dtype=torch.float16).unet.dtype == torch.float16


def test_several_models_need_a_folder_and_line_up_one_by_one(tmp_path, pipelines):
    _, folders, _ = pipelines
    with pytest.raises(ArgumentError, match=r"several models \(.*unet/diffusion.*is one file"):
        average_checkpoints(folders, tmp_path / "averaged.safetensors")
    assert not (tmp_path / "averaged.safetensors").exists()
    average_checkpoints(folders, tmp_path / "unet", exclude=["vae/*", "text_encoder/*"])
    with open_checkpoint(tmp_path / "unet") as written, open_checkpoint(folders[-1]) as newest:
        name = "text_encoder/text_model.final_layer_norm.weight"
        name = name if name in newest.tensors else next(n for n in newest.tensors if "text_" in n)
        assert torch.equal(written.tensors[name].load(), newest.tensors[name].load())
    with_copies = select_checkpoints([tmp_path])
    assert [one.step for one in with_copies] == list(STEPS)
    for one in with_copies:
        one.close()


BERT = {
    **SMALL, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


class Sentences(nn.Module):
    """As sentence-transformers computes: a Transformer, the mean over tokens, a dense layer."""

    def __init__(self, transformer, dense):
        super().__init__()
        self.transformer, self.dense = transformer, dense

    def forward(self, tokens):
        return torch.tanh(self.dense(self.transformer(input_ids=tokens).last_hidden_state.mean(1)))


def save_sentences(model, folder):
    """The layout of sentence-transformers 6.2.0, which loaded such an average (checked by hand)."""
    model.transformer.save_pretrained(folder)
    kinds = {
        "": "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Normalize": "Normalize",
    }
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text("{}")
    for path in [*kinds][1:]:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps({"from": folder.name}))
    save_model(model.dense, folder / "2_Dense" / "model.safetensors")


@pytest.mark.parametrize("shard_size", ["5GB", "2KB"])
def test_sentence_transformers(tmp_path, shard_size):
    transformers = pytest.importorskip("transformers")
    model = Sentences(built("BertModel", BERT), nn.Linear(16, 8))
    folders, weights = checkpoints_of(model, save_sentences, tmp_path)
    target = tmp_path / "averaged"
    average_checkpoints(folders, target, shard_size=shard_size)
    names = {str(path.relative_to(folders[-1])) for path in folders[-1].rglob("*.json")}
    assert names <= {str(path.relative_to(target)) for path in target.rglob("*.json")}
    assert json.loads((target / "1_Pooling" / "config.json").read_text()) == {
        "from": "checkpoint-1500"
    }
    dense = nn.Linear(16, 8)
    load_model(
        dense, target / "2_Dense" / "model.safetensors"
    )  # the library looks for no shards here
    loaded = Sentences(transformers.BertModel.from_pretrained(target), dense)
    assert_computes(loaded, model, weights, lambda model: model(TOKENS))


@pytest.mark.parametrize("adapters", [["default"], ["default", "other"]])
def test_peft(tmp_path, adapters):
    peft = pytest.importorskip("peft")

    def adapted():
        model = built(*GPT2)
        settings = peft.LoraConfig(
            r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True
        )
        found = peft.get_peft_model(model, settings)
        for name in adapters[1:]:
            found.add_adapter(name, settings)
        for name, parameter in found.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return found

    def trained_adapters(model, folder):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data.copy_(base[name])
        model.save_pretrained(folder)

    model = adapted()
    base = copied(model)
    folders, weights = checkpoints_of(model, trained_adapters, tmp_path)
    weights = {name: value if "lora_" in name else base[name] for name, value in weights.items()}
    average_checkpoints(folders, tmp_path / "averaged", shard_size="1KB")
    loaded = peft.PeftModel.from_pretrained(built(*GPT2), tmp_path / "averaged")
    for name in adapters[1:]:
        loaded.load_adapter(tmp_path / "averaged" / name, name)
    for name in adapters:
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert_computes(loaded, model, weights, text)


def test_accelerate_keeps_every_model_of_a_state(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    models = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 2)])
    prepared = [accelerator.prepare(model) for model in models]
    assert prepared
    folders, weights = checkpoints_of(models, lambda _, f: accelerator.save_state(f), tmp_path)
    with pytest.raises(ArgumentError, match=r"model_1\.safetensors"):
        average_checkpoints(folders, tmp_path / "averaged.safetensors")
    average_checkpoints(folders, tmp_path / "averaged")
    assert {p.name for p in (tmp_path / "averaged").iterdir()} == {
        "model.safetensors",
        "model_1.safetensors",
    }
    for index, file in enumerate(("model.safetensors", "model_1.safetensors")):
        fresh = nn.Linear(*models[index].weight.shape[::-1])
        accelerate.load_checkpoint_in_model(fresh, str(tmp_path / "averaged" / file))
        expected = weights[f"{index}.weight"].float()
        torch.testing.assert_close(fresh.weight.data, expected, atol=1e-6, rtol=1e-6)


def test_only_what_a_merge_wrote_is_replaced_sub_folders_too(tmp_path, pipelines):
    _, folders, _ = pipelines
    project = tmp_path / "project"
    (project / "code").mkdir(parents=True)
    (project / "code" / "train.py").write_text("mine")
    with pytest.raises(OutputError, match="what no merge wrote"):
        average_checkpoints(folders, project, overwrite=True)
    target = tmp_path / "averaged"
    average_checkpoints(folders, target)
    average_checkpoints(folders, target, overwrite=True)
    (target / "unet" / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"holds unet/notes\.md"):
        average_checkpoints(folders, target, overwrite=True)
    assert (project / "code" / "train.py").read_text() == (target / "unet" / "notes.md").read_text()


def test_equal_merges_give_equal_folders(tmp_path, pipelines):
    _, folders, _ = pipelines
    written = []
    for name in ("one", "two"):
        average_checkpoints(folders, tmp_path / name, shard_size="20KB")
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        written.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files})
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("found", "written", "index"),
    [
        ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin.index.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.fp16.bin", "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"),
        (
            "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
            "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
        ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors", None),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors", None),
        ("adapter_model.bin", "adapter_model.safetensors", None),
        ("2_Dense/pytorch_model.bin", "2_Dense/model.safetensors", None),
        ("pytorch_model_1.bin", "model_1.safetensors", None),
        (".metadata", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_names_of_weights(found, written, index):
    name = WeightsName.like(found)
    assert name.may_be_sharded is (index is not None)
    assert name.files(2 if index else 1)[0] == written
    assert index is None or name.index == index


def test_a_tokenizer_keeps_all_its_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    templates = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), chat_template=templates
    )

    def save(model, folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "modeling_mine.py").write_text("# trust_remote_code")

    folders, _ = checkpoints_of(built(*VIT), save, tmp_path)
    average_checkpoints(folders, tmp_path / "averaged")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "averaged")
    assert loaded.chat_template == templates
    assert (tmp_path / "averaged" / "modeling_mine.py").exists()


def test_a_folder_at_a_remote_store_brings_its_configuration(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    folders, _ = checkpoints_of(built(*VIT), lambda m, f: m.save_pretrained(f), tmp_path)
    store = fsspec.filesystem("memory")
    for folder in folders:
        store.put(str(folder), f"/loads-back/{folder.name}", recursive=True)
    average_checkpoints([f"memory://loads-back/{f.name}" for f in folders], tmp_path / "remote")
    average_checkpoints(folders, tmp_path / "local")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "remote" / name).exists()
    same = (tmp_path / "local" / "config.json").read_bytes()
    assert (tmp_path / "remote" / "config.json").read_bytes() == same


def test_a_final_model_above_its_run_does_not_hide_the_run(tmp_path):
    model = Sentences(built("BertModel", BERT), nn.Linear(16, 8))
    folders, _ = checkpoints_of(model, save_sentences, tmp_path / "run")
    save_sentences(
        model, tmp_path / "run"
    )  # 2_Dense has a number and weights, and is no checkpoint
    for inputs, steps in (([tmp_path / "run"], list(STEPS)), (folders[:1], [500])):
        found = select_checkpoints(inputs)
        assert [one.step for one in found] == steps
        assert all("2_Dense/weight" in one.tensors for one in found)
        for one in found:
            one.close()
