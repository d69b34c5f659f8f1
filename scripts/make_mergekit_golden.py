"""Make `tests/data/mergekit/`: tiny merges by mergekit itself, for the tests that ours are equal.

Run it in an environment that has mergekit (0.1.x) and transformers; polyak is not needed:

    python3.11 -m venv /tmp/mergekit-venv && /tmp/mergekit-venv/bin/pip install mergekit
    /tmp/mergekit-venv/bin/python scripts/make_mergekit_golden.py
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

DATA = Path(__file__).parents[1] / "tests" / "data" / "mergekit"
WEIGHTS = (0.2, 0.3, 0.5)
DELTAS = {
    "ties": {"density": 0.2, "weights": (0.5, 1.0, 0.25), "normalize": True, "lambda": 0.8},
    "dare_ties": {"density": 1.0, "weights": (0.5, 1.0, 0.25), "normalize": True},
    "dare_linear": {"density": 1.0, "weights": (0.5, 1.0, 0.25), "normalize": False},
    "model_stock": {},
    "slerp": {"t": 0.3},
}


def network() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def merged(recipe: dict, out: Path) -> None:
    """Write the one file that mergekit makes of the recipe (JSON is YAML)."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "recipe.yml").write_text(json.dumps(recipe))
        command = [str(Path(sys.executable).with_name("mergekit-yaml")), f"{scratch}/recipe.yml"]
        subprocess.run([*command, f"{scratch}/out"], check=True)
        (found,) = Path(scratch, "out").glob("*.safetensors")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(found, out)
        if out.stem == "model":
            shutil.copy(Path(scratch, "out", "config.json"), out.parent)


def linear() -> None:
    """Separate networks in bfloat16, and their weighted mean."""
    for index in range(len(WEIGHTS)):
        torch.manual_seed(index)
        network().to(torch.bfloat16).save_pretrained(DATA / f"model-{index}")
    models = [
        {"model": str(DATA / f"model-{i}"), "parameters": {"weight": w}}
        for i, w in enumerate(WEIGHTS)
    ]
    recipe = {"models": models, "merge_method": "linear", "dtype": "bfloat16"}
    merged(recipe, DATA / "merged" / "model.safetensors")


def deltas() -> None:
    """A base, three runs that began from it, and what each method makes of them, in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        base = network()
        shared = [0.01 * torch.randn_like(w) for w in base.parameters()]
        base.save_pretrained(f"{scratch}/base")
        for index in range(3):
            run = network()
            run.load_state_dict(base.state_dict())
            with torch.no_grad():
                for weight, all_alike in zip(run.parameters(), shared, strict=True):
                    weight.add_(all_alike + 0.01 * torch.randn_like(weight))
            run.save_pretrained(f"{scratch}/run-{index}")
        for name in ("base", "run-0", "run-1", "run-2"):
            (DATA / "deltas").mkdir(exist_ok=True)
            shutil.copy(f"{scratch}/{name}/model.safetensors", DATA / f"deltas/{name}.safetensors")
        for method, given in DELTAS.items():
            merged(recipe_of(method, given, scratch), DATA / f"deltas/{method}.safetensors")


def recipe_of(method: str, given: dict, scratch: str) -> dict:
    runs = [{"model": f"{scratch}/run-{i}"} for i in range(2 if method == "slerp" else 3)]
    for run, weight in zip(runs, given.get("weights", ()), strict=False):
        run["parameters"] = {"weight": weight, "density": given["density"]}
    return {
        "models": runs,
        "merge_method": method,
        "base_model": f"{scratch}/{'run-0' if method == 'slerp' else 'base'}",
        "parameters": {k: v for k, v in given.items() if k not in ("weights", "density")},
        "dtype": "float32",
    }


def main() -> None:
    shutil.rmtree(DATA, ignore_errors=True)
    linear()
    deltas()
    for extra in DATA.rglob("generation_config.json"):
        extra.unlink()


if __name__ == "__main__":
    main()
