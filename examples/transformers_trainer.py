"""The Trainer of Transformers: one line more, and the average is evaluated, saved and left in the model.

python examples/transformers_trainer.py        # works in a temporary folder
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import polyak
from polyak.integrations.transformers import attach  # average


def main(folder: str) -> None:
    torch.manual_seed(0)
    rows = torch.randint(3, 16, (64, 1)) + torch.arange(8)
    examples = [{"input_ids": row % 16, "labels": row % 16} for row in rows]
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    trainer = Trainer(
        LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=2)),
        TrainingArguments(
            folder,
            num_train_epochs=5,
            learning_rate=0.01,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=examples[:48],
        eval_dataset=examples[48:],
    )
    handle = attach(trainer, polyak.EMA.from_half_life(5))  # average
    trainer.train()

    best = trainer.state.best_model_checkpoint
    averaged = LlamaForCausalLM.from_pretrained(f"{best}/averaged")
    assert torch.equal(averaged.lm_head.weight, trainer.model.lm_head.weight)
    print(f"{handle.average!r}, loss {trainer.state.best_metric:.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)
