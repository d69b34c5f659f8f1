"""The adapter in what derives from the Trainer, and with adapters of PEFT."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as SentenceArguments
from sentence_transformers.sentence_transformer import modules as parts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import polyak
from polyak.integrations.transformers import attach

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("error::polyak.errors.PolyakWarning"),
]
EMA = polyak.EMA(decay=0.7)
WORDS = ["[PAD]", "[UNK]", "[EOS]", *"abcdefghijkl"]


def tokenizer():
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **named, model_max_length=16)


def language_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=2))


def lora(kind=LoraConfig):
    return kind(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def options(folder, **others):
    basic = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 0.05}
    basic |= {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    return {"output_dir": str(folder), "save_steps": 2, "max_steps": 6, **basic, **others}


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def with_adapter(folder, **others):
    rows = torch.randint(0, 16, (16, 6), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": row, "labels": row} for row in rows]
    model = get_peft_model(language_model(), lora())
    arguments = TrainingArguments(**options(folder, **{"load_best_model_at_end": True, **others}))
    return Trainer(model, arguments, train_dataset=examples, eval_dataset=examples[:8])


def test_adapters(tmp_path):
    trainer = with_adapter(tmp_path)
    handle = attach(trainer, EMA)
    trainer.train()
    assert len(handle.average.state_dict()["tensors"]) == 4
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    best = trainer.state.best_model_checkpoint
    files = {path.name for path in (tmp_path / "checkpoint-6" / "averaged").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not any(name.startswith("model") for name in files)
    loaded = PeftModel.from_pretrained(language_model(), f"{best}/averaged")
    assert same(weights(loaded), weights(trainer.model))
    # A folder with an adapter inside a checkpoint is not one more adapter of the model.
    again = with_adapter(tmp_path / "again")
    second = attach(again, EMA)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert list(again.model.peft_config) == ["default"]
    assert same(second.average.state_dict()["tensors"], handle.average.state_dict()["tensors"])
    assert "load_adapter" not in again.model.__dict__


@pytest.mark.parametrize("adapter", [False, True])
def test_supervised_fine_tuning(tmp_path, adapter):
    texts = Dataset.from_dict({"text": ["a b c d e", "f g h i j", "k l a b c", "d e f g h"] * 4})
    arguments = SFTConfig(
        **options(tmp_path, load_best_model_at_end=True, gradient_accumulation_steps=2),
        max_length=8,
    )
    trainer = SFTTrainer(
        language_model(),
        arguments,
        train_dataset=texts,
        eval_dataset=texts,
        processing_class=tokenizer(),
        peft_config=lora() if adapter else None,
    )
    handle = attach(trainer, EMA)
    trainer.train()
    assert handle.average.count == 6
    assert len(handle.average.state_dict()["tensors"]) == (4 if adapter else 12)
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert (tmp_path / "checkpoint-6" / "averaged" / "tokenizer.json").exists()


def test_sentence_transformers(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8}
    bert = BertModel(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    model = SentenceTransformer(
        modules=[parts.Transformer(str(tmp_path / "bert")), parts.Pooling(8)], device="cpu"
    )
    texts = {"first": ["a b", "c d", "e f", "g h"] * 4, "second": ["b", "d", "k", "l"] * 4}
    pairs = Dataset.from_dict({**texts, "score": [1.0, 1.0, 0.0, 0.0] * 4})
    trainer = SentenceTransformerTrainer(
        model,
        SentenceArguments(**options(tmp_path / "run", load_best_model_at_end=True)),
        train_dataset=pairs,
        eval_dataset=pairs,
    )
    handle = attach(trainer, EMA)
    trainer.train()
    assert handle.average.count == 6
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    best = SentenceTransformer(f"{trainer.state.best_model_checkpoint}/averaged", device="cpu")
    assert same(weights(best), weights(trainer.model))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert handle.average.count == 6


def test_a_callback_that_was_there_before_sees_the_average_at_the_end(tmp_path):
    held = []

    class Saving(TrainerCallback):
        def on_train_end(self, args, state, control, model, **objects):
            held.append(weights(model))

    trainer = with_adapter(tmp_path, load_best_model_at_end=False)
    trainer.add_callback(Saving())
    attach(trainer, EMA)
    trainer.train()
    assert same(held[0], weights(trainer.model))
