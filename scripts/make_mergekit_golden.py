"""Make `tests/data/mergekit/`: a tiny linear merge by mergekit itself, for the test that ours is equal.

Run it in an environment that has mergekit (0.1.x) and transformers; polyak is not needed:

    python3.11 -m venv /tmp/mergekit-venv && /tmp/mergekit-venv/bin/pip install mergekit
    /tmp/mergekit-venv/bin/python scripts/make_mergekit_golden.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

DATA = Path(__file__).parents[1] / "tests" / "data" / "mergekit"
WEIGHTS = (0.2, 0.3, 0.5)


def main() -> None:
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
    shutil.rmtree(DATA, ignore_errors=True)
    for index in range(len(WEIGHTS)):
        torch.manual_seed(index)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(DATA / f"model-{index}")
    models = "".join(
        f"  - model: {DATA / f'model-{i}'}\n    parameters: {{weight: {w}}}\n"
        for i, w in enumerate(WEIGHTS)
    )
    recipe = f"models:\n{models}merge_method: linear\ndtype: bfloat16\n"
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "recipe.yml").write_text(recipe)
        command = [str(Path(sys.executable).with_name("mergekit-yaml")), f"{scratch}/recipe.yml"]
        subprocess.run([*command, f"{scratch}/out", "--no-copy-tokenizer"], check=True)
        for name in ("model.safetensors", "config.json"):
            found = [*Path(scratch, "out").glob("*.safetensors")] if "model" in name else []
            source = found[0] if found else Path(scratch, "out", name)
            (DATA / "merged").mkdir(exist_ok=True)
            shutil.copy(source, DATA / "merged" / name)
    for extra in DATA.rglob("generation_config.json"):
        extra.unlink()


if __name__ == "__main__":
    main()
