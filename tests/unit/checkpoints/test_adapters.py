"""Adapters: those of one run are averaged as adapters, those of separate runs refused, whatever their names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyak.checkpoints.merging.average import average_checkpoints
from polyak.errors import MismatchError

ANY = torch.Generator().manual_seed(3)


def adapter(folder, a, b, **config):

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


def normal(*shape):
    return torch.randn(shape, generator=ANY)


# Names of the factors, and their shapes.
KINDS = {
    "loralib, flat": {"q.lora_A": (4, 64), "q.lora_B": (64, 4)},
    "AdaLoRA": {"q.lora_A": (8, 64), "q.lora_B": (32, 8), "q.lora_E": (8, 1)},
    "convolution": {"c.lora_down.weight": (4, 16, 3, 3), "c.lora_up.weight": (32, 4, 1, 1)},
    "LoHa": {
        "q.hada_w1_a": (64, 4), "q.hada_w1_b": (4, 64), "q.hada_w2_a": (64, 4), "q.hada_w2_b": (4, 64),
    },
    "LoKr, whole": {"q.lokr_w1": (8, 8), "q.lokr_w2": (16, 16)},
    "LoKr, of low rank": {"q.lokr_w1": (8, 8), "q.lokr_w2_a": (64, 4), "q.lokr_w2_b": (4, 64)},
    "embedding": {"e.lora_embedding_A": (4, 100), "e.lora_embedding_B": (32, 4)},
    "VeRA's projections": {"vera_A": (4, 64), "vera_B": (64, 4)},
    "as large as the weight": {"q.lora_down.weight": (32, 16), "q.lora_up.weight": (16, 32)},
    "names nobody knows": {"net.q.left": (4, 64), "net.q.right": (64, 4), "net.scale": ()},
    "beside the weight": {
        "q.weight": (64, 48), "q.bias": (64,), "q.inner": (4, 48), "q.outer": (64, 4),
    },
}  # fmt: skip


@pytest.mark.parametrize("shapes", KINDS.values(), ids=KINDS.keys())
def test_adapters_of_separate_runs_are_refused_whatever_their_names(tmp_path, shapes):
    runs = [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(2)]
    if "q.weight" in shapes:
        runs[1]["q.weight"] = runs[0]["q.weight"]  # the frozen base
    paths = [tmp_path / f"run-{i}.safetensors" for i in range(2)]
    for path, state in zip(paths, runs, strict=True):
        save_file(state, path)
    with pytest.raises(MismatchError, match="adapters of separate runs: the cosine"):
        average_checkpoints(paths, {tmp_path / "out.safetensors": "swa"})
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("shapes", KINDS.values(), ids=KINDS.keys())
def test_adapters_of_one_run_are_averaged_whatever_their_names(tmp_path, shapes):
    """One factor begins as zero and goes anywhere; the others stay near where they began."""
    start = {name: normal(*shape) for name, shape in shapes.items()}
    zero = next(name for name in reversed(shapes) if name != "q.weight" and len(shapes[name]) > 1)
    if "lora_A" in "".join(shapes) or "lora_down" in "".join(shapes):
        zero = next(name for name in shapes if "lora_B" in name or "lora_up" in name)
    paths = []
    for step in (0, 1, 2):
        state = {name: tensor + 0.1 * normal(*tensor.shape) for name, tensor in start.items()}
        state[zero] = step * normal(*shapes[zero])
        paths.append(tmp_path / f"step-{step}.safetensors")
        save_file(state, paths[-1])
    average_checkpoints(paths, {tmp_path / "out.safetensors": "swa"})
    mean = sum(load_file(path)[zero] for path in paths) / 3
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")[zero], mean)


@pytest.mark.filterwarnings("ignore:The weights of .* are unrelated")
def test_full_models_of_separate_runs_are_no_adapters(tmp_path):
    """Bottlenecks, squeeze-and-excitation and numbered layers are factor pairs by shape, too."""
    shapes = {
        "encoder.weight": (4, 64), "encoder.bias": (4,), "decoder.weight": (64, 4), "decoder.bias": (64,),
        "se.fc1.weight": (4, 64, 1, 1), "se.fc2.weight": (64, 4, 1, 1),
        "mla.q_a_proj.weight": (4, 64), "mla.q_b_proj.weight": (64, 4),
        "adapter.q.weight": (32, 32), "adapter.k.weight": (32, 32),
        "w_lora.lora.0.weight": (4, 64), "w_lora.lora.2.weight": (64, 4),
    }  # fmt: skip
    paths = []
    for seed in (1, 2):
        paths.append(tmp_path / f"seed-{seed}.safetensors")
        save_file({name: normal(*shape) for name, shape in shapes.items()}, paths[-1])
    average_checkpoints(paths, {tmp_path / "out.safetensors": "swa"})
