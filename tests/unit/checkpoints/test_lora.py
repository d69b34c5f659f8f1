"""Adapters of separate runs merged as products: what PEFT computes with the result is the law."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyak.checkpoints import merge_adapters
from polyak.errors import ArgumentError, FormatError, MismatchError, NonFiniteError, OutputError


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 16)
        self.q = nn.Linear(16, 12, bias=False)
        self.conv = nn.Conv1d(12, 10, 3)
        self.gpt = Conv1D(9, 10)
        self.head = nn.Linear(9, 5)

    def forward(self, tokens):
        hidden = self.q(self.embed(tokens)).transpose(1, 2)
        return self.head(self.gpt(self.conv(hidden).transpose(1, 2)))


def network():
    torch.manual_seed(0)
    return Network()


def adapter(folder, seed, **config):
    """A trained adapter, as PEFT writes it."""
    wrapped = get_peft_model(network(), LoraConfig(**{"r": 3, "target_modules": ["q"], **config}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if weight.requires_grad:
                noise = 0.3 * torch.randn_like(weight)
                weight.copy_(weight * noise.exp() if "magnitude" in name else weight + noise)
    wrapped.save_pretrained(folder)
    return folder


def effective(folder):
    """The full weights of the network with the adapter, in float64, as PEFT merges them."""
    wrapped = PeftModel.from_pretrained(
        network().double(), folder, autocast_adapter_dtype=False
    ).double()
    return {n: w.clone() for n, w in wrapped.merge_and_unload().state_dict().items()}


def expected(folders, weights=None):
    states = [effective(folder) for folder in folders]
    weights = weights or [1 / len(states)] * len(states)
    start = {n: w.double() for n, w in network().state_dict().items()}
    return {
        n: w + sum(c * (one[n] - w) for c, one in zip(weights, states, strict=True))
        for n, w in start.items()
    }


def same(found, wanted, atol=1e-6):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, wanted[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


KINDS = {
    "plain": [{}, {}, {}],
    "ranks and alphas": [{"r": 2, "lora_alpha": 7}, {"r": 5, "lora_alpha": 3}],
    "rslora": [{"use_rslora": True, "lora_alpha": 9}, {}],
    "patterns": [
        {"target_modules": ["q", "gpt"], "rank_pattern": {"gpt": 4}, "alpha_pattern": {"q": 17}},
        {"target_modules": ["q", "gpt"], "alpha_pattern": {".*gpt": 5}},
    ],
    "other modules": [{"target_modules": ["q"]}, {"target_modules": ["gpt", "q"]}],
    "embedding and convolution": [{"target_modules": ["embed", "conv"]}] * 2,
    "whole modules": [{"modules_to_save": ["head"]}] * 2,
    "bias of lora_B": [
        {"lora_bias": True, "target_modules": ["head"], "lora_alpha": 5},
        {"lora_bias": True, "target_modules": ["head"]},
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_merged_adapter_adds_the_mean_of_what_they_add(tmp_path, kind):
    folders = [adapter(tmp_path / str(i), i, **config) for i, config in enumerate(KINDS[kind])]
    done = merge_adapters(folders, tmp_path / "out")
    assert done.relative_error == pytest.approx(0, abs=1e-9)
    same(effective(tmp_path / "out"), expected(folders))


@pytest.mark.filterwarnings("ignore")
def test_weights_of_any_sum(tmp_path):
    folders = [adapter(tmp_path / str(i), i) for i in range(2)]
    merge_adapters(folders, tmp_path / "out", weights=[1.5, -0.25])
    same(effective(tmp_path / "out"), expected(folders, [1.5, -0.25]))
    with pytest.raises(MismatchError, match="whole tensor"):
        whole = [adapter(tmp_path / f"w{i}", i, modules_to_save=["head"]) for i in range(2)]
        merge_adapters(whole, tmp_path / "none", weights=[1.0, 1.0])
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("modules", [["q", "head"], ["gpt"]])
def test_dora_gives_the_mean_of_the_weights(tmp_path, modules):
    config = {"use_dora": True, "target_modules": modules, "lora_alpha": 4}
    folders = [adapter(tmp_path / str(i), i, **config) for i in range(3)]
    save_file(network().state_dict(), tmp_path / "base.safetensors")
    done = merge_adapters(folders, tmp_path / "out", base=tmp_path / "base.safetensors")
    same(effective(tmp_path / "out"), expected(folders), atol=3e-6)
    assert done.relative_error == pytest.approx(0, abs=1e-9)
    with pytest.raises(ArgumentError, match="Pass base="):
        merge_adapters(folders, tmp_path / "other")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [1, 2, 4, 6, 40])
def test_a_smaller_rank_is_the_best_one_and_says_what_it_costs(tmp_path, rank):
    folders = [adapter(tmp_path / str(i), i) for i in range(2)]
    done = merge_adapters(folders, tmp_path / "out", rank=rank)
    base = network().state_dict()["q.weight"].double()
    exact = expected(folders)["q.weight"] - base
    found = effective(tmp_path / "out")["q.weight"] - base
    u, s, v = torch.linalg.svd(exact)
    kept = min(rank, len(s))
    best = u[:, :kept] * s[:kept] @ v[:kept]
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)
    assert done.relative_error == pytest.approx(
        float((best - exact).norm() / exact.norm()), abs=1e-6
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == rank
    assert done.worst[0] == "base_model.model.q"


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_is_kept(tmp_path):
    folders = [adapter(tmp_path / str(i), i) for i in range(2)]
    for folder in folders:
        file = folder / "adapter_model.safetensors"
        save_file({n: w.bfloat16() for n, w in load_file(file).items()}, file, {"format": "pt"})
    merge_adapters(folders, tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {w.dtype for w in written.values()} == {torch.bfloat16}
    same(effective(tmp_path / "out"), expected(folders), atol=0.02)


@pytest.mark.filterwarnings("ignore")
def test_bad_input(tmp_path):
    one = adapter(tmp_path / "one", 1)
    (tmp_path / "empty").mkdir()
    pissa = adapter(tmp_path / "pissa", 2)
    config = json.loads((pissa / "adapter_config.json").read_text())
    (pissa / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    dora = adapter(tmp_path / "dora", 3, use_dora=True)
    other = adapter(tmp_path / "other", 4)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {n: torch.cat([w, w], 0 if "lora_B" in n else 1) for n, w in tensors.items()},
        other / "adapter_model.safetensors",
    )
    for inputs, options, error, message in [
        ([], {}, ArgumentError, "no adapter was given"),
        ("one", {}, ArgumentError, "expected a list"),
        ([one, tmp_path / "empty"], {}, FormatError, "no adapter_config.json"),
        ([one, pissa], {}, FormatError, "init_lora_weights='pissa'"),
        ([one, dora], {}, MismatchError, "use_dora"),
        ([one, other], {}, MismatchError, "different shapes"),
        ([one], {"rank": 0}, ArgumentError, "rank is 0"),
        ([one], {"weights": [1, 2]}, ArgumentError, "2 weights for 1 adapters"),
        ([one], {"weights": [math.nan]}, ArgumentError, "finite"),
    ]:
        with pytest.raises(error, match=message):
            merge_adapters(inputs, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="exists"):
        merge_adapters([one], tmp_path / "empty")


def test_layers_that_share_one_factor(tmp_path):
    """A torch file keeps that two names are one tensor: both products are there."""
    folders, shared = [], torch.eye(3, 4)
    for seed in range(2):
        torch.manual_seed(seed)
        tensors = {
            f"base_model.model.{layer}.lora_{half}.weight": shared
            if half == "A"
            else torch.randn(5, 3)
            for layer in ("x", "y")
            for half in ("A", "B")
        }
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        torch.save(tensors, folders[-1] / "adapter_model.bin")
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["x", "y"]}
        (folders[-1] / "adapter_config.json").write_text(json.dumps(config))
    merge_adapters(folders, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for layer in ("x", "y"):
        a, b = (found[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
        states = [torch.load(folder / "adapter_model.bin") for folder in folders]
        mean = (
            sum(state[f"base_model.model.{layer}.lora_B.weight"] @ shared for state in states) / 2
        )
        torch.testing.assert_close(b @ a * config["lora_alpha"] / config["r"], mean)


def changed(folder, target, tensors=lambda found: found, config=()):
    """A copy of an adapter with other tensors, and other fields in its configuration."""
    target.mkdir()
    found = tensors(load_file(folder / "adapter_model.safetensors"))
    save_file(found, target / "adapter_model.safetensors")
    known = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**known, **dict(config)}))
    return target


def without(part):
    return lambda found: {name: value for name, value in found.items() if part not in name}


def with_value(part, bad):
    return lambda found: {n: v + bad if part in n else v for n, v in found.items()}


DAMAGED = {
    "no A": (without("lora_A"), {}, MismatchError, "has no lora_A beside it"),
    "no embedding's A": (without("embedding_A"), {}, MismatchError, "has no lora_A beside it"),
    "no B": (without("lora_B"), {}, MismatchError, "has nothing"),
    "empty": (without(""), {}, FormatError, "holds no tensors"),
    "NaN": (with_value("lora_A", math.nan), {}, NonFiniteError, "lora_A.* is not finite"),
    "inf": (with_value("embedding_B", math.inf), {}, NonFiniteError, "_B.* is not finite"),
    "another rank": (dict, {"r": 5}, MismatchError, "has 3 rows; expected 5"),
    "a module's": (dict, {"rank_pattern": {"q": 2}}, MismatchError, "has 3 rows; expected 2"),
    "rank 0": (dict, {"r": 0}, FormatError, "r is 0"),
    "rank as text": (dict, {"r": "3"}, FormatError, "r is '3'"),
    "no alpha": (dict, {"lora_alpha": None}, FormatError, "lora_alpha is None"),
    "alpha's list": (dict, {"alpha_pattern": [1]}, FormatError, "alpha_pattern is .1."),
    "alpha's text": (dict, {"alpha_pattern": {"q": "x"}}, FormatError, "alpha_pattern is"),
    "no pattern": (dict, {"rank_pattern": {"q(": 3}}, FormatError, "no regular expression"),
}


@pytest.mark.filterwarnings("ignore")
def test_damaged_adapters_are_refused(tmp_path):
    whole = [adapter(tmp_path / f"a{i}", i, target_modules=["q", "embed"]) for i in (1, 2)]
    for at, (tensors, config, error, message) in enumerate(DAMAGED.values()):
        bad = changed(whole[1], tmp_path / f"bad{at}", tensors, config)
        for inputs in ([whole[0], bad], [bad, whole[0]]):
            with pytest.raises(error, match=message):
                merge_adapters(inputs, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 0.7]])
def test_the_base_s_copy_beside_an_embedding_is_carried_over(tmp_path, weights):
    plain = adapter(tmp_path / "plain", 1)
    embedded = adapter(tmp_path / "embedded", 2, target_modules=["embed"])
    copy = {"base_model.model.embed.base_layer.weight": network().embed.weight.data}
    saved = changed(embedded, tmp_path / "saved", lambda found: {**found, **copy})
    for inputs in ([plain, saved], [saved, plain]):
        merge_adapters(inputs, tmp_path / "merged", weights=weights, overwrite=True)
        same(effective(tmp_path / "merged"), expected(inputs, weights), 2e-6)
        found = load_file(tmp_path / "merged" / "adapter_model.safetensors")
        assert torch.equal(found[next(iter(copy))], network().embed.weight.data)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.weights = nn.Parameter(torch.zeros(3, 6, 6))

    def forward(self, hidden):
        return torch.einsum("bi,eio->bo", self.q(hidden), self.weights)


@pytest.mark.filterwarnings("ignore")
def test_experts_in_one_parameter_are_refused(tmp_path):
    for seed in (1, 2):
        config = LoraConfig(r=2, target_modules=["q"], target_parameters=["weights"])
        get_peft_model(nn.ModuleDict({"experts": Experts()}), config).save_pretrained(
            tmp_path / str(seed)
        )
    with pytest.raises(MismatchError, match=r"6 rows; expected 2.*target_parameters"):
        merge_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.filterwarnings("ignore")
def test_on_the_command_line(tmp_path, capsys):
    from polyak.cli import app

    folders = [str(adapter(tmp_path / str(i), i)) for i in range(2)]
    out = str(tmp_path / "out")
    app.app(
        ["merge-adapters", *folders, "-o", out, "--weights", "0.25,0.75"],
        result_action="return_value",
    )
    assert "2 adapters, 1 modules of rank 6, exact" in capsys.readouterr().out
    same(effective(out), expected(folders, [0.25, 0.75]))
    app.app(
        ["merge-adapters", *folders, "-o", out, "--rank", "2", "--overwrite"],
        result_action="return_value",
    )
    assert "rank 2, relative error" in capsys.readouterr().out
    assert app.run(["merge-adapters", *folders, "-o", out]) == 1
