"""What averaging in the Trainer costs beside the callback that people write: a deep copy, updated in a loop.

python benchmarks/frameworks_transformers.py [--rounds 5] [--width 512]

Each round trains the same model three ways, alternating; the figures are the medians over the rounds of what
is added to a plain run: milliseconds of CPU time per step, and bytes of tensors that are alive at the end of training's steps.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import polyak
from polyak.integrations.transformers import attach


class DeepCopyEMA(TrainerCallback):
    """As in many repositories: no debiasing, one kernel per parameter."""

    def on_train_begin(self, args, state, control, model, **objects):
        self.average = copy.deepcopy(model)

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **objects):
        for kept, live in zip(self.average.parameters(), model.parameters(), strict=True):
            kept.mul_(0.99).add_(live, alpha=0.01)


class Watch(TrainerCallback):
    """The time of the steps after the first few, and the memory after the last."""

    def on_step_begin(self, args, state, control, **objects):
        if state.global_step == 5:
            self.begun = time.process_time()

    def on_step_end(self, args, state, control, **objects):
        if state.global_step == args.max_steps:
            self.seconds = (time.process_time() - self.begun) / (args.max_steps - 5)
            self.nbytes = living_bytes()


def living_bytes():
    gc.collect()
    tensors = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def train(arm, width, folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4}
    ids = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rows = torch.randint(0, 256, (8, 16))
    examples = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        folder, max_steps=25, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    watch = Watch()
    trainer = Trainer(
        LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=4)),
        arguments,
        train_dataset=examples,
    )
    if arm == "deepcopy":
        trainer.add_callback(DeepCopyEMA())
    if arm == "polyak":
        attach(trainer, polyak.EMA(decay=0.99))
    trainer.add_callback(watch)
    trainer.train()
    return watch.seconds, watch.nbytes


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    given = parser.parse_args()
    found = {arm: [] for arm in ("plain", "deepcopy", "polyak")}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.rounds):
            for arm, results in found.items():
                results.append(train(arm, given.width, folder))
    for arm in ("deepcopy", "polyak"):
        pairs = list(zip(found[arm], found["plain"], strict=True))
        added = statistics.median(a[0] - b[0] for a, b in pairs)
        nbytes = statistics.median(a[1] - b[1] for a, b in pairs)
        figures = {"added_ms_per_step": added * 1e3, "added_mib": nbytes / 2**20}
        print(json.dumps({"arm": arm, **{n: round(v, 2) for n, v in figures.items()}}))
    print(
        json.dumps(
            {"plain_ms_per_step": round(statistics.median(s for s, _ in found["plain"]) * 1e3, 2)}
        )
    )


if __name__ == "__main__":
    main()
